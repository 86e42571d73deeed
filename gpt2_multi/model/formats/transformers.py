"""The formats of transformers, and the state dictionaries of our own classes in the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Made
from gpt2_multi.files.hub import WEIGHTS
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import Format, Tensors, beside, sharded, snake_case, state
from gpt2_multi.model.spelling import FLAX_FILE, TF, TORCH, TRANSFORMERS


def _state_config(main: Path) -> GPT2Config:
    """The configuration beside a state dictionary; who saves one alone, as transformers' Trainer, writes none."""
    if not main.with_name("config.json").exists():
        raise CheckpointError(
            f"{main.parent}: has a state dictionary of gpt2_multi.pt, as transformers' Trainer saves it, but no "
            "config.json; give config=model.config, or put it there by model.config.save_pretrained(folder)"
        )
    return beside(main)


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
    return state(path, containers.read_torch(path))


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


def _read_flax(main: Path) -> Tensors:
    return containers.read_msgpack(main)


def _write_flax(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    containers.write_msgpack(folder / "flax_model.msgpack", tensors)
    config.save_pretrained(folder)


_MAIN = {format: (files[0], files[-1]) for format, files in WEIGHTS.items()}  # one file, or the index of shards


SAFETENSORS = Format(
    "transformers' safetensors", TRANSFORMERS, _MAIN["safetensors"], WEIGHTS["safetensors"],
    sharded(_read_safetensors), _write_safetensors, beside,
)  # fmt: skip
TORCH_SAFETENSORS = Format(
    "a state dictionary of gpt2_multi.pt in safetensors", TORCH, _MAIN["safetensors"], WEIGHTS["safetensors"],
    sharded(_read_safetensors), _write_safetensors, _state_config,
)  # fmt: skip
TF_SAFETENSORS = Format(
    "transformers' safetensors of TensorFlow", TF, _MAIN["safetensors"], WEIGHTS["safetensors"],
    sharded(_read_safetensors), _write_tf_safetensors, beside, no_room={"tie_word_embeddings": (True,)},
)  # fmt: skip
PYTORCH = Format(
    "transformers' pytorch_model.bin", TRANSFORMERS, _MAIN["pytorch"], WEIGHTS["pytorch"],
    sharded(_read_pytorch), _write_pytorch, beside,
)  # fmt: skip
TORCH_PICKLE = Format(
    "a state dictionary of gpt2_multi.pt in pytorch_model.bin", TORCH, _MAIN["pytorch"], WEIGHTS["pytorch"],
    sharded(_read_pytorch), _write_pytorch, _state_config,
)  # fmt: skip
TF_H5 = Format(
    "transformers' tf_model.h5", TF, _MAIN["tf-h5"], WEIGHTS["tf-h5"],
    sharded(_read_tf_h5), _write_tf_h5, beside, no_room={"tie_word_embeddings": (True,)},
)  # fmt: skip
FLAX_MSGPACK = Format(
    "transformers' flax_model.msgpack", FLAX_FILE, _MAIN["flax-msgpack"], WEIGHTS["flax-msgpack"],
    sharded(_read_flax), _write_flax, beside,
)  # fmt: skip
