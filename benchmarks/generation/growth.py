"""What a token costs the longer the text before it is: one row, float32, milliseconds of each of the `new` tokens.

The time of one token is taken off that of `new` more, so that what the text before them costs does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.generation.generate import PEERS, generating, prompts
from benchmarks.harness import Row, compare, pictures
from benchmarks.harness.floor import FLOOR, bandwidth, cache, weights
from benchmarks.harness.folders import plain, written
from benchmarks.harness.measuring import Seconds, measure
from benchmarks.harness.rows import ours
from benchmarks.peers import workers
from gpt2_multi.model.config import GPT2Config


def run(
    config: GPT2Config | None = None,
    lengths: Sequence[int] = (8, 256, 512, 936),
    new: int = 64,
    count: int = 2,
    who: Sequence[str] = (),
) -> list[Row]:
    """Continue random prompts of each length, and say how often the first of these costs fits into the last."""
    config, speed = plain(config), bandwidth()
    took: dict[int, Seconds] = {}
    with written(config) as folder, workers.running(PEERS, folder, who) as running:
        for length in lengths:
            took[length] = tokens(running, prompts(config, 1, length), new, count)
            took[length][FLOOR] = [(weights(config) + cache(config, length + new // 2)) / speed * 1000] * count
    rows = [row for length in lengths for row in compare(f"a token after {length}", took[length], "ms")]
    return rows + grown(took[lengths[0]], took[lengths[-1]], f"from {lengths[0]} to {lengths[-1]}")


def tokens(running: dict[str, workers.Worker], ids: list[list[int]], new: int, count: int) -> Seconds:
    """The milliseconds of a token in each round."""
    cases = [generating(f"{more} after {len(ids[0])}", ids, more, {}) for more in (1, new + 1)]
    one, many = measure(cases, running, count)
    return {
        who: [(long - short) / new * 1000 for long, short in zip(many.seconds[who], one.seconds[who], strict=True)]
        for who in many.seconds
    }


def grown(first: Seconds, last: Seconds, what: str) -> list[Row]:
    """How often the cost at the start fits into that at the end."""
    times = {who: statistics.median(last[who]) / statistics.median(first[who]) for who in first}
    return [
        Row(what, who, more, "times", {our: more / times[our] for our in ours(times)}) for who, more in times.items()
    ]


def draw(rows: Sequence[Row], *where: object) -> None:
    """A curve for each."""
    pictures.curves([row for row in rows if row.unit == "ms"], *where)  # type: ignore[arg-type]
