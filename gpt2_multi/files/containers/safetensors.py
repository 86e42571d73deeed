"""A model folder: config.json and model.safetensors (or shards), mapped when read, replaced whole when written.

Format: https://github.com/huggingface/safetensors, section "Format": 8 bytes of length, a JSON header, the tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_multi.errors import CheckpointError, remedy, shortened
from gpt2_multi.files.arrays import NOTHING, Made, chunks
from gpt2_multi.files.folders import PathLike
from gpt2_multi.files.json_files import LARGEST, read_json, sync, write_json

Array = np.ndarray[Any, Any]

METADATA = "__metadata__"
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(path: PathLike) -> dict[str, Array]:
    """Every tensor of one file, as arrays mapped from it: nothing is read until it is used.

    The pages are private: writing to an array does not change the file. Raises CheckpointError for a file that is
    missing, truncated or not safetensors.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found something else; fetch the model again")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > LARGEST:
                raise ValueError(f"its header has {size} bytes")
            with safe_open(path, framework="numpy"):  # its parser checks every length and offset against the file
                pass
            header = json.loads(file.read(size))
        data = (
            np.memmap(path, np.uint8, mode="c", offset=8 + size)
            if path.stat().st_size > 8 + size
            else np.empty(0, np.uint8)
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path, or fetch the model again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {remedy(path)}") from None
    header.pop(METADATA, None)
    return {name: _view(path, name, entry, data) for name, entry in header.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What one whole file, or the files of an index together, say beside their tensors."""
    places = [path]
    if path.suffix == ".json":
        places = [_beside(path, name) for name in sorted(set(read_json(path)["weight_map"].values()))]
    found: dict[str, str] = {}
    for place in places:
        with place.open("rb") as file:
            found |= json.loads(file.read(int.from_bytes(file.read(8), "little"))).get(METADATA, {})
    return found


def _view(path: Path, name: str, entry: Mapping[str, Any], data: Array) -> Array:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name} is stored as {entry['dtype']}; expected one of {', '.join(DTYPES)}")
    start, end = entry["data_offsets"]
    try:
        return np.asarray(data[start:end]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, OverflowError):  # with a 0 in it a shape can be larger than any memory
        raise CheckpointError(
            f"{path}: {shortened(name)} has a shape that no array has; fetch or save it again"
        ) from None


def read_shards(index: Path, read: Callable[[Path], Mapping[str, Array]]) -> dict[str, Array]:
    """Every tensor of the files that an index names, which have to lie beside it, each file read by `read`."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' from tensor to file; save the model again")
    shards = {name: read(_beside(index, name)) for name in sorted(set(places.values()))}
    tensors: dict[str, Array] = {}
    for name, place in places.items():
        if name not in shards[place]:
            raise CheckpointError(
                f"{index.with_name(place)}: lacks {shortened(name)}, which {index.name} puts there; fetch it again"
            )
        tensors[name] = shards[place][name]
    return tensors


def _beside(index: Path, name: str) -> Path:
    if Path(name).name != name or name in ("", "..") or len(name) > 255:
        raise CheckpointError(
            f"{index}: names the file '{shortened(name)}', which is not beside it; the index is not safe"
        )
    return index.with_name(name)


def write_safetensors(
    path: PathLike, tensors: Mapping[str, Made], framework: str = "pt", metadata: Mapping[str, str] = NOTHING
) -> None:
    """Write tensors given as name -> (dtype, shape, function that makes the array), one in memory at a time.

    `metadata` is what the file says besides.
    """
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {METADATA: {"format": framework, **metadata}}  # the format is what transformers asks for
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        end = offset + _size(dtype, shape)
        header[name] = {"dtype": spelled[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape, make) in tensors.items():
            for piece in chunks(fitting(name, make(), shape), dtype, name):
                file.write(piece.reshape(-1).view(np.uint8).data)
        sync(file)


def _size(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def fitting(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """An array that has to have this shape."""
    if array.shape != tuple(shape):
        raise CheckpointError(
            f"{name} has shape {array.shape}, but the configuration makes it {tuple(shape)}; nothing was saved: change "
            "configuration and the model together (by resize_token_embeddings, for one, or in a new model), and give "
            "models that share a configuration one each (config.replace())"
        )
    return array


def write_shards(
    single: Path,
    tensors: Mapping[str, Made],
    write: Callable[[Path, Mapping[str, Made]], None],
    max_shard_size: int | str,
) -> None:
    """Write one file, or shards such as model-00001-of-00002.safetensors and their index, each by `write`."""
    sizes = {name: _size(dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    shards = _shards(sizes, parse_size(max_shard_size))
    if len(shards) == 1:
        return write(single, tensors)
    names = [f"{single.stem}-{i:05}-of-{len(shards):05}{single.suffix}" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write(single.with_name(file), {name: tensors[name] for name in shard})
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    write_json(single.with_name(f"{single.name}.index.json"), index)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def parse_size(size: int | str, name: str = "max_shard_size") -> int:
    """Bytes in a size such as 200_000_000, "200MB" or "5GB" (powers of ten), or "5GiB" (of two).

    Raises CheckpointError, which calls it by its `name`, for anything else.
    """
    parts = re.fullmatch(r"(\d+)\s*(?:([KMG])(I?)B|B)?", str(size).upper())
    if not parts or not int(parts[1]):
        raise CheckpointError(f'{name}: expected bytes or a size such as "5GB", found {size!r}')
    unit: int = (1024 if parts[3] else 1000) ** " KMG".index(parts[2] or " ")
    return int(parts[1]) * unit
