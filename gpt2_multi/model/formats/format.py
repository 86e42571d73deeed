"""What a format of checkpoints is, and what several of them use."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError, shortened
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import LONGEST, Array, Made, reading
from gpt2_multi.files.containers.pickles import Inert
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import ACTIVATIONS
from gpt2_multi.model.spelling import Spelling
from gpt2_multi.model.weights import EMBEDDINGS, HEADS, weight_of

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
FOREIGN = ("blocks.0.attn.W_Q", "blocks.0.attn.q.weight", "blocks.0.attn.query.weight")
TORCH_FILES = ("*.pt", "*.pth", "*.ckpt", "*.bin")
STATE_FILES = (*TORCH_FILES, "*.safetensors")  # that state dicts lie in
POSITIONS = (
    "wpe.weight",
    "pos_emb",
    "pos_embed.W_pos",
    "pos_embed.weight",
)  # what their embedding is called in state dicts
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Format:
    """A format of checkpoints.

    `main` are patterns of the file that a folder of this format is recognised by, `own` those of all its files but
    config.json. `others` are names by which people call such a file: read where it is given itself or lies alone, and
    where `is_it` says so of what is in it. `config` gives None where the files do not say what model they are of; of
    its tensors `known` gives then what else than their shapes says something of it.
    `fixed` are the values of settings that its program computes with, whatever they should be; `no_room` those without
    which it has no names for all tensors. An empty `dtypes` is all dtypes.
    """

    title: str
    spelling: Spelling
    main: tuple[str, ...]
    own: tuple[str, ...]
    read: Callable[[Path], Tensors]
    write: Callable[[Path, dict[str, Made], GPT2Config, int | str], None]
    config: Callable[[Path], GPT2Config | None]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    no_room: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    heads: tuple[str, ...] = tuple(ARCHITECTURES)
    others: tuple[str, ...] = ()
    is_it: Callable[[Path], bool] = lambda main: True
    dtypes: tuple[str, ...] = ()
    known: Callable[[Path, Tensors], dict[str, Any]] = lambda main, tensors: {}


def beside(main: Path) -> GPT2Config | None:
    """The configuration in the config.json that lies beside a file, if one does."""
    path = main.with_name("config.json")
    return GPT2Config.from_json_file(path) if path.exists() else None


def sharded(read: Callable[[Path], Tensors]) -> Callable[[Path], Tensors]:
    """A reader that takes the index of shards too."""
    return lambda main: containers.read_shards(main, read) if main.suffix == ".json" else read(main)


def is_state(names: Collection[Any]) -> bool:
    """Whether a dict whose tensors have these names may be the state dict of a GPT-2."""
    return any(isinstance(name, str) and name.endswith(POSITIONS) for name in names)


def is_foreign(names: Iterable[str]) -> bool:
    """Whether these are the names of a program whose state dict is a format of its own, in whatever file it lies."""
    return any(name.endswith(FOREIGN) for name in names)


def has_settings(found: Mapping[Any, Any]) -> bool:
    """Whether a file of torch.save has what nanoGPT's has: a model, and its settings in a dict."""
    return isinstance(found.get("model"), dict) and isinstance(found.get("model_args"), dict)


def tensors_of(main: Path) -> Tensors:
    """The tensors of a state dict in a file of torch.save, below keys or not, or in safetensors."""
    if main.suffix == ".safetensors":
        return containers.read_safetensors(main)
    return state(main, containers.read_torch(main, is_state))


def outline(main: Path) -> dict[Any, Any]:
    """What such a file holds by its names, without a look at a number."""
    return dict(containers.read_safetensors(main)) if main.suffix == ".safetensors" else containers.read_outline(main)


def has_names(wanted: Iterable[str], main: Path) -> bool:
    """Whether such a file holds a dict, however deep, among whose names each of these is the end of one."""
    return bool(with_names(wanted, main))


def with_names(wanted: Iterable[str], main: Path) -> dict[Any, Any]:
    """The first such dict, with a shape for each tensor; an empty one where there is none."""
    queue: list[dict[Any, Any]] = [outline(main)]
    seen = {id(queue[0])}
    for inside in queue:
        names = [name for name in inside if isinstance(name, str)]
        if all(any(name.endswith(end) for name in names) for end in wanted):
            return inside
        inner = {id(value): value for value in inside.values() if isinstance(value, dict) and id(value) not in seen}
        queue += inner.values()
        seen.update(inner)
    return {}


def state(path: Path, found: Mapping[Any, Any]) -> Tensors:
    """The tensors of a file of PyTorch by their names: of a state dict, or of those below keys, the keys first.

    What else is in such a file, an optimizer or how a model was trained, is not looked at.
    """
    arrays = [isinstance(value, np.ndarray) for value in found.values()]
    if all(arrays) or is_state(found) or not (below := _below(path, found)):
        return _checked(path, found)
    return below


def _checked(path: Path, found: Mapping[Any, Any]) -> Tensors:
    for name, array in found.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            value = f"what {plain(array)} would make, which is not run" if isinstance(array, Inert) else "another value"
            raise CheckpointError(f"{path}: expected tensors by their names, found {plain(name)} with {value}")
    return dict(found)


def _below(path: Path, found: Mapping[Any, Any]) -> Tensors:
    """The state dicts in a dict, however deep, their tensors with the keys before their names."""
    tensors: Tensors = {}
    seen, queue = {id(found)}, [("", found)]
    for before, inside in queue:
        for key, value in inside.items():
            name = f"{before}{key}."
            if not isinstance(value, dict) or id(value) in seen or len(name) > LONGEST:
                continue
            seen.add(id(value))
            if is_state([name for name, part in value.items() if isinstance(part, np.ndarray)]):
                tensors.update({name + inner: array for inner, array in _checked(path, value).items()})
            else:
                queue.append((name, value))
    return tensors


def plain(value: Any) -> str:
    """A string or number of a file for an error; the text of any other value may be longer than the world."""
    known = (str, int, float, bool, type(None), Inert)
    return shortened(repr(value)) if isinstance(value, known) else type(value).__name__


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


EMBEDDING, HEAD = (weight_of(param, GPT2Config(), None) for param in (EMBEDDINGS[0], HEADS["lm"][0]))  # rows, for names


def snake_case(name: str) -> str:
    """The name that Keras gives a model of a class."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
