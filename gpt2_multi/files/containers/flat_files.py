"""Files of a header of 256 int32 and the numbers of all arrays behind it, without a gap, as C programs write them.

Format: https://github.com/karpathy/llm.c, `gpt2_write_to_checkpoint`; what the header means is for the caller to say.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.files.arrays import Array, Made, Shape, chunks, mapped, reading, tensor
from gpt2_multi.files.json_files import sync

HEADER = struct.Struct("<256i")
Layout = Callable[[Sequence[int]], tuple[np.dtype[Any], Mapping[str, Shape]]]


def read_header(path: Path) -> tuple[int, ...]:
    """The integers that a file begins with, fewer than a header where it is shorter."""
    with reading(path, "file of numbers behind a header"), path.open("rb") as file:
        start = file.read(HEADER.size)
        return struct.unpack(f"<{len(start) // 4}i", start[: len(start) // 4 * 4])


def read_flat(path: Path, layout: Layout) -> dict[str, Array]:
    """Every array of a file, mapped from it, of the type and the shapes that `layout` makes of its header.

    Raises CheckpointError where they are not what the file has, to the byte, or where `layout` raises ValueError.
    """
    with reading(path, "file of numbers behind a header"):
        data, found, place = mapped(path), dict[str, Array](), HEADER.size
        dtype, shapes = layout(HEADER.unpack(bytes(tensor(data, 0, np.dtype(np.uint8), (place,), "its header"))))
        size = place + dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
        if size != len(data):
            raise ValueError(f"it has {len(data)} bytes; by its header it has {size}")
        for name, shape in shapes.items():
            found[name] = tensor(data, place, dtype, shape, name)
            place += found[name].nbytes
        return found


def write_flat(path: Path, header: Sequence[int], tensors: Mapping[str, Made]) -> None:
    """Write a header, with zeros behind its integers, and arrays given as name -> (dtype, shape, maker) in order."""
    with path.open("wb") as file:
        file.write(HEADER.pack(*header, *[0] * (256 - len(header))))
        for name, (dtype, _, make) in tensors.items():
            for piece in chunks(make(), dtype, name):
                file.write(piece.reshape(-1).view(np.uint8).data)
        sync(file)
