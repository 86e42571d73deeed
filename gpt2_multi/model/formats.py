"""The formats: how each is recognised, read and written, and what the program that reads it takes for granted."""

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
from gpt2_multi.files.hub import WEIGHTS
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import ACTIVATIONS
from gpt2_multi.model.spelling import (
    FLAX_FILE,
    KERAS_HUB,
    KERAS_WEIGHTS,
    NANOGPT,
    OPENAI,
    TF,
    TORCH,
    TRANSFORMERS,
    Spelling,
)
from gpt2_multi.model.weights import table

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


def _state_config(main: Path) -> GPT2Config:
    """The configuration beside a state dictionary; who saves one alone, as transformers' Trainer, writes none."""
    if not main.with_name("config.json").exists():
        raise CheckpointError(
            f"{main.parent}: has a state dictionary of gpt2_multi.pt, as transformers' Trainer saves it, but no "
            "config.json; give config=model.config, or put it there by model.config.save_pretrained(folder)"
        )
    return beside(main)


def sharded(read: Callable[[Path], Tensors]) -> Callable[[Path], Tensors]:
    """A reader that takes the index of shards too."""
    return lambda main: containers.read_shards(main, read) if main.suffix == ".json" else read(main)


def _read_safetensors(main: Path) -> Tensors:
    return containers.read_safetensors(main)


def _write_safetensors(folder: Path, tensors: dict[str, Made], config: GPT2Config, size: int | str) -> None:
    containers.write_shards(folder / "model.safetensors", tensors, containers.write_safetensors, size)
    config.save_pretrained(folder)


def _write_tf_safetensors(folder: Path, tensors: dict[str, Made], config: GPT2Config, size: int | str) -> None:
    containers.write_shards(
        folder / "model.safetensors", tensors, lambda path, part: containers.write_safetensors(path, part, "tf"), size
    )
    config.save_pretrained(folder)


def _read_pytorch(path: Path) -> Tensors:
    return _state(path, containers.read_torch(path))


def _state(path: Path, found: Mapping[Any, Any]) -> Tensors:
    """A state dict, which holds tensors by their names."""
    for name, array in found.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise CheckpointError(f"{path}: expected tensors by their names, found {_plain(name)} with another value")
    return dict(found)


def _plain(value: Any) -> str:
    """A string or number of a file for an error; the text of any other value may be longer than the world."""
    return shortened(repr(value)) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def _write_pytorch(folder: Path, tensors: dict[str, Made], config: GPT2Config, size: int | str) -> None:
    containers.write_shards(folder / "pytorch_model.bin", tensors, containers.write_torch, size)
    config.save_pretrained(folder)


def _read_tf_h5(path: Path) -> Tensors:
    """The weights by TensorFlow's names, without the group and the model's name that Keras puts before them."""
    found: Tensors = {}
    for name, array in containers.read_hdf5(path).items():
        first, *rest = name.split("/")
        found["/".join(rest[1:]) if first in rest[1:2] else name] = array
    return found


