"""TensorFlow's checkpoints (`tf.train.Saver`): tensors mapped from PREFIX.data-*, found by the table in PREFIX.index.

Formats: tensorflow/core/util/tensor_bundle (entries are the message BundleEntryProto); for the index LevelDB's
table_format.md. All checksums are looked at. Written as one shard.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from google_crc32c import extend

from gpt2_multi.files.arrays import LONGEST, MOST, Array, Made, Shape, chunks, mapped, reading, release, tensor

MAGIC = 0xDB4775248B80FB57
DTYPES = {  # numbers of tensorflow/core/framework/types.proto
    1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8"), 14: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype("<f2"),
}  # fmt: skip


class Entry(NamedTuple):
    """Where a tensor lies."""

    dtype: np.dtype[Any]
    shape: Shape
    shard: int
    offset: int
    size: int
    checksum: int


def read_bundle(prefix: Path) -> dict[str, Array]:
    """Every tensor of a checkpoint, mapped. Raises CheckpointError for a damaged one."""
    index = prefix.with_name(f"{prefix.name}.index")
    with reading(index, "index of a TensorFlow checkpoint"):
        entries = _ordered(_entries(bytes(mapped(index))))
        shards = entries.pop("").size
    return _tensors(prefix, shards, entries)


def _tensors(prefix: Path, shards: int, entries: Mapping[str, Any]) -> dict[str, Array]:
    found, files, left = {}, dict[int, Array](), dict[int, int]()
    for name, entry in entries.items():
        path = prefix.with_name(f"{prefix.name}.data-{entry.shard:05}-of-{shards:05}")
        with reading(path, "file of a TensorFlow checkpoint"):
            if entry.shard not in files:
                files[entry.shard] = mapped(path)
                left[entry.shard] = len(files[entry.shard])
            left[entry.shard] -= entry.size
            if left[entry.shard] < 0:
                raise ValueError("its tensors are larger than it is")
            array = tensor(files[entry.shard], entry.offset, entry.dtype, entry.shape, name)
            if array.nbytes != entry.size or masked(_checksum(array, name)) != entry.checksum:
                raise ValueError(f"the checksum of {name} is wrong")
            found[name] = array
    return found


def masked(checksum: int) -> int:
    """A checksum as TensorFlow stores it (LevelDB's mask)."""
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _checksum(array: Array, name: str) -> int:
    found = 0
    for piece in chunks(array, array.dtype, name):
        found = extend(found, bytes(piece.reshape(-1).view(np.uint8)))
    release(array)
    return found


def _ordered(entries: Iterator[tuple[str, Entry]]) -> dict[str, Entry]:
    """The entries of an index, whose names are in order."""
    found, last = dict[str, Entry](), None
    for name, entry in entries:
        if last is not None and name <= last:
            raise ValueError("its names are not in order")
        if len(found) > MOST:
            raise ValueError(f"it has more than {MOST} tensors; no GPT-2 has as many")
        found[name], last = entry, name
    return found


def _entries(data: bytes) -> Iterator[tuple[str, Entry]]:
    """The entries of an index. The header, under the empty name, has the number of files for a size."""
    if len(data) < 48 or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise ValueError("it does not end as such an index does")
    place, behind, handles = 0, 0, []
    for _ in range(4):
        number, place = _varint(data[-48:-8], place)
        handles.append(number)
    for _, handle in _block(data, handles[2], handles[3]):
        offset, place = _varint(handle, 0)
        size, _ = _varint(handle, place)
        if offset < behind:
            raise ValueError("its blocks overlap")
        behind = offset + size
        for key, value in _block(data, offset, size):
            yield key.decode(), _entry(value) if key else _header(value)


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block, each key without what it shares with the one before."""
    block, kind = data[offset : offset + size], data[offset + size : offset + size + 1]
    if len(block) < max(size, 4) or kind != b"\0":
        raise ValueError(f"its block at {offset} is compressed or cut off")
    (stored,) = struct.unpack("<I", data[offset + size + 1 : offset + size + 5])
    if masked(extend(0, block + kind)) != stored:
        raise ValueError(f"the checksum of its block at {offset} is wrong")
    (restarts,) = struct.unpack("<I", block[-4:])
    end, place, key = size - 4 - 4 * restarts, 0, b""
    while place < end:
        shared, place = _varint(block, place)
        rest, place = _varint(block, place)
        length, place = _varint(block, place)
        key = key[:shared] + block[place : place + rest]
        if len(key) > LONGEST:
            raise ValueError("a name in it is longer than a tensor's")
        yield key, block[place + rest : place + rest + length]
        place += rest + length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of protocol buffers, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        number, place = number | (byte & 127) << shift, place + 1
        if byte < 128:
            return number, place
    raise ValueError("a number in it has no end")


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a message of protocol buffers: number -> values."""
    place, found = 0, dict[int, list[Any]]()
    while place < len(message):
        key, place = _varint(message, place)
        value: Any
        if key & 7 == 0:
            value, place = _varint(message, place)
        elif key & 7 == 2:
            length, place = _varint(message, place)
            value, place = message[place : place + length], place + length
        elif key & 7 == 5:
            (value,), place = struct.unpack("<I", message[place : place + 4]), place + 4
        else:
            raise ValueError(f"a message in it has a field of the type {key & 7}")
        found.setdefault(key >> 3, []).append(value)
    return found


def _header(message: bytes) -> Entry:
    fields = {number: values[-1] for number, values in _fields(message).items()}
    if fields.get(2, 0):
        raise ValueError("it was saved by a machine with the other byte order")
    return Entry(np.dtype("V"), (), 0, 0, _whole(fields.get(1, 1)), 0)


def _entry(message: bytes) -> Entry:
    fields = {number: values[-1] for number, values in _fields(message).items()}
    if 7 in fields:
        raise ValueError("a tensor in it is in slices")
    dims = _fields(fields.get(2, b"")).get(2, [])
    shape = tuple(_whole(_fields(dim).get(1, [0])[-1]) for dim in dims)
    return Entry(DTYPES[fields[1]], shape, *(_whole(fields.get(number, 0)) for number in (3, 4, 5, 6)))


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError("a message in it has bytes where a number belongs")
    return value


def write_bundle(prefix: Path, tensors: Mapping[str, Made]) -> None:
    """Write tensors given as name -> (dtype, shape, function that makes the array), in one shard."""
    numbers = {dtype: number for number, dtype in DTYPES.items()}
    entries, offset = {b"": _message((1, 1), (3, _message((1, 1))))}, 0
    with prefix.with_name(f"{prefix.name}.data-00000-of-00001").open("wb") as file:
        for name in sorted(tensors):
            dtype, shape, make = tensors[name]
            checksum = 0
            for piece in chunks(make(), dtype, name):
                part = bytes(piece.reshape(-1).view(np.uint8))
                file.write(part)
                checksum = extend(checksum, part)
            size, dims = dtype.itemsize * math.prod(shape), [(2, _message((1, n))) for n in shape]
            place = ((4, offset),) if offset else ()
            entry = _message((1, numbers[dtype]), (2, _message(*dims)), *place, (5, size))
            entries[name.encode()] = entry + b"\x35" + struct.pack("<I", masked(checksum))
            offset += size
    prefix.with_name(f"{prefix.name}.index").write_bytes(_table(entries))


def _table(entries: Mapping[bytes, bytes]) -> bytes:
    """A LevelDB table: a block of entries, one without any, one that says where the first is, and the footer."""
    out, handles = bytearray(), []
    for content in (entries, {}):
        handles.append(_append(out, content))
    handles.append(_append(out, {max(entries): handles[0]}))
    footer = handles[1] + handles[2]
    return bytes(out + footer + b"\0" * (40 - len(footer)) + struct.pack("<Q", MAGIC))


def _append(out: bytearray, entries: Mapping[bytes, bytes]) -> bytes:
    """Append a block; return its handle, where it is and how long."""
    block, restarts = bytearray(), []
    for key, value in entries.items():
        restarts.append(len(block))
        block += b"\0" + _packed(len(key)) + _packed(len(value)) + key + value
    restarts = restarts or [0]
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = _packed(len(out)) + _packed(len(block))
    out += block + b"\0" + struct.pack("<I", masked(extend(0, bytes(block) + b"\0")))
    return handle


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of protocol buffers with whole numbers and messages."""
    parts = []
    for number, value in fields:
        whole = isinstance(value, int)
        parts.append(_packed(number << 3 | (0 if whole else 2)))
        parts.append(_packed(value) if isinstance(value, int) else _packed(len(value)) + value)
    return b"".join(parts)


def _packed(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
