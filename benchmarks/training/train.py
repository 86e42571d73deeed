"""A training step on the CPU, in float32 and in bfloat16 where it serves: forward, backward and AdamW, no dropout.

PyTorch and JAX are beside transformers and nanoGPT, TensorFlow is beside KerasHub, as Keras compiles both by default
and by XLA: three groups, since one step of each in memory at once would be too much for a small machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

from benchmarks.generation.generate import prompts
from benchmarks.harness import Row
from benchmarks.harness.folders import TINY, plain, written
from benchmarks.harness.measuring import Case, measure
from benchmarks.peers import workers
from gpt2_multi.model.config import GPT2Config

GROUPS = (
    (workers.PYTORCH, workers.JAX, workers.TRANSFORMERS, workers.NANOGPT, workers.TRANSFORMERS_FLAX),
    (workers.TENSORFLOW, workers.KERASHUB),
    (workers.TENSORFLOW("xla"), workers.KERASHUB("xla"), workers.TRANSFORMERS_TF("xla")),
)
KINDS = {"float32": "", "bfloat16": "autocast"}
SHAPES = {"float32": ((2, 256), (8, 256)), "bfloat16": ((2, 256),)}
NEAR = {"float32": 1e-3, "bfloat16": 1e-2}  # losses
SMALL = {"config": TINY, "shapes": {"float32": ((1, 16),), "bfloat16": ((1, 16),)}, "count": 1}


def run(
    config: GPT2Config | None = None,
    shapes: Mapping[str, Sequence[tuple[int, int]]] = MappingProxyType(SHAPES),
    count: int = 3,
    who: Sequence[str] = (),
) -> list[Row]:
    """Updates with random batches of these shapes, in float32 and in bfloat16."""
    config, rows = plain(config), []
    with written(config) as folder:
        for kind, batches in shapes.items():
            cases = [case(config, kind, *batch) for batch in batches]
            for group in workers.chosen(GROUPS, who):
                with workers.running([peer.of(KINDS[kind]) for peer in group], folder, who) as running:
                    rows += [row for each in cases for row in measure([each], running, count)[0].rows()]
    return rows


def case(config: GPT2Config, kind: str, batch: int, length: int) -> Case:
    """Updates with one batch: all have made as many of them, so that their losses have to be the same."""
    near = partial(math.isclose, rel_tol=NEAR[kind])
    return Case(f"{kind}, {batch} x {length}", ("train", prompts(config, batch, length)), batch * length, near)
