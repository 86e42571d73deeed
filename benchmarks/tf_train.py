"""A training step in TensorFlow on the CPU, float32, beside transformers and KerasHub: tokens in a second."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from benchmarks import folders, tf_workers
from benchmarks.harness import OURS, Row
from gpt2_multi.config import GPT2Config

PEERS = (OURS, "transformers", "kerashub")


def run(config: GPT2Config | None = None, batch: int = 2, length: int = 256, count: int = 5) -> list[Row]:
    """`train_on_batch` with AdamW on random tokens, without dropout: as Keras compiles it by default, and on XLA."""
    config, rows = folders.plain(config), []
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(batch, length)).tolist()
    same = partial(math.isclose, rel_tol=1e-3)
    with folders.written(config) as folder:
        for mode in ("plain", "xla"):
            what = f"TensorFlow, training step, {batch} x {length}, {mode}"
            with tf_workers.running([(name, mode) for name in PEERS], folder) as workers:
                rows += tf_workers.measure(what, workers, ("train", ids), batch * length, count, same)
    return rows
