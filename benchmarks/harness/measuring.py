"""Calls that peers take turns with: what is asked, who can do it and whether it is the same, and how long it takes."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.harness.rows import PeerError, Row, compare, ours, rounds
from benchmarks.peers.workers import Worker

PATIENCE = 40.0  # seconds, after which two rounds have to do
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """One call, the tokens that it makes or reads, and when two results are the same."""

    what: str
    call: Sequence[Any]
    tokens: int
    same: Callable[[Any, Any], bool] = operator.eq


@dataclass(frozen=True)
class Found:
    """What a case took: each peer's seconds of the rounds, and of its first call; and who made something else."""

    case: Case
    seconds: Seconds
    first: dict[str, float]
    different: set[str]

    def label(self, who: str) -> str:
        """The name that a peer's row bears."""
        return f"{who} (DIFFERENT)" if who in self.different else who

    def rows(self, unit: str = "tokens/s", floor: Mapping[str, float] | None = None) -> list[Row]:
        """Tokens a second, or the seconds of a call; `floor` is a peer whose seconds are known."""
        named = {self.label(who): took for who, took in self.seconds.items()}
        count = max(map(len, named.values()), default=0)
        named |= {who: [took] * count for who, took in (floor or {}).items()}
        return compare(self.case.what, named, unit, self.case.tokens if unit == "tokens/s" else None)

    def first_rows(self) -> list[Row]:
        """Seconds of the first calls, in which peers compile."""
        named = {self.label(who): [took] for who, took in self.first.items()}
        return compare(f"{self.case.what}, first call", named, "s")


def measure(cases: Sequence[Case], workers: Mapping[str, Worker], count: int) -> list[Found]:
    """Let every peer take its turn in each round, with all cases of a group, so that these can be compared too.

    The first call of each, in which peers compile, does not count, and is what tells who can do it at all.
    """
    firsts = [first_calls(case, workers) for case in cases]
    calls = {
        (number, who): partial(workers[who].ask, *case.call)
        for who in workers
        for number, case in enumerate(cases)
        if who in firsts[number]
    }
    what = ", ".join(case.what for case in cases)
    seconds = rounds(what, calls, count, before=0, patience=PATIENCE)
    found = []
    for number, (case, first) in enumerate(zip(cases, firsts, strict=True)):
        own = {who: seconds[number, who] for who in first}
        found.append(Found(case, own, {who: took for who, (took, _) in first.items()}, others(case, first)))
    return found


def first_calls(case: Case, workers: Mapping[str, Worker]) -> dict[str, tuple[float, Any]]:
    """The seconds and the result of the first call of each peer that can do it."""
    found = {}
    for who, worker in workers.items():
        start = time.perf_counter()
        try:
            result = worker.ask(*case.call)
        except PeerError as error:
            print(f"not measured: {who}, {case.what}: {error}")
        else:
            found[who] = time.perf_counter() - start, result
    return found


def others(case: Case, first: Mapping[str, tuple[float, Any]]) -> set[str]:
    """Whose result is not the same as that of the first of ours, or of whoever is the first."""
    wanted = [first[who][1] for who in [*ours(first), *first][:1]]
    return {who for who, (_, result) in first.items() if not case.same(result, wanted[0])}
