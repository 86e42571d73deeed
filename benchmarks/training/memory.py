"""The most memory that a fresh process holds in a training step with AdamW, float32; the model is made in it.

Where the loss is computed in chunks of the rows, it stands beside itself with all logits at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.generation.generate import prompts
from benchmarks.harness import OURS, PeerError, Row, compare
from benchmarks.harness.folders import TINY, plain, written
from benchmarks.peers import workers
from gpt2_multi.model.config import GPT2Config

WHOLE = "whole logits"
PEERS = (*(each for peer in workers.BACKENDS for each in (peer, peer(WHOLE))), workers.TRANSFORMERS)
SMALL = {"config": TINY, "shapes": ((1, 16),)}


def run(
    config: GPT2Config | None = None,
    shapes: Sequence[tuple[int, int]] = ((2, 256), (8, 256), (8, 1024)),
    who: Sequence[str] = (),
) -> list[Row]:
    """One update with a batch of each shape, after one of a few tokens, for which AdamW makes its moments."""
    config = plain(config)
    with written(config) as folder:
        return [row for shape in shapes for row in compared(config, folder, *shape, who)]


def compared(config: GPT2Config, folder: Path, batch: int, length: int, who: Sequence[str]) -> list[Row]:
    """A row of each peer's megabytes."""
    most: dict[str, list[float]] = {}
    for (peer,) in workers.chosen([[peer] for peer in PEERS], who):
        with workers.running([peer.of("new")], folder, who) as running:
            for name, worker in running.items():
                try:
                    took = peak(worker, prompts(config, 1, 8), prompts(config, batch, length))
                    most[name.removeprefix(f"{OURS}, ") if WHOLE in name else name] = [took]  # a peer of its own
                except PeerError as error:
                    print(f"not measured: {name}, {batch} x {length}: {error}")
    return compare(f"peak, {batch} x {length}", most, "MB")


def peak(worker: workers.Worker, *batches: list[list[int]]) -> float:
    """The megabytes after updates with these batches."""
    for ids in batches:
        worker.ask("train", ids)
    return float(worker.ask("peak"))
