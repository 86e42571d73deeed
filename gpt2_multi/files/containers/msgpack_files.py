"""Files of flax.serialization.to_bytes: a tree of dicts in msgpack whose leaves are arrays, mapped when read.

Format: https://github.com/msgpack/msgpack/blob/master/spec.md; an array is the extension 1, a packed triple of shape,
dtype and bytes. The parser of the msgpack package copies what it reads; this one finds where the arrays lie. It knows
maps, strings, whole numbers, booleans and extensions: nothing else is in such a file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from gpt2_multi.files.arrays import LONGEST, MOST, Array, Made, chunks, mapped, reading, tensor

DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16", "int32", "int64", "uint8", "bool")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
NDARRAY = 1  # flax's number of the extension
CHUNKED = "__msgpack_chunked_array__"  # of an array beyond 1 GB
DEPTH = 32
_LENGTHS = {"map": {0xDE: ">H", 0xDF: ">I"}, "str": {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


def read_msgpack(path: Path) -> dict[str, Array]:
    """Every array of a file, mapped, by its path with slashes. Raises CheckpointError for a damaged file."""
    with reading(path, "msgpack file of Flax"):
        parser = Parser(mapped(path))
        parser.tree("", 0)
        if parser.place != len(parser.data):
            raise ValueError(f"it goes on after its end at {parser.place}")
        return parser.found


class Parser:
    """A place in the bytes of a file, and the arrays that were found before it."""

    def __init__(self, data: Array) -> None:
        self.data, self.view, self.place, self.found = data, data.data, 0, dict[str, Array]()
        self.room = MOST  # for maps and arrays

    def take(self, length: int) -> bytes:
        """The next bytes, which have to be there."""
        if self.place + length > len(self.view):
            raise ValueError(f"it ends within the value at {self.place}")
        self.place += length
        return bytes(self.view[self.place - length : self.place])

    def number(self, form: str) -> int:
        """The next number."""
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def length(self, first: int, fixed: int, mask: int, longer: Mapping[int, str]) -> int:
        """How long a value is, whose first byte was taken; ValueError where it is of another kind."""
        if first & ~mask == fixed:
            return first & mask
        if first not in longer:
            raise ValueError(f"the byte 0x{first:02x} at {self.place - 1} is not what Flax writes there")
        return self.number(longer[first])

    def text(self) -> str:
        """The next value, which is a string."""
        return self.take(self.length(self.number("B"), 0xA0, 0x1F, _LENGTHS["str"])).decode()

    def integer(self) -> int:
        """The next value, which is a whole number."""
        first = self.number("B")
        return first if first < 0x80 else self.number(_NUMBERS[first])

    def tree(self, path: str, depth: int) -> None:
        """The next value, which is a map."""
        if depth > DEPTH:
            raise ValueError(f"its maps are nested deeper than {DEPTH}")
        count = self.length(self.number("B"), 0x80, 0x0F, _LENGTHS["map"])
        for _ in range(count):
            key = self.text()
            name = f"{path}/{key}" if path else key
            if name in self.found or len(name) > LONGEST:
                raise ValueError(f"{name[:40]} is there twice, or longer than a name")
            if key == CHUNKED:
                self.found[path] = self.chunked(path, count)
                return
            self.value(name, depth)

    def value(self, name: str, depth: int) -> None:
        """The next value, which is a map or an array; a number, such as the step of a training, is passed over."""
        self.room -= 1
        if self.room < 0:
            raise ValueError(f"it has more than {MOST} values; no GPT-2 has as many")
        first = self.view[self.place]
        if first & 0xF0 == 0x80 or first in _LENGTHS["map"]:
            self.tree(name, depth + 1)
        elif first < 0x80 or first in _NUMBERS:
            self.integer()
        else:
            self.found[name] = self.array(name)

    def array(self, name: str) -> Array:
        """The next value, which is an array."""
        first = self.number("B")
        size = _FIXED_EXTENSIONS.get(first) or self.number(_EXTENSIONS[first])
        kind, end = self.number("b"), self.place + size
        if kind != NDARRAY or self.number("B") != 0x93:
            raise ValueError(f"{name} is not an array")
        shape = tuple(self.integer() for _ in range(self.length(self.number("B"), 0x90, 0x0F, {})))
        dtype = DTYPES[self.text()]
        count = self.number(_BYTES[self.number("B")])
        if count != dtype.itemsize * math.prod(shape) or self.place + count != end:
            raise ValueError(f"{name} has {count} bytes, which its shape {shape} in {dtype} does not have")
        self.place = end
        return tensor(self.data, end - count, dtype, shape, name)

    def chunked(self, name: str, count: int) -> Array:
        """An array in several; the key that says so was taken."""
        if self.take(1) != b"\xc3" or count != 3 or self.text() != "shape":
            raise ValueError(f"{name} is not an array in pieces")
        sizes = self.length(self.number("B"), 0x80, 0x0F, _LENGTHS["map"])
        shape = tuple((self.text(), self.integer())[1] for _ in range(sizes))
        if self.text() != "chunks":
            raise ValueError(f"{name} has no pieces")
        chunks = self.length(self.number("B"), 0x80, 0x0F, _LENGTHS["map"])
        parts = [self.chunk(name, number) for number in range(chunks)]
        if len({part.dtype for part in parts}) != 1:
            raise ValueError(f"the pieces of {name} are of different types")
        return np.concatenate(parts).reshape(shape)

    def chunk(self, name: str, number: int) -> Array:
        """The next piece of an array."""
        if self.text() != str(number):
            raise ValueError(f"the pieces of {name} are out of order")
        return self.array(f"{name}/{number}")


def write_msgpack(path: Path, tensors: Mapping[str, Made]) -> None:
    """Write tensors given as path with slashes -> (dtype, shape, function that makes the array)."""
    with path.open("wb") as file:
        _write_tree(file.write, {tuple(name.split("/")): made for name, made in tensors.items()}, "")


def _write_tree(write: Callable[[Any], object], tree: Mapping[tuple[str, ...], Made], path: str) -> None:
    firsts = dict.fromkeys(name[0] for name in tree)
    write(msgpack.Packer().pack_map_header(len(firsts)))
    for first in firsts:
        write(msgpack.packb(first))
        inner = {name[1:]: made for name, made in tree.items() if name[0] == first}
        if () in inner:
            _write_array(write, inner[()], f"{path}{first}")
        else:
            _write_tree(write, inner, f"{path}{first}/")


def _write_array(write: Callable[[Any], object], made: Made, name: str) -> None:
    dtype, shape, make = made
    count = dtype.itemsize * math.prod(shape)
    start = b"\x93" + msgpack.packb(shape) + msgpack.packb(dtype.name) + b"\xc6" + struct.pack(">I", count)
    write(b"\xc9" + struct.pack(">Ib", len(start) + count, NDARRAY) + start)
    for piece in chunks(make(), dtype, name):
        write(piece.reshape(-1).view(np.uint8).data)
