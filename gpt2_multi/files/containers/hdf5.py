"""HDF5 as Keras writes it: every dataset mapped from the file, by its path; and written with h5py.

Format: The HDF Group, "HDF5 File Format Specification Version 3.0". Only what h5py writes by default is understood:
superblock 0, groups as symbol tables, datasets in one piece. Reading is ours because a few changed bytes make the HDF5
library hang, or allocate without bound. No link, filter or outside file is followed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpt2_multi.files.arrays import LONGEST, MOST, Array, Made, Shape, chunks, mapped, reading, tensor

SIGNATURE = b"\x89HDF\r\n\x1a\n"
DATASPACE, DATATYPE, EXTERNAL, LAYOUT, FILTERS, CONTINUED, GROUP = 1, 3, 7, 8, 11, 16, 17  # types of messages
OPAQUE = 0x15  # bytes without a meaning
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


def _float(size: int, exponent: int, mantissa: int) -> bytes:
    """The datatype message of a little-endian IEEE number."""
    sign, bias = 8 * size - 1, (1 << exponent - 1) - 1
    return struct.pack("<4BIHH4BI", 0x11, 0x20, sign, 0, size, 0, 8 * size, mantissa, exponent, 0, mantissa, bias)


def _integer(size: int, signed: int) -> bytes:
    return struct.pack("<4BIHH", 0x10, signed << 3, 0, 0, size, 0, 8 * size)


TYPES: Mapping[bytes, np.dtype[Any]] = {
    _float(2, 5, 10): np.dtype("<f2"),
    _float(2, 8, 7): BFLOAT16,
    _float(4, 8, 23): np.dtype("<f4"),
    _float(8, 11, 52): np.dtype("<f8"),
    _integer(1, 0): np.dtype("u1"),
    _integer(4, 1): np.dtype("<i4"),
    _integer(8, 1): np.dtype("<i8"),
}


def read_hdf5(path: Path) -> dict[str, Array]:
    """Every dataset of a file, mapped, by its path in the file. Raises CheckpointError for a damaged file."""
    with reading(path, "HDF5 file of Keras"):
        file = File(mapped(path))
        found: dict[str, Array] = {}
        for name, array in file.datasets():
            if name in found or len(found) == MOST:
                raise ValueError(f"{name} is there twice, or there are more tensors than in any GPT-2")
            found[name] = array
        return found


class Entry(NamedTuple):
    """A name in a group, and where its object lies."""

    name: str
    address: int


class File:
    """The bytes of a file, and the way through them. Any damage is a ValueError, LookupError or struct.error."""

    def __init__(self, data: Array) -> None:
        self.data, self.view, self.seen = data, data.data, set[int]()
        self.room = (1 << 22) + 2 * len(data)  # parts of a file that lie over each other would take for ever
        if self.bytes(0, 8) != SIGNATURE:
            raise ValueError("it does not begin as HDF5 does")
        version, sizes, base = self.data[8], self.bytes(13, 2), self.unpack("<Q", 24)[0]
        if version != 0 or sizes != b"\x08\x08" or base:
            raise ValueError(f"superblock {version} is newer than what Keras writes; h5repack --high=0 changes it")

    def bytes(self, start: int, length: int) -> bytes:
        """Bytes that have to be there."""
        if start < 0 or start + length > len(self.data):
            raise ValueError(f"bytes {start} to {start + length} lie beyond its end")
        self.room -= length + 16
        if self.room < 0:
            raise ValueError("its parts overlap")
        return bytes(self.view[start : start + length])

    def unpack(self, form: str, start: int) -> tuple[Any, ...]:
        """Numbers that have to be there."""
        return struct.unpack(form, self.bytes(start, struct.calcsize(form)))

    def enter(self, address: int) -> int:
        """An address that was not visited yet: groups are trees."""
        if address in self.seen:
            raise ValueError(f"the object at {address} is there twice")
        self.seen.add(address)
        return address

    def datasets(self) -> Iterator[tuple[str, Array]]:
        """Every dataset under the root group."""
        todo = [Entry("", self.unpack("<Q", 64)[0])]
        while todo:
            name, address = todo.pop()
            if len(name) > LONGEST:
                raise ValueError(f"a group in it is nested too deeply: {name[:40]}...")
            found = self.messages(self.enter(address))
            if GROUP in found:
                parent = f"{name}/" if name else ""
                todo += [Entry(parent + entry.name, entry.address) for entry in self.members(*found[GROUP])]
            else:
                yield name, self.dataset(name, found)

    def messages(self, address: int) -> dict[int, tuple[int, int]]:
        """Where the messages of an object header lie: type -> (start, length)."""
        version, count, length = self.unpack("<BxH4xI", address)
        if version != 1:
            raise ValueError(f"the object at {address} is of a newer layout than Keras writes")
        blocks, found = [(address + 16, length)], dict[int, tuple[int, int]]()
        while blocks:
            place, room = blocks.pop(0)
            end = self.enter(place) + room
            while place + 8 <= end and count:
                kind, size = self.unpack("<HH", place)
                self.bytes(place + 8, size)
                if kind == CONTINUED:
                    blocks.append(self.unpack("<QQ", place + 8))
                found.setdefault(kind, (place + 8, size))
                place, count = place + 8 + size, count - 1
        return found

    def members(self, start: int, length: int) -> Iterator[Entry]:
        """What a group holds."""
        tree, heap = self.unpack("<QQ", start)
        if self.bytes(heap, 4) != b"HEAP":
            raise ValueError(f"no heap of names at {heap}")
        size, _, names = self.unpack("<QQQ", heap + 8)
        todo = [tree]
        while todo:
            node = self.enter(todo.pop())
            signature = self.bytes(node, 4)
            if signature == b"TREE":
                _, _, used = self.unpack("<BBH", node + 4)
                todo += [self.unpack("<Q", node + 32 + 16 * i)[0] for i in range(used)]
            elif signature == b"SNOD":
                yield from self.symbols(node, names, size)
            else:
                raise ValueError(f"neither a tree nor a table of names at {node}")

    def symbols(self, node: int, names: int, size: int) -> Iterator[Entry]:
        """The entries of one symbol table."""
        for i in range(self.unpack("<H", node + 6)[0]):
            name, address, cache = self.unpack("<QQI", node + 8 + 40 * i)
            if cache == 2:
                raise ValueError("it holds a link, which is not followed")
            text = self.bytes(names + name, min(LONGEST, size - name)).split(b"\0", 1)[0].decode()
            if not text or "/" in text or len(text) == LONGEST:
                raise ValueError(f"it holds an object named {text!r}")
            yield Entry(text, address)

    def dataset(self, name: str, found: Mapping[int, tuple[int, int]]) -> Array:
        """A view of a dataset."""
        if EXTERNAL in found or FILTERS in found:
            raise ValueError(f"{name} is compressed or lies in another file; Keras writes neither")
        if not {LAYOUT, DATASPACE, DATATYPE} <= found.keys():
            raise ValueError(f"'{name}' is neither a group nor numbers as Keras writes them; a link is not followed")
        version, layout = self.unpack("<BB", found[LAYOUT][0])
        if (version, layout) != (3, 1):
            raise ValueError(f"{name} is not stored in one piece, as Keras stores it")
        address, _ = self.unpack("<QQ", found[LAYOUT][0] + 2)
        shape, dtype = self.shape(found[DATASPACE][0]), self.dtype(name, found[DATATYPE][0])
        return tensor(self.data, 0 if 0 in shape else address, dtype, shape, name)

    def shape(self, start: int) -> Shape:
        """The dimensions in a dataspace message."""
        version, rank = self.unpack("<BB", start)
        return self.unpack(f"<{rank}Q", start + (8 if version == 1 else 4))

    def dtype(self, name: str, start: int) -> np.dtype[Any]:
        """The dtype in a datatype message."""
        kind, size = self.unpack("<B3xI", start)
        if kind == OPAQUE and size == 2:
            return BFLOAT16  # see `write_hdf5`
        for length in (20, 12):
            if (found := TYPES.get(self.bytes(start, length))) is not None:
                return found
        raise ValueError(f"{name} is of a type that no weight has")


def write_hdf5(path: Path, tensors: Mapping[str, Made], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write tensors given as path -> (dtype, shape, function that makes the array), and attributes of groups."""
    import h5py

    with h5py.File(path, "w") as file:
        for group, given in attributes.items():
            (file.require_group(group) if group else file).attrs.update(given)
        for name, (dtype, shape, make) in tensors.items():
            stored = np.dtype("V2") if dtype == ml_dtypes.bfloat16 else dtype  # as NumPy, and so Keras, writes it
            place, start = file.create_dataset(name, shape, stored), 0
            if dtype != stored:
                place.attrs["dtype"] = dtype.name
            for piece in chunks(make().reshape(shape), dtype, name):
                place[start : start + len(piece)] = piece.view(stored)
                start += len(piece)
