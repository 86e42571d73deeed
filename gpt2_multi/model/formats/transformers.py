"""The formats of transformers, and the state dictionaries of our own classes in the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gpt2_multi.files import containers
from gpt2_multi.files.arrays import NOTHING, Made
from gpt2_multi.files.hub import WEIGHTS
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import (
    TORCH_FILES,
    Format,
    Tensors,
    beside,
    has_settings,
    is_foreign,
    is_state,
    sharded,
    snake_case,
    state,
)
from gpt2_multi.model.spelling import FLAX_FILE, TF, TORCH, TRANSFORMERS, out_first


def _read_safetensors(main: Path) -> Tensors:
    return containers.read_safetensors(main)


def write_safetensors(
    folder: Path, tensors: dict[str, Made], config: GPT2Config, size: int | str, metadata: Mapping[str, str] = NOTHING
) -> None:
    """Write a folder of safetensors, each of which says `metadata`."""
    write = partial(containers.write_safetensors, metadata=metadata)
    containers.write_shards(folder / "model.safetensors", tensors, write, size)
    config.save_pretrained(folder)


def _write_tf_safetensors(folder: Path, tensors: dict[str, Made], config: GPT2Config, size: int | str) -> None:
    containers.write_shards(
        folder / "model.safetensors", tensors, lambda path, part: containers.write_safetensors(path, part, "tf"), size
    )
    config.save_pretrained(folder)


def _read_pytorch(path: Path) -> Tensors:
    return state(path, containers.read_torch(path, is_state))


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


def _with_kernels(read: Callable[[Path], Tensors], is_out_first: bool) -> Callable[[Path], bool]:
    """Whether a file has the names of PyTorch, and kernels of (out, in) or of (in, out)."""

    def is_it(main: Path) -> bool:
        shapes = {name: array.shape for name, array in read(main).items()}
        others = is_foreign(shapes) or _are_of_tensorflow(shapes)
        return not others and bool(out_first(shapes)) == is_out_first

    return is_it


def _are_of_tensorflow(names: Iterable[str]) -> bool:
    """Whether names are paths of TensorFlow; in PyTorch's a slash may stand before the last dot."""
    return any("/" in name.rpartition(".")[2] for name in names)


def _unless_set(is_it: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """That it is not nanoGPT's, whose settings lie in the file, and are not GPT-2's."""
    return lambda main: is_it(main) and (main.suffix == ".json" or not has_settings(containers.read_outline(main)))


_safetensors, _pytorch = sharded(_read_safetensors), sharded(_read_pytorch)
_MAIN = {format: (files[0], files[-1]) for format, files in WEIGHTS.items()}  # one file, or the index of shards


SAFETENSORS = Format(
    "transformers' safetensors", TRANSFORMERS, _MAIN["safetensors"], WEIGHTS["safetensors"],
    _safetensors, write_safetensors, beside,
    others=("*.safetensors",), is_it=_with_kernels(_safetensors, False),
)  # fmt: skip
TORCH_SAFETENSORS = Format(
    "a state dictionary of gpt2_multi.pt in safetensors", TORCH, _MAIN["safetensors"], WEIGHTS["safetensors"],
    _safetensors, write_safetensors, beside,
    others=("*.safetensors",), is_it=_with_kernels(_safetensors, True),
)  # fmt: skip
TF_SAFETENSORS = Format(
    "transformers' safetensors of TensorFlow", TF, _MAIN["safetensors"], WEIGHTS["safetensors"],
    _safetensors, _write_tf_safetensors, beside, no_room={"tie_word_embeddings": (True,)},
    others=("*.safetensors",), is_it=lambda main: _are_of_tensorflow(_safetensors(main)),
)  # fmt: skip
PYTORCH = Format(
    "transformers' pytorch_model.bin", TRANSFORMERS, _MAIN["pytorch"], WEIGHTS["pytorch"],
    _pytorch, _write_pytorch, beside,
    others=TORCH_FILES, is_it=_unless_set(_with_kernels(_pytorch, False)),
)  # fmt: skip
TORCH_PICKLE = Format(
    "a state dictionary of gpt2_multi.pt in pytorch_model.bin", TORCH, _MAIN["pytorch"], WEIGHTS["pytorch"],
    _pytorch, _write_pytorch, beside,
    others=TORCH_FILES, is_it=_unless_set(_with_kernels(_pytorch, True)),
)  # fmt: skip
TF_H5 = Format(
    "transformers' tf_model.h5", TF, _MAIN["tf-h5"], WEIGHTS["tf-h5"],
    sharded(_read_tf_h5), _write_tf_h5, beside, no_room={"tie_word_embeddings": (True,)},
    others=("*.h5",),
)  # fmt: skip
FLAX_MSGPACK = Format(
    "transformers' flax_model.msgpack", FLAX_FILE, _MAIN["flax-msgpack"], WEIGHTS["flax-msgpack"],
    sharded(_read_flax), _write_flax, beside,
    others=("*.msgpack",),
)  # fmt: skip
