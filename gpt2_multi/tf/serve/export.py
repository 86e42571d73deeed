"""`export_saved_model`: tokenizer, model and generation in one file that needs TensorFlow alone."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files.folders import replaced
from gpt2_multi.files.hub import SAVED_MODEL
from gpt2_multi.generation.config import GenerationConfig, task_options
from gpt2_multi.model import inputs
from gpt2_multi.tf.serve.signatures import IDS, Continuing, logits_of, of_ids, of_texts, signature
from gpt2_multi.tf.serve.tokenizer import TFGPT2Tokenizer

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

# Options that no file can have, switched off.
UNWRITTEN: dict[str, Any] = {
    "max_length": None, "max_time": None, "sliding_window": False, "prompt_lookup_num_tokens": None,
}  # fmt: skip


def export_saved_model(
    self: keras.Model,
    folder: str | os.PathLike[str],
    *,
    generation_config: GenerationConfig | None = None,
    tokenizer: GPT2Tokenizer | TFGPT2Tokenizer | None = None,
    jit_compile: bool = False,
    **options: Any,
) -> None:
    """Write a SavedModel, which TensorFlow alone loads and serves; with a `tokenizer` from texts to texts.

    Its signatures, which are also functions of what `tf.saved_model.load` gives:

    - `logits`: `input_ids` and `attention_mask`, (B, T) int32, to `logits` (B, T, V).
    - `tokenize`, with a tokenizer: `text` (B,) of strings to `input_ids` and `attention_mask`, (B, T) int32.
    - `generate`: `text` (B,), or without a tokenizer `input_ids` and `attention_mask`, and the tensors of `Choices`, to
      `text` (B * R,), prompts included; `ids` (B * R, N) int32, those of the prompts and what follows up to its end,
      then filled up; and `finished` (B * R,) bool, whether a text came to its end before `max_new_tokens`.
    - `serving_default`: `generate` without the tensors of `Choices`, for clients that have to name every input.

    `generation_config` and `options` are those of the model's `generate`: they are fixed in the file, but for
    `Choices`, whose defaults they are. Row i of the answers has the noise of `seed` + i, as in a pipeline. A tokenizer
    adds and truncates what it does when it is called; `text` has the whole prompt all the same. Control tokens in texts
    are ordinary text, since strangers write them; a TFGPT2Tokenizer reads them as it is told. With `jit_compile` XLA
    compiles the model, anew for each shape. A SavedModel that was there is replaced when the new one is whole. Raises
    CheckpointError where the folder holds something else or cannot be written, and InputError for options that cannot
    be used.
    """
    inputs.check_truth("jit_compile", jit_compile)
    target = place_of(folder)
    own = {} if tokenizer is None else task_options(self.config)
    config = settled(self, generation_config, own, options)
    root = tf.Module()
    root.held = [variable.value for variable in self.variables]
    if tokenizer is None:
        functions = of_ids(Continuing(self, config, None, jit_compile))
    else:
        layer = layer_of(tokenizer)
        root.tables = layer.encoder
        functions = of_texts(Continuing(self, config, layer.python, jit_compile), layer)
    functions["logits"] = signature(logits_of(self, jit_compile), IDS)
    for name, function in functions.items():
        setattr(root, name, function)
    with replaced(target, lambda path: path.name in SAVED_MODEL) as stage:
        try:
            tf.saved_model.save(root, str(stage), functions)
        except tf.errors.OpError as error:
            raise OSError(" ".join(str(error).split())) from error


def layer_of(tokenizer: GPT2Tokenizer | TFGPT2Tokenizer) -> TFGPT2Tokenizer:
    """The tokenizer in the graph; one that is made here finds no control tokens in the texts of strangers."""
    if isinstance(tokenizer, TFGPT2Tokenizer):
        return tokenizer
    return TFGPT2Tokenizer.from_tokenizer(tokenizer, split_special_tokens=True)


def settled(
    model: keras.Model, given: GenerationConfig | None, own: dict[str, Any], options: dict[str, Any]
) -> GenerationConfig:
    """The options in the file; `own` are of the model's task. What of its settings no file can have is left out."""
    config, longest = model.generation_config.resolve(given, own | options), model.transformer.wpe.input_dim
    asked = options if given is None else UNWRITTEN
    left = [name for name in UNWRITTEN if getattr(config, name) and name not in asked]
    if left:
        warnings.warn(
            f"{', '.join(left)} of the model's settings cannot be in a SavedModel, and is left out", stacklevel=3
        )
        config = replace(config, **{name: UNWRITTEN[name] for name in left})
    if config.max_new_tokens is None and config.max_length is None:
        config = replace(config, max_new_tokens=min(config.total_length(0), longest - 1))
    if config.max_new_tokens is None:
        raise InputError("max_length: a SavedModel is for prompts of every length; give max_new_tokens instead")
    inputs.check_context(1, config.max_new_tokens, longest)
    return replace(config, max_length=None)


def place_of(folder: str | os.PathLike[str]) -> Path:
    """Where the SavedModel will be; CheckpointError where something else is."""
    if not os.fspath(folder) or "://" in os.fspath(folder):
        raise CheckpointError(f"folder: expected the path of a local folder, found {os.fspath(folder)!r}")
    try:
        target = Path(folder).resolve()
        found = {path.name for path in target.iterdir()} if target.is_dir() else set()
        is_other = target.exists() and not target.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder!r}: expected the path of a folder ({error})") from None
    other = sorted(found.difference(SAVED_MODEL) if "saved_model.pb" in found else found)
    if other or is_other:
        also = f"{', '.join(other[:3])} in it" if other else "no folder"
        raise CheckpointError(f"{target}: expected a new folder or a SavedModel to replace, found {also}")
    return target
