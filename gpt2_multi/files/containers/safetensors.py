"""A model folder: config.json and model.safetensors (or shards), mapped when read, replaced whole when written.

Format: https://github.com/huggingface/safetensors, section "Format": 8 bytes of length, a JSON header, the tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_multi.errors import CheckpointError, shortened
from gpt2_multi.files.arrays import pieces
from gpt2_multi.files.folders import LARGEST, link, read_small
from gpt2_multi.model.weights import TRANSFORMERS, Format, Weight

Array = np.ndarray[Any, Any]
Made = tuple[np.dtype[Any], tuple[int, ...], Callable[[], Array]]  # a tensor to write: its dtype, shape, and maker
PathLike = str | os.PathLike[str]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
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
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch or save it again") from None
    header.pop("__metadata__", None)
    return {name: _view(path, name, entry, data) for name, entry in header.items()}


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where there is none."""
    try:
        value = json.loads(read_small(path).decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model folder holds it beside the weights") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch or save it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch or save it again")
    return value


def write_safetensors(path: PathLike, tensors: Mapping[str, Made], framework: str = "pt") -> None:
    """Write tensors given as name -> (dtype, shape, function that makes the array), one in memory at a time."""
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": framework}}  # what transformers asks for
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
            for piece in pieces(_fitting(name, make(), shape), dtype, name):
                file.write(piece.reshape(-1).view(np.uint8).data)
        _sync(file)


def _size(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _fitting(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape != tuple(shape):
        raise CheckpointError(
            f"{name} has shape {array.shape}, but the configuration makes it {tuple(shape)}; nothing was saved: change "
            "configuration and the model together (by resize_token_embeddings, for one, or in a new model)"
        )
    return array


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


Source = tuple[Weight, np.dtype[Any], Callable[[], Array]]


def write_weights(
    folder: Path, sources: Iterable[Source], head: str, form: Format = TRANSFORMERS, max_shard_size: int | str = "5GB"
) -> None:
    """Write rows of the table, each with its dtype and a function that makes its array in the table's layout."""
    rooted = head != "base"
    tensors = {
        form.spell(weight, rooted): (dtype, form.shape(weight), lambda w=weight, make=make: form.layout(w, make()))
        for weight, dtype, make in sources
    }
    write_shards(folder / SINGLE, tensors, write_safetensors, max_shard_size)


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


def parse_size(size: int | str) -> int:
    """Bytes in a size such as 200_000_000, "200MB" or "5GB" (powers of ten); CheckpointError for anything else."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    parts = re.fullmatch(r"(\d+)\s*([KMG]?B)?", str(size).upper())
    if not parts or not int(parts[1]):
        raise CheckpointError(f'max_shard_size: expected bytes or a size such as "5GB", found {size!r}')
    return int(parts[1]) * units[(parts[2] or "").removeprefix("B")]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON file, synced."""
    with path.open("wb") as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
        _sync(file)


@contextmanager
def replaced(folder: PathLike) -> Iterator[Path]:
    """A folder to write a model into; when the block ends without an error its files take their place in `folder`.

    Everything is written and synced before the first old file goes, and old weights that the new model lacks go last.
    What `folder` holds besides a model's files is not touched. While files change places, the old ones are kept in a
    hidden folder inside: an error puts them back, and after a crash they are there, whole. Raises CheckpointError where
    nothing can be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    except OSError as error:
        raise CheckpointError(f"{target}: expected a folder to save the model in, found none ({error})") from None
    try:
        yield stage
        _take_places(stage, target)
    except OSError as error:
        raise CheckpointError(f"{target}: the model could not be saved ({error}); what was there is whole") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _take_places(stage: Path, target: Path) -> None:
    new = [path.name for path in stage.iterdir()]
    old = [path.name for path in target.iterdir() if _is_model_file(path.name)]
    backup = Path(tempfile.mkdtemp(prefix=".replaced-", dir=target))
    for name in old:
        link(target / name, backup / name)
    try:
        for name in new:
            (stage / name).replace(target / name)
        for name in set(old) - set(new):
            (target / name).unlink(missing_ok=True)
    except OSError:
        for name in old:
            (backup / name).replace(target / name)
        raise
    finally:
        shutil.rmtree(backup, ignore_errors=True)


def _is_model_file(name: str) -> bool:
    return name in (SINGLE, INDEX, "config.json", "generation_config.json") or bool(SHARD.fullmatch(name))
