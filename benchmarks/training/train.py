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
SAME = {"float32": partial(math.isclose, rel_tol=1e-3), "bfloat16": partial(math.isclose, rel_tol=1e-2)}


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
            for group in GROUPS:
                with workers.running([peer.of(KINDS[kind]) for peer in group], folder, who) as running:
                    for batch, length in shapes:
                        call, tokens = ("train", prompts(config, batch, length)), batch * length
                        case = Case(f"{kind}, {batch} x {length}", call, tokens, SAME[kind])
                        rows += measure([case], running, count)[0].rows()
    return rows
