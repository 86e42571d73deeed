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

PATIENCE = 20.0  # seconds, after which two rounds have to do
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """One call, the tokens that it makes or reads, and when two results are the same.

    `brief` is a shorter one, which is enough to warm up who does not compile. `of` chooses who has a part in it.
    """

    what: str
    call: Sequence[Any]
    tokens: int
    same: Callable[[Any, Any], bool] = operator.eq
    brief: Sequence[Any] | None = None
    of: Callable[[str], bool] = lambda _: True


@dataclass(frozen=True)
class Found:
    """What a case took: each peer's seconds of the rounds; and who made something else."""

    case: Case
    seconds: Seconds
    different: set[str]

    def rows(self, unit: str = "tokens/s", floor: Mapping[str, float] | None = None) -> list[Row]:
        """Tokens a second, or the seconds of a call; `floor` is a peer whose seconds are known."""
        named = {who + " (DIFFERENT)" * (who in self.different): took for who, took in self.seconds.items()}
        count = max(map(len, named.values()), default=0)
        named |= {who: [took] * count for who, took in (floor or {}).items()}
        return compare(self.case.what, named, unit, self.case.tokens if unit == "tokens/s" else None)


def measure(cases: Sequence[Case], workers: Mapping[str, Worker], count: int) -> list[Found]:
    """Let every peer take its turn in each round, with all cases of a group, so that these can be compared too.

    A first call of each, in which peers compile, does not count, and is what tells who can do it at all.
    """
    start, results = time.perf_counter(), {}
    able = [warm(case, workers) for case in cases]
    warmed = time.perf_counter() - start

    def timed(number: int, who: str) -> Any:
        results[number, who] = workers[who].ask(*cases[number].call)

    turns = [(number, who) for who in workers for number in range(len(cases)) if who in able[number]]
    what = ", ".join(case.what for case in cases)
    seconds = rounds(what, {turn: partial(timed, *turn) for turn in turns}, count, before=0, patience=PATIENCE)
    took = time.perf_counter() - start
    print(f"{what}: {took:.0f} s, of which {warmed:.0f} for the first calls", file=sys.stderr)
    return [
        Found(case, {who: seconds[number, who] for who in able[number]}, others(case, number, results))
        for number, case in enumerate(cases)
    ]


def warm(case: Case, workers: Mapping[str, Worker]) -> list[str]:
    """Who can do it, after a call of each."""
    able: list[str] = []
    for who, worker in workers.items():
        if case.of(who):
            brief = case.call if worker.compiles or case.brief is None else case.brief
            able += first_calls(replace(case, call=brief), {who: worker})
    return able


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


def others(case: Case, number: int, results: Mapping[tuple[int, str], Any]) -> set[str]:
    """Whose result is not the same as that of the first of ours, or of whoever is the first."""
    own = {who: result for (at, who), result in results.items() if at == number}
    wanted = [own[who] for who in [*ours(own), *own][:1]]
    return {who for who, result in own.items() if not case.same(result, wanted[0])}
