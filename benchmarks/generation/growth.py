"""What a token costs the longer the text before it is: one row, float32, milliseconds of each of the `new` tokens.

The time of one token is taken off that of `new` more, so that what the text before them costs does not count. One call
of `whole` tokens has room for all of them from the start, which may cost too: it stands beside the first tokens of a
short one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.generation.generate import generating, prompts
from benchmarks.harness import OURS, Row, compare
from benchmarks.harness.folders import TINY, plain, written
from benchmarks.harness.measuring import Seconds, measure
from benchmarks.harness.rows import FLOOR, ours
from benchmarks.peers import workers
from gpt2_multi.app.doctor.floor import bandwidth, cache, weights
from gpt2_multi.model.config import GPT2Config

PEERS = (*workers.BACKENDS, workers.CTRANSLATE2, workers.TRANSFORMERS)
LONG = (OURS, workers.CTRANSLATE2.name)  # who makes many in one call too
SMALL = {"config": TINY, "lengths": (8, 64), "new": 4, "whole": 16, "count": 1}


def run(
    config: GPT2Config | None = None,
    lengths: Sequence[int] = (8, 936),
    new: int = 64,
    whole: int = 1000,
    count: int = 3,
    who: Sequence[str] = (),
) -> list[Row]:
    """Continue random prompts of each length, and say how often the first of these costs fits into the others."""
    config, speed = plain(config), bandwidth()
    took: dict[str, Seconds] = {}
    with written(config) as folder, workers.running(PEERS, folder, who) as running:
        for length in lengths:
            took[f"a token after {length}"] = tokens(running, prompts(config, 1, length), new, count)
        took[f"a token of {whole} in one call"] = called(running, prompts(config, 1, lengths[0]), whole)
    texts = [length + new // 2 for length in lengths] + [lengths[0] + whole // 2]
    for found, text in zip(took.values(), texts, strict=True):
        rounds = max(map(len, found.values()), default=0)
        found[FLOOR] = [(weights(config) + cache(config, text)) / speed * 1000] * rounds
    return [row for what, found in took.items() for row in compare(what, found, "ms")] + grown(took)


def tokens(running: Mapping[str, workers.Worker], ids: list[list[int]], new: int, count: int) -> Seconds:
    """The milliseconds of a token in each round."""
    cases = [generating(f"{more} after {len(ids[0])}", ids, more, {}) for more in (1, new + 1)]
    one, many = measure(cases, running, count)
    return {
        who: [(long - short) / new * 1000 for long, short in zip(many.seconds[who], one.seconds[who], strict=True)]
        for who in many.seconds
    }


def called(running: Mapping[str, workers.Worker], ids: list[list[int]], whole: int) -> Seconds:
    """The milliseconds of a token of one long call."""
    case = generating(f"{whole} in one call", ids, whole, {}, of=lambda who: who.startswith(LONG))
    (found,) = measure([case], running, 1)
    return {who: [seconds / whole * 1000 for seconds in took] for who, took in found.seconds.items()}


def grown(took: Mapping[str, Seconds]) -> list[Row]:
    """How often the cost at the start fits into each of the others."""
    first, *others = took
    rows = []
    for what in others:
        times = {who: statistics.median(took[what][who]) / statistics.median(took[first][who]) for who in took[what]}
        for who, more in times.items():
            ratios = {our: more / times[our] for our in ours(times)}
            rows.append(Row(f"{what} / {first}", who, more, "times", ratios))
    return rows
