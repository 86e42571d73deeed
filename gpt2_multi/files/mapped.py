"""Files mapped into memory, and the tensors in them: nothing is read before it is used, or lies outside its file."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError, ConfigError, shortened

Array = np.ndarray[Any, Any]
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
        raise CheckpointError(f"{path}: not a whole {what} ({why}); fetch or save it again") from None


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
