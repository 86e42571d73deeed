"""Large arrays on their way to a file: in pieces, so that memory does not grow with them, and cast exactly once."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_multi.errors import CheckpointError, ConfigError, remedy, shortened

Array = np.ndarray[Any, Any]
CHUNK = 1 << 24  # bytes


def chunks(array: Array, dtype: np.dtype[Any], name: str) -> Iterator[Array]:
    """The rows of an array in this dtype, in C order, a few megabytes at a time; `name` is for an error of `cast`."""
    array = np.atleast_1d(array)
    rows = max(1, CHUNK // max(1, array.itemsize * math.prod(array.shape[1:])))
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
    """Whether an array, cast to the dtype of another, has its shape and its bits.

    Neither is copied as a whole, nor kept in memory where it is mapped: only for arrays that nobody has written to.
    """
    if array.shape != other.shape:
        return False
    start, rows, bits = 0, np.atleast_1d(other), np.dtype(f"u{other.itemsize}")
    for piece in chunks(array, other.dtype, name):
        beside = np.ascontiguousarray(rows[start : start + len(piece)])
        if not np.array_equal(piece.view(bits), beside.view(bits)):
            return False
        start += len(piece)
        release(array)
        release(other)
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


Shape = tuple[int, ...]


MOST = 1 << 13  # tensors in a checkpoint, more than any GPT-2 has: what a file may make of its bytes stays bounded


LONGEST = 256  # characters of a name


# What a parser of this package can run into in bytes that are not what it expects.
_DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError, struct.error)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a parser stumbles over into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except ConfigError as error:
        raise ConfigError(f"{path}: {shortened(str(error), 600)}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path, or fetch the model again") from None
    except (*_DAMAGE, OSError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: not a whole {what} ({why}); {remedy(path)}") from None


def mapped(path: Path) -> Array:
    """The bytes of a file; the pages are private, so that writing to them does not change the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found something else or nothing; fetch the model again")
    if not path.stat().st_size:
        raise CheckpointError(f"{path}: the file is empty; fetch or save it again")
    return np.asarray(np.memmap(path, np.uint8, mode="c"))  # whose views are made faster


def tensor(data: Array, offset: int, dtype: np.dtype[Any], shape: Shape, name: str) -> Array:
    """A view of the tensor that lies at an offset of a file's bytes; ValueError where it does not lie in them."""
    if len(shape) > 8:
        raise ValueError(f"{name} has {len(shape)} dimensions, which no weight has")
    size = dtype.itemsize * math.prod(shape)
    if offset < 0 or min(shape, default=0) < 0 or offset + size > len(data):
        raise ValueError(f"{name} would lie at bytes {offset} to {offset + size} of {len(data)}")
    return np.asarray(data[offset : offset + size]).view(dtype).reshape(shape)


Made = tuple[np.dtype[Any], tuple[int, ...], Callable[[], Array]]  # a tensor to write: its dtype, shape, and maker
NOTHING: Mapping[str, str] = MappingProxyType({})
