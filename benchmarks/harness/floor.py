"""The floor of a token: the time in which memory gives the bytes that it needs, at what a copy reaches here and now."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table

FLOOR = "floor: memory read once"
ROOM = 1 << 18  # numbers, so that a cache holds the copy
UNREAD = ("wpe",)  # of which a token takes a row


def bandwidth(megabytes: int = 512, count: int = 5) -> float:
    """Bytes a second that all cores together copy from memory into their caches: the median of some runs."""
    from benchmarks.harness.reports import threads

    source = np.ones(megabytes * 2**18, np.float32)
    parts = np.array_split(source, threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            list(pool.map(_read, parts))
            seconds.append(time.perf_counter() - start)
    return source.nbytes / statistics.median(seconds)


def _read(part: np.ndarray[Any, Any]) -> None:
    room = np.empty(min(ROOM, len(part)), part.dtype)
    for at in range(0, len(part) - len(room) + 1, len(room)):
        np.copyto(room, part[at : at + len(room)])


def weights(config: GPT2Config, size: int = 4) -> int:
    """The bytes of the parameters that every token reads, at `size` bytes each; the head is the embedding."""
    shapes = [weight.shape for weight in table(config, "lm") if not any(part in weight.path for part in UNREAD)]
    return size * sum(int(np.prod(shape)) for shape in shapes)


def cache(config: GPT2Config, length: int, size: int = 4) -> int:
    """The bytes of the keys and values of so many tokens."""
    return 2 * config.n_layer * config.n_embd * length * size
