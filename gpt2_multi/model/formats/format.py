"""What a format of checkpoints is, and what several of them use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError, shortened
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Array, Made, reading
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import ACTIVATIONS
from gpt2_multi.model.spelling import Spelling

ARCHITECTURES = {  # of each head, the class that config.json names
    "base": "GPT2Model",
    "lm": "GPT2LMHeadModel",
    "double_heads": "GPT2DoubleHeadsModel",
    "sequence_classification": "GPT2ForSequenceClassification",
    "token_classification": "GPT2ForTokenClassification",
    "question_answering": "GPT2ForQuestionAnswering",
}
TANH_GELU = tuple(name for name, function in ACTIVATIONS.items() if function == "tanh_gelu")
PLAIN = {  # what GPT-2 is where nothing can be set
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
NO_ROOM = {"add_cross_attention": (False,), "tie_word_embeddings": (True,), "pruned_heads": ({},)}
TANH = {**PLAIN, "activation_function": TANH_GELU}
QUARTER = {**NO_ROOM, "n_inner": (None,)}  # whose inner layer is four times as wide
DECODERS = ("lm", "base")  # the heads of a program that only writes texts
SAME = {"n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    `main` are patterns of the file that a folder of this format is recognised by, `own` those of all its files but
    config.json. `fixed` are the values of settings that its program computes with, whatever they should be; `no_room`
    those without which it has no names for all tensors. An empty `heads` is all heads.
    """

    title: str
    spelling: Spelling
    main: tuple[str, ...]
    own: tuple[str, ...]
    read: Callable[[Path], Tensors]
    write: Callable[[Path, dict[str, Made], GPT2Config, int | str], None]
    config: Callable[[Path], GPT2Config]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    no_room: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    heads: tuple[str, ...] = tuple(ARCHITECTURES)


def beside(main: Path) -> GPT2Config:
    """The configuration in the config.json that lies beside a file."""
    return GPT2Config.from_json_file(main.with_name("config.json"))


def sharded(read: Callable[[Path], Tensors]) -> Callable[[Path], Tensors]:
    """A reader that takes the index of shards too."""
    return lambda main: containers.read_shards(main, read) if main.suffix == ".json" else read(main)


def state(path: Path, found: Mapping[Any, Any]) -> Tensors:
    """A state dict, which holds tensors by their names."""
    for name, array in found.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise CheckpointError(f"{path}: expected tensors by their names, found {plain(name)} with another value")
    return dict(found)


def plain(value: Any) -> str:
    """A string or number of a file for an error; the text of any other value may be longer than the world."""
    return shortened(repr(value)) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def settings_of(path: Path, found: Mapping[str, Any], names: Mapping[str, str], **more: Any) -> GPT2Config:
    """A configuration from another program's settings, under its names."""
    lacking = [name for name in names if name not in found]
    if lacking:
        raise CheckpointError(f"{path}: lacks {', '.join(lacking)}; it is not what this format keeps its settings in")
    for name, value in [*((name, found[name]) for name in names), *more.items()]:
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise CheckpointError(f"{path}: expected a number for {name}, found a {type(value).__name__}")
    with reading(path, "file of settings"):
        return GPT2Config(**{ours: found[name] for name, ours in names.items()}, **more)


def snake_case(name: str) -> str:
    """The name that Keras gives a model of a class."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
