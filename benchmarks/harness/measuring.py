"""Calls that peers take turns with: what is asked, who can do it and whether it is the same, and how long it takes."""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.harness.rows import PeerError, Row, compare, ours, rounds
from benchmarks.peers.workers import Worker

PATIENCE = 10.0  # seconds for each peer, after which no other round begins
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """One call, the tokens that it makes or reads, when two results are the same, and who has a part in it."""

    what: str
    call: Sequence[Any]
    tokens: int
    same: Callable[[Any, Any], bool] = operator.eq
    of: Callable[[str], bool] = lambda _: True


@dataclass(frozen=True)
class Found:
    """What a case took: each peer's seconds of the rounds; and who made something else."""

    case: Case
    seconds: Seconds
    different: set[str]

    def rows(self, unit: str = "tokens/s", floor: Mapping[str, float] | None = None) -> list[Row]:
        """Tokens a second, or the seconds of a call; `floor` is a peer whose seconds are known."""
        count = max(map(len, self.seconds.values()), default=0)
        seconds = self.seconds | {who: [took] * count for who, took in (floor or {}).items()}
        rows = compare(self.case.what, seconds, unit, self.case.tokens if unit == "tokens/s" else None)
        return [replace(row, differs=row.who in self.different) for row in rows]


def measure(cases: Sequence[Case], workers: Mapping[str, Worker], count: int) -> list[Found]:
    """Let every peer take its turn in each round, with all cases of a group, so that these can be compared too.

    A first call of each, in which peers compile and make what they keep, does not count, and is what tells who can do
    it at all.
    """
    start, results = time.perf_counter(), {}
    able = [list(first_results(case, workers)) for case in cases]
    warmed = time.perf_counter() - start

    def timed(number: int, who: str) -> Any:
        results[number, who] = workers[who].ask(*cases[number].call)

    turns = [(number, who) for who in workers for number in range(len(cases)) if who in able[number]]
    what = ", ".join(case.what for case in cases)
    seconds = rounds(what, {turn: partial(timed, *turn) for turn in turns}, count, 0, patience=PATIENCE * len(workers))
    took = time.perf_counter() - start
    print(f"{what}: {took:.0f} s, of which {warmed:.0f} for the first calls", file=sys.stderr)
    return [
        Found(case, {who: seconds[number, who] for who in able[number]}, others(case, number, results))
        for number, case in enumerate(cases)
    ]


def first_results(case: Case, workers: Mapping[str, Worker]) -> dict[str, Any]:
    """What each peer answers that can do it: those that compile work at the same time, since they do it on one core."""
    asked = [who for who in workers if case.of(who)]
    together = [who for who in asked if workers[who].compiles]
    found: dict[str, Any] = {}
    for group in (together, *([who] for who in asked if who not in together)):
        for who in group:
            workers[who].send(*case.call)
        for who in group:
            try:
                found[who] = workers[who].answer()
            except PeerError as error:
                print(f"not measured: {who}, {case.what}: {error}")
    return {who: found[who] for who in asked if who in found}


def others(case: Case, number: int, results: Mapping[tuple[int, str], Any]) -> set[str]:
    """Whose result is not the same as that of the first of ours, or of whoever is the first."""
    own = {who: result for (at, who), result in results.items() if at == number}
    wanted = [own[who] for who in [*ours(own), *own][:1]]
    return {who for who, result in own.items() if not case.same(result, wanted[0])}
