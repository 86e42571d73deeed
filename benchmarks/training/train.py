"""A training step on the CPU, in float32 and in bfloat16 where it serves: forward, backward and AdamW, no dropout.

PyTorch and JAX are beside transformers and nanoGPT, TensorFlow is beside KerasHub, each as Keras compiles it by default
and by XLA: two groups, since one step of each in memory at once would be too much for a small machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from benchmarks.generation.generate import prompts
from benchmarks.harness import Row
from benchmarks.harness.folders import plain, written
from benchmarks.harness.measuring import Case, measure
from benchmarks.peers import workers
from gpt2_multi.model.config import GPT2Config

GROUPS = (
    (workers.PYTORCH, workers.JAX, workers.TRANSFORMERS, workers.NANOGPT, workers.TRANSFORMERS_FLAX),
    (
        workers.TENSORFLOW,
        workers.TENSORFLOW("xla"),
        workers.KERASHUB,
        workers.KERASHUB("xla"),
        workers.TRANSFORMERS_TF("xla"),
    ),
)
KINDS = {"float32": "", "bfloat16": "autocast"}
NEAR = {"float32": 1e-3, "bfloat16": 1e-2}  # losses


def run(
    config: GPT2Config | None = None,
    shapes: Sequence[tuple[int, int]] = ((2, 256), (8, 256)),
    count: int = 3,
    kinds: Sequence[str] = tuple(KINDS),
    who: Sequence[str] = (),
) -> list[Row]:
    """Updates with random batches of these shapes, in float32 and in bfloat16."""
    config, rows = plain(config), []
    with written(config) as folder:
        for kind in kinds:
            cases = [case(config, kind, *shape, shape == shapes[0]) for shape in shapes]
            for group in workers.chosen(GROUPS, who):
                with workers.running([peer.of(KINDS[kind]) for peer in group], folder, who) as running:
                    rows += [row for each in cases for row in measure([each], running, count)[0].rows()]
    return rows


def case(config: GPT2Config, kind: str, batch: int, length: int, is_first: bool) -> Case:
    """Updates with one batch; while it is the first, all have made as many, so that their losses have to be the same.

    Who does not compile is warm from the first batch on.
    """
    what, call = f"{kind}, {batch} x {length}", ("train", prompts(config, batch, length))
    if is_first:
        return Case(what, call, batch * length, partial(math.isclose, rel_tol=NEAR[kind]))
    return Case(what, call, batch * length, lambda *_: True, brief=("peak",))
