"""Generation on the CPU, float32, by all backends and their peers: greedy, sampled, beams, lookup, first token.

Random weights and prompts; no text ends early. `who` are the beginnings of the names of those that are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.harness import OURS, Row
from benchmarks.harness.folders import TINY, plain, written
from benchmarks.harness.measuring import Case, Found, measure
from benchmarks.harness.rows import FLOOR, ours
from benchmarks.peers import workers
from gpt2_multi.app.doctor.floor import bandwidth, weights
from gpt2_multi.model.config import GPT2Config

PEERS = (
    *workers.BACKENDS,
    workers.CTRANSLATE2,
    workers.TRANSFORMERS,
    workers.KERASHUB_JAX,
    workers.TRANSFORMERS_TF("xla"),
    workers.TRANSFORMERS_FLAX,
)
SAMPLED = {"do_sample": True, "top_k": 50, "top_p": 0.95}
WAYS: dict[str, dict[str, Any]] = {
    "4 beams": {"num_beams": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 2},
}
MANY = 32  # rows, of which sampling tells no more
SMALL = {"config": TINY, "batches": (1, 2), "prompt": 8, "long": 64, "new": 8, "count": 1}


def run(
    config: GPT2Config | None = None,
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 32,
    long: int = 512,
    new: int = 64,
    count: int = 3,
    who: Sequence[str] = (),
) -> list[Row]:
    """Continue random prompts of `prompt` ids by `new` tokens, for each batch size; of `long` ids by one."""
    config, rows = plain(config), []
    speed = bandwidth()
    floor = {FLOOR: new * weights(config) / speed}
    with written(config) as folder, workers.running(PEERS, folder, who) as running:
        for batch in batches:
            ids = prompts(config, batch, prompt)
            greedy = generating(f"greedy, batch {batch}", ids, new, {})
            rows += measure([greedy], running, count)[0].rows(floor=floor)
            if batch < MANY:
                sampled = sampling(f"sampled, batch {batch}", ids, new)
                found = measure([replace(greedy, of=is_ours), sampled], running, count)
                rows += found[1].rows() + rules(*found)
        for what, options in WAYS.items():
            case = generating(what, prompts(config, 1, prompt), new, options)
            rows += measure([case], running, count)[0].rows()
        case = generating(f"first token after {long}", prompts(config, 1, long), 1, {})
        rows += measure([case], running, count)[0].rows("s")
    return rows


def prompts(config: GPT2Config, batch: int, length: int) -> list[list[int]]:
    """Random ids."""
    found: list[list[int]] = np.random.default_rng(batch).integers(config.vocab_size, size=(batch, length)).tolist()
    return found


def generating(what: str, ids: list[list[int]], new: int, options: dict[str, Any], **more: Any) -> Case:
    """A case of a call of `generate`."""
    return Case(what, ("generate", ids, new, options), len(ids) * new, **more)


def sampling(what: str, ids: list[list[int]], new: int) -> Case:
    """Sampled tokens, which are no one's but their own; of several rows by ours alone, to tell what the rules take."""
    mine: dict[str, Any] = {"of": is_ours} if len(ids) > 1 else {}
    return generating(what, ids, new, SAMPLED, same=lambda *_: True, **mine)


def is_ours(who: str) -> bool:
    """Whether this is one of ours."""
    return who.startswith(OURS)


def rules(greedy: Found, sampled: Found) -> list[Row]:
    """What the rules of sampling add to a greedy step of ours, as measured in the same rounds."""
    rows = []
    for who in ours(sampled.seconds):
        times = [more / less for more, less in zip(sampled.seconds[who], greedy.seconds[who], strict=True)]
        what, added = f"{sampled.case.what}, its rules", statistics.median(times) - 1
        rows.append(Row(what, who, 100 * added, "% of a step", rounds=len(times)))
    return rows
