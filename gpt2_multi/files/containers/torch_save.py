"""Files of torch.save: read as maps, without torch, in the zip layout and in the one before torch 1.6; and written.

A file is a pickle that names tensors, and their storages: as members of a zip archive that are not compressed, or one
after the other behind the pickle.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.files.arrays import MOST, Array, Made, chunks, mapped, mapping, reading, tensor
from gpt2_multi.files.containers import archive
from gpt2_multi.files.containers.pickles import STORAGES, Inert, Machine, Storage, Stored

OLD_MAGIC = 0x1950A86A20F9469CFC6C
ALIGNMENT = 64  # bytes, as torch aligns storages
_BYTE = np.dtype(np.uint8)

Storages = Callable[[Storage], Array]


def read_torch(path: Path, is_inner: Callable[[Collection[Any]], bool] = lambda names: False) -> dict[str, Any]:
    """The dict that torch.load would give, with mapped arrays for its tensors; what code would have made is `Inert`.

    So are the dicts in it, however deep, of which `is_inner` says so by the names of their tensors. Raises
    CheckpointError for a damaged file.
    """
    with reading(path, "file of torch.save"):
        return _shown(*_read(path), is_inner)


def read_outline(path: Path) -> dict[str, Any]:
    """The same with a `Stored`, which has a shape, for each tensor: no storage is looked at."""
    with reading(path, "file of torch.save"):
        return _checked(_read(path)[0])


def _read(path: Path) -> tuple[Any, Storages]:
    data = mapped(path)
    return _read_zip(data) if bytes(data[:4]) == archive.START else _read_old(data)


def _checked(value: Any) -> dict[Any, Any]:
    if isinstance(value, Inert):
        raise ValueError(f"it holds what {value} would make, which is not run; save the model's state_dict() instead")
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a dict of tensors")
    return value


def _shown(value: Any, storages: Storages, is_inner: Callable[[Collection[Any]], bool]) -> dict[str, Any]:
    """A dict with arrays for its tensors, and for those of the dicts in it that are wanted; each is looked at once."""
    top = _checked(value)
    dicts, count = {id(top): top}, 0
    for found in (queue := [top]):
        names = [key for key, part in found.items() if isinstance(part, Stored)]
        if found is top or is_inner(names):
            count += len(names)
            if max(count, len(found)) > MOST:
                raise ValueError(f"it has {max(count, len(found))} tensors; no GPT-2 has as many")
            found.update({key: _view(found[key], storages) for key in names})
        inner = {id(part): part for part in found.values() if isinstance(part, dict)}
        queue += [part for key, part in inner.items() if key not in dicts]
        dicts.update(inner)
    return top


def _read_zip(data: Array) -> tuple[Any, Storages]:
    members = archive.members(data)
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} pickles, not one")
    order = members.get(f"{roots[0]}byteorder")
    if order is not None and bytes(archive.member(data, order)) != b"little":
        raise ValueError("it was saved by a machine with the other byte order")
    pickled = io.BytesIO(bytes(archive.member(data, members[f"{roots[0]}data.pkl"])))
    value = Machine(len(data)).run(pickled)
    checked: dict[str, Array] = {}

    def storage(wanted: Storage) -> Array:
        if wanted.key not in checked:
            checked[wanted.key] = archive.member(data, members[f"{roots[0]}data/{wanted.key}"])
        return tensor(checked[wanted.key], 0, wanted.dtype, (wanted.length,), f"storage {wanted.key}")

    return value, storage


def _read_old(data: Array) -> tuple[Any, Storages]:
    file = mapping(data)  # which reads as a file does, and no more than there is
    if Machine(len(data)).run(file) != OLD_MAGIC:
        raise ValueError("it is neither an archive nor of the layout before torch 1.6")
    _protocol, system = Machine(len(data)).run(file), Machine(len(data)).run(file)
    if system.get("little_endian") is not True:
        raise ValueError("it was saved by a machine with the other byte order")
    machine = Machine(len(data))
    value, keys, lengths = machine.run(file), Machine(len(data)).run(file), machine.storages
    start, places = file.tell(), dict[str, int]()
    for key in keys:
        (count,) = struct.unpack("<q", bytes(tensor(data, start, _BYTE, (8,), f"storage {key}")))
        if count != lengths[key].length:
            raise ValueError(f"storage {key} has {count} numbers, not {lengths[key].length}")
        places[key], start = start + 8, start + 8 + count * lengths[key].dtype.itemsize
    return value, lambda s: tensor(data, places[s.key], s.dtype, (s.length,), f"storage {s.key}")


def _view(stored: Stored, storages: Storages) -> Array:
    flat = storages(stored.storage)
    last = stored.offset + sum((n - 1) * step for n, step in zip(stored.shape, stored.strides, strict=True))
    empty = 0 in stored.shape
    if min((stored.offset, *stored.shape, *stored.strides)) < 0 or (last >= len(flat) and not empty):
        raise ValueError(f"a tensor of storage {stored.storage.key} lies beyond its end")
    if math.prod(stored.shape) > len(flat):
        raise ValueError(f"a tensor of storage {stored.storage.key} repeats its numbers")
    if empty:
        return np.empty(stored.shape, flat.dtype)
    strides = [step * flat.itemsize for step in stored.strides]
    return np.ndarray(stored.shape, flat.dtype, flat.view(_BYTE), stored.offset * flat.itemsize, strides)


def write_torch(path: Path, tensors: Mapping[str, Made], around: Callable[[Any], Any] = lambda state: state) -> None:
    """Write a state dict given as name -> (dtype, shape, function that makes the array), as torch.save does.

    Entries with the same function share their storage. `around` puts the state dict, which stands for itself, into
    a larger value of dicts, strings, numbers and an `Inert`.
    """
    keys = {make: str(number) for number, make in enumerate(dict.fromkeys(make for _, _, make in tensors.values()))}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, f"{ROOT}/data.pkl", [_pickled(around(_State()), tensors, keys)])
        _write_member(archive, f"{ROOT}/byteorder", [b"little"])
        for name, (dtype, _, make) in tensors.items():
            if make in keys:
                parts = chunks(make(), dtype, name)
                _write_member(
                    archive, f"{ROOT}/data/{keys.pop(make)}", (part.reshape(-1).view(np.uint8) for part in parts)
                )
        _write_member(archive, f"{ROOT}/version", [b"3\n"])


ROOT = "archive"


def _write_member(archive: zipfile.ZipFile, name: str, parts: Iterable[Any]) -> None:
    entry = zipfile.ZipInfo(name)
    assert archive.fp is not None
    header = archive.fp.tell() + 30 + len(name) + 20 + 4  # with the sizes that a large member has
    padding = -header % ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as file:
        for part in parts:
            file.write(memoryview(part))


class _State:
    """Where the state dict stands in what `around` makes."""


def _pickled(value: Any, tensors: Mapping[str, Made], keys: Mapping[Any, str]) -> bytes:
    """A pickle of protocol 2 with the calls and the persistent ids that torch.load understands."""
    out = io.BytesIO()
    out.write(pickle.PROTO + b"\x02")
    _write_value(out, value, tensors, keys)
    out.write(pickle.STOP)
    return out.getvalue()


def _write_value(out: io.BytesIO, value: Any, tensors: Mapping[str, Made], keys: Mapping[Any, str]) -> None:
    if isinstance(value, _State):
        _write_state(out, tensors, keys)
    elif isinstance(value, dict):
        out.write(pickle.EMPTY_DICT + pickle.MARK)
        for key, part in value.items():
            out.write(_plain(key))
            _write_value(out, part, tensors, keys)
        out.write(pickle.SETITEMS)
    elif isinstance(value, Inert):
        out.write(pickle.GLOBAL + "{}\n{}\n".format(*value.text.split()).encode() + pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        _write_value(out, value.attributes, tensors, keys)
        out.write(pickle.BUILD)
    else:
        out.write(_plain(value))


def _plain(value: Any) -> bytes:
    """A string, a number, a tuple or None, without the opcodes around a pickle and without a memo."""
    return b"".join(
        part for opcode, part in _opcodes(pickle.dumps(value, 2)) if opcode not in ("PROTO", "STOP", "BINPUT")
    )


def _opcodes(data: bytes) -> Iterator[tuple[str, bytes]]:
    found = [(opcode.name, start) for opcode, _, start in pickletools.genops(data)]
    for (name, start), (_, end) in zip(found, [*found[1:], ("", len(data))], strict=True):
        yield name, data[start:end]


def _write_state(out: io.BytesIO, tensors: Mapping[str, Made], keys: Mapping[Any, str]) -> None:
    spelled = {dtype: name for name, dtype in STORAGES.items()}
    empty = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    out.write(empty + pickle.MARK)
    for name, (dtype, shape, make) in tensors.items():
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        out.write(_plain(name) + pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + pickle.MARK)
        out.write(_plain("storage") + pickle.GLOBAL + f"torch\n{spelled[dtype]}\n".encode())
        out.write(_plain(keys[make]) + _plain("cpu") + _plain(math.prod(shape)) + pickle.TUPLE + pickle.BINPERSID)
        out.write(_plain(0) + _plain(shape) + _plain(strides) + pickle.NEWFALSE + empty + pickle.TUPLE + pickle.REDUCE)
    out.write(pickle.SETITEMS)
