"""Large arrays on their way to a file: in pieces, so that memory does not grow with them, and cast exactly once."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_multi.errors import CheckpointError

Array = np.ndarray[Any, Any]
PIECE = 1 << 24  # bytes


def pieces(array: Array, dtype: np.dtype[Any], name: str) -> Iterator[Array]:
    """The rows of an array in this dtype, in C order, a few megabytes at a time; `name` is for an error of `cast`."""
    array = np.atleast_1d(array)
    rows = max(1, PIECE // max(1, array.itemsize * math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        yield cast(np.ascontiguousarray(array[start : start + rows]), dtype, name)


def cast(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """The array in another dtype, rounded once, to the nearest, ties to even.

    Raises CheckpointError where a finite number becomes infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        wide = _odd(array) if array.dtype == np.float64 and dtype == ml_dtypes.bfloat16 else array
        found = wide.astype(dtype)
    lost = np.isinf(found) & np.isfinite(array)
    if lost.any():
        greatest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        raise CheckpointError(
            f"{name}: {array[lost].ravel()[0]:g} is beyond {dtype.name}, whose greatest number is {greatest:g}; "
            "keep the dtype, or choose one with a wider range"
        )
    return found


def same(array: Array, other: Array, name: str) -> bool:
    """Whether an array, cast to the dtype of another, has its shape and its bits; neither is copied as a whole."""
    if array.shape != other.shape:
        return False
    start, rows = 0, np.atleast_1d(other)
    for piece in pieces(array, other.dtype, name):
        if piece.tobytes() != rows[start : start + len(piece)].tobytes():
            return False
        start += len(piece)
    return True


def _odd(array: Array) -> Array:
    """float64 as float32, rounded to odd: what is rounded again is as if it had been rounded once.

    Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
    """
    near = array.astype(np.float32)
    inexact = (near != array) & np.isfinite(near)
    toward = np.where(np.abs(near) > np.abs(array), np.nextafter(near, np.float32(0)), near)  # truncated
    return np.where(inexact, (toward.view(np.uint32) | 1).view(np.float32), near)


def mapping(array: Array) -> Any:
    """The mapped file that an array lies in, or whatever else holds its memory."""
    base: Any = array
    while (inner := getattr(base, "base", None)) is not None:
        base = inner
    return base


def release(array: Array) -> None:
    """Give the memory of a mapped file back to the system; what is used again is read again.

    Only for arrays that nobody has written to.
    """
    base = mapping(array)
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
