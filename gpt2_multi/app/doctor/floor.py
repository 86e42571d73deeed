"""The floor of a token: the time in which memory gives the bytes that it needs, at what a copy reaches here and now."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table
from gpt2_multi.tokenizer.streaming.workers import cores

ROOMS = (1 << 17, 1 << 18, 1 << 20)  # numbers, so that a cache holds the copy, and Python's part in it is small
UNREAD = ("wpe",)  # of which a token takes a row


def bandwidth(megabytes: int = 512, count: int = 12) -> float:
    """Bytes a second that all cores together copy from memory into their caches, at their best."""
    source = np.ones(megabytes * 2**18, np.float32)
    parts = np.array_split(source, cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        seconds = min(_copied(pool, parts, room) for room in ROOMS for _ in range(count))
    return source.nbytes / seconds


def _copied(pool: ThreadPoolExecutor, parts: list[np.ndarray[Any, Any]], room: int) -> float:
    """The seconds in which the parts are read, each by a core."""
    start = time.perf_counter()
    list(pool.map(_read, parts, [room] * len(parts)))
    return time.perf_counter() - start


def _read(part: np.ndarray[Any, Any], numbers: int) -> None:
    room = np.empty(min(numbers, len(part)), part.dtype)
    for at in range(0, len(part) - len(room) + 1, len(room)):
        np.copyto(room, part[at : at + len(room)])


def weights(config: GPT2Config, size: int = 4) -> int:
    """The bytes of the parameters that every token reads, at `size` bytes each; a tied head is the embedding."""
    shapes = [weight.shape for weight in table(config, "lm") if not any(part in weight.path for part in UNREAD)]
    return size * sum(int(np.prod(shape)) for shape in shapes)


def cache(config: GPT2Config, length: int, size: int = 4) -> int:
    """The bytes of the keys and values of so many tokens."""
    return 2 * config.n_layer * config.n_embd * length * size
