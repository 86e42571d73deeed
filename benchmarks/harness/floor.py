"""The floor of a token: the time in which memory gives the bytes that it needs, at what a copy reaches here and now."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.harness.rows import elapsed
from benchmarks.peers.calls import threads
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table

FLOOR = "floor"
ROOMS = (1 << 17, 1 << 18, 1 << 20)  # numbers, so that a cache holds the copy, and Python's part in it is small
UNREAD = ("wpe",)  # of which a token takes a row


def bandwidth(megabytes: int = 512, count: int = 12) -> float:
    """Bytes a second that all cores together copy from memory into their caches, at their best."""
    source = np.ones(megabytes * 2**18, np.float32)
    parts = np.array_split(source, threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        seconds = min(
            elapsed(lambda room=room: list(pool.map(_read, parts, [room] * len(parts))))
            for room in ROOMS
            for _ in range(count)
        )
    return source.nbytes / seconds


def _read(part: np.ndarray[Any, Any], numbers: int) -> None:
    room = np.empty(min(numbers, len(part)), part.dtype)
    for at in range(0, len(part) - len(room) + 1, len(room)):
        np.copyto(room, part[at : at + len(room)])


def weights(config: GPT2Config, size: int = 4) -> int:
    """The bytes of the parameters that every token reads, at `size` bytes each; the head is the embedding."""
    shapes = [weight.shape for weight in table(config, "lm") if not any(part in weight.path for part in UNREAD)]
    return size * sum(int(np.prod(shape)) for shape in shapes)


def cache(config: GPT2Config, length: int, size: int = 4) -> int:
    """The bytes of the keys and values of so many tokens."""
    return 2 * config.n_layer * config.n_embd * length * size
