"""Rows and rounds.

Peers take turns within a round, so that whatever else the machine does falls on all of them alike. A figure is the
median of its rounds, and a ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

Who = TypeVar("Who")
OURS = "gpt2_multi"  # or what the names of several of ours begin with, before a comma
FLOOR = "floor"  # a peer that is the time in which memory gives the bytes


class PeerError(Exception):
    """A peer that cannot be measured, or not in this, and why."""


@dataclass(frozen=True)
class Row:
    """One figure, and of how many rounds it is the median.

    `ratios` compare each of ours, by its name, with `who`: more than 1 means that ours is better. `differs`: what `who`
    made is not what ours did.
    """

    what: str
    who: str
    value: float
    unit: str
    ratios: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 1
    differs: bool = False


def elapsed(call: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(
    what: str,
    peers: Mapping[Who, Callable[[], Any]],
    count: int,
    before: int = 1,
    timed: Callable[[Callable[[], Any]], float] = elapsed,
    patience: float = float("inf"),
) -> dict[Who, list[float]]:
    """The seconds of each peer in each round, after `before` rounds that do not count; progress goes to stderr.

    After `patience` seconds no other round begins, once one has counted.
    """
    seconds: dict[Who, list[float]] = {who: [] for who in peers}
    start = time.perf_counter()
    for number in track(range(before + count), what, console=Console(stderr=True), transient=True):
        if number > before and time.perf_counter() - start > patience:
            break
        for who, call in peers.items():
            took = timed(call)
            if number >= before:
                seconds[who].append(took)
    return seconds


def compare(what: str, seconds: Mapping[str, list[float]], unit: str, amount: float | None = None) -> list[Row]:
    """A row per peer: its median seconds, or the `amount` of work that it does in one second."""
    rows = []
    for who, theirs in seconds.items():
        ratios = {our: ratio(theirs, seconds[our]) for our in ours(seconds)}
        median = statistics.median(theirs)
        rows.append(Row(what, who, median if amount is None else amount / median, unit, ratios, len(theirs)))
    return rows


def ours(names: Iterable[str]) -> list[str]:
    """Which of these names are this library: the one that has no other name, or each of a backend."""
    names = list(names)
    return [OURS] if OURS in names else [name for name in names if name.startswith(f"{OURS}, ")]


def ratio(theirs: list[float], own: list[float]) -> float:
    """How often ours is done in their time."""
    return statistics.median(their / our for their, our in zip(theirs, own, strict=True))