def _write_tf_h5(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    model = snake_case(f"TF{(config.architectures or ['GPT2LMHeadModel'])[0]}")
    groups: dict[str, list[bytes]] = {}
    for name in tensors:
        groups.setdefault(name.split("/")[0], []).append(f"{model}/{name}".encode())
    attributes: dict[str, dict[str, Any]] = {group: {"weight_names": names} for group, names in groups.items()}
    layers = [name.encode() for name in groups]
    attributes[""] = {"layer_names": layers, "backend": b"tensorflow", "keras_version": b"2.19.0"}
    attributes["top_level_model_weights"] = {"weight_names": []}
    placed = {f"{name.split('/')[0]}/{model}/{name}": made for name, made in tensors.items()}
    containers.write_hdf5(folder / "tf_model.h5", placed, attributes)
    config.save_pretrained(folder)


def snake_case(name: str) -> str:
    """The name that Keras gives a model of a class."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def _read_flax(main: Path) -> Tensors:
    return containers.read_msgpack(main)


def _write_flax(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    containers.write_msgpack(folder / "flax_model.msgpack", tensors)
    config.save_pretrained(folder)


_SAME = {"n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "n_positions", **_SAME}


def _openai_config(main: Path) -> GPT2Config:
    if main.with_name("config.json").exists():
        return beside(main)
    return _settings(main.with_name("hparams.json"), read_json(main.with_name("hparams.json")), HPARAMS)


def _settings(path: Path, found: Mapping[str, Any], names: Mapping[str, str], **more: Any) -> GPT2Config:
    """A configuration from another program's settings, under its names."""
    lacking = [name for name in names if name not in found]
    if lacking:
        raise CheckpointError(f"{path}: lacks {', '.join(lacking)}; it is not what this format keeps its settings in")
    for name, value in [*((name, found[name]) for name in names), *more.items()]:
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise CheckpointError(f"{path}: expected a number for {name}, found a {type(value).__name__}")
    with reading(path, "file of settings"):
        return GPT2Config(**{ours: found[name] for name, ours in names.items()}, **more)


def _read_openai(main: Path) -> Tensors:
    return containers.read_bundle(main.with_suffix(""))


def _write_openai(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    containers.write_bundle(folder / "model.ckpt", tensors)
    write_json(folder / "hparams.json", {name: getattr(config, ours) for name, ours in HPARAMS.items()})
    text = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    (folder / "checkpoint").write_text(text, encoding="utf-8")
    config.save_pretrained(folder)


MODEL_ARGS = {"vocab_size": "vocab_size", "block_size": "n_positions", **_SAME}


def _nanogpt_config(main: Path) -> GPT2Config:
    if main.with_name("config.json").exists():
        return beside(main)
    found = containers.read_torch(main).get("model_args")
    if not isinstance(found, dict):
        raise CheckpointError(f"{main}: expected 'model_args', as nanoGPT writes them, found none; is it another's?")
    drop = found.get("dropout", 0.0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), drop)
    return _settings(main, found, MODEL_ARGS, activation_function="gelu", **dropouts)


def _read_nanogpt(main: Path) -> Tensors:
    """The weights without the prefix of torch.compile; biases that were left out are zeros."""
    found = containers.read_torch(main, "model")
    model = found.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{main}: expected the weights under 'model', as nanoGPT writes them, found none")
    tensors = {name.removeprefix("_orig_mod."): array for name, array in _state(main, model).items()}
    args = found.get("model_args")
    if not isinstance(args, dict) or args.get("bias", True):
        return tensors
    config = _nanogpt_config(main)
    if config.n_layer > max(1000, len(tensors)):
        raise CheckpointError(f"{main}: has {len(tensors)} tensors, too few for {config.n_layer} layers")
    rows = {NANOGPT.spell(row): row for row in table(config)}
    zeros = {name: np.zeros(row.shape, np.float32) for name, row in rows.items() if row.kind in ("bias", "shift")}
    return {**zeros, **tensors}


def _write_nanogpt(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    args: dict[str, Any] = {name: getattr(config, ours) for name, ours in MODEL_ARGS.items()}
    args |= {"bias": True, "dropout": config.resid_pdrop}
    around = {"model_args": args, "iter_num": 0, "best_val_loss": 1e9, "config": {}}
    tied = {"lm_head.weight": tensors["transformer.wte.weight"]}
    containers.write_torch(folder / "ckpt.pt", {**tensors, **tied}, lambda state: {"model": state, **around})
    config.save_pretrained(folder)


BACKBONE = {
    "vocabulary_size": "vocab_size", "num_layers": "n_layer", "num_heads": "n_head", "hidden_dim": "n_embd",
    "intermediate_dim": "n_inner", "max_sequence_length": "n_positions",
}  # fmt: skip


OURS = "gpt2_config"  # where KerasHub's config.json keeps what its backbone has no setting for


def _keras_hub_config(main: Path) -> GPT2Config:
    path = main.with_name("config.json")
    found = read_json(path)
    if isinstance(ours := found.get(OURS), dict):
        with reading(path, "file of settings"):
            return GPT2Config.from_dict(ours)
    settings = found.get("config")
    if found.get("class_name") != "GPT2Backbone" or not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected KerasHub's GPT2Backbone, found {_plain(found.get('class_name'))}")
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.get("dropout", 0.1))
    return _settings(path, settings, BACKBONE, **dropouts)


def _read_keras(main: Path) -> Tensors:
    return containers.read_hdf5(main)


def _write_keras_hub(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    dtype = next(iter(tensors.values()))[0].name
    settings = {name: getattr(config, ours) for name, ours in BACKBONE.items()}
    settings["intermediate_dim"] = config.n_inner or 4 * config.n_embd
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    settings |= {"name": "gpt2_backbone", "trainable": True, "dtype": policy, "dropout": config.resid_pdrop}
    backbone = {"module": "keras_hub.src.models.gpt2.gpt2_backbone", "class_name": "GPT2Backbone", "config": settings}
    containers.write_hdf5(folder / "model.weights.h5", tensors, {})
    backbone |= {"registered_name": "keras_hub>GPT2Backbone", OURS: config.to_dict()}
    write_json(folder / "config.json", backbone)
    versions = {"keras_version": "3.15.1", "keras_hub_version": "0.32.0"}
    write_json(folder / "metadata.json", {**versions, "tasks": ["CausalLM"]})


def _write_keras_weights(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    model = snake_case(f"TF{(config.architectures or ['GPT2LMHeadModel'])[0]}")
    containers.write_hdf5(folder / "model.weights.h5", tensors, {"vars": {"name": model}})
    config.save_pretrained(folder)


_MAIN = {format: (files[0], files[-1]) for format, files in WEIGHTS.items()}  # one file, or the index of shards
_TANH = {**PLAIN, "activation_function": TANH_GELU}
_QUARTER = {**NO_ROOM, "n_inner": (None,)}
_DECODERS = ("lm", "base")
FORMATS: Mapping[str, Format] = {
    "safetensors": Format(
        "transformers' safetensors", TRANSFORMERS, _MAIN["safetensors"], WEIGHTS["safetensors"],
        sharded(_read_safetensors), _write_safetensors, beside,
    ),
    "torch-safetensors": Format(
        "a state dictionary of gpt2_multi.pt in safetensors", TORCH, _MAIN["safetensors"], WEIGHTS["safetensors"],
        sharded(_read_safetensors), _write_safetensors, _state_config,
    ),
    "tf-safetensors": Format(
        "transformers' safetensors of TensorFlow", TF, _MAIN["safetensors"], WEIGHTS["safetensors"],
        sharded(_read_safetensors), _write_tf_safetensors, beside, no_room={"tie_word_embeddings": (True,)},
    ),
    "pytorch": Format(
        "transformers' pytorch_model.bin", TRANSFORMERS, _MAIN["pytorch"], WEIGHTS["pytorch"],
        sharded(_read_pytorch), _write_pytorch, beside,
    ),
    "torch-pickle": Format(
        "a state dictionary of gpt2_multi.pt in pytorch_model.bin", TORCH, _MAIN["pytorch"], WEIGHTS["pytorch"],
        sharded(_read_pytorch), _write_pytorch, _state_config,
    ),
    "tf-h5": Format(
        "transformers' tf_model.h5", TF, _MAIN["tf-h5"], WEIGHTS["tf-h5"],
        sharded(_read_tf_h5), _write_tf_h5, beside, no_room={"tie_word_embeddings": (True,)},
    ),
    "flax-msgpack": Format(
        "transformers' flax_model.msgpack", FLAX_FILE, _MAIN["flax-msgpack"], WEIGHTS["flax-msgpack"],
        sharded(_read_flax), _write_flax, beside,
    ),
    "openai": Format(
        "OpenAI's TensorFlow 1 checkpoint", OPENAI, ("model.ckpt.index", "model.ckpt-[0-9]*.index"), WEIGHTS["openai"],
        _read_openai, _write_openai, _openai_config, _TANH, _QUARTER, _DECODERS,
    ),
    "nanogpt": Format(
        "nanoGPT's ckpt.pt", NANOGPT, WEIGHTS["nanogpt"], WEIGHTS["nanogpt"],
        _read_nanogpt, _write_nanogpt, _nanogpt_config, {**PLAIN, "activation_function": ("gelu",)},
        _QUARTER, _DECODERS,
    ),
    "keras-hub": Format(
        "KerasHub's preset", KERAS_HUB, WEIGHTS["keras-hub"][:1], WEIGHTS["keras-hub"],
        _read_keras, _write_keras_hub, _keras_hub_config, _TANH, NO_ROOM, _DECODERS,
    ),
    "keras-weights": Format(
        "Keras' .weights.h5 of gpt2_multi.tf", KERAS_WEIGHTS, ("*.weights.h5",), WEIGHTS["keras-hub"][:1],
        _read_keras, _write_keras_weights, beside,
    ),
}  # fmt: skip
