"""Greedy generation in TensorFlow on the CPU, float32, beside transformers and KerasHub: tokens in a second."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from benchmarks import folders, tf_workers
from benchmarks.harness import OURS, Row
from gpt2_multi.config import GPT2Config

PEERS = [(OURS, "plain"), *((name, mode) for name in ("transformers", "kerashub") for mode in ("plain", "xla"))]


def run(
    config: GPT2Config | None = None, batches: Sequence[int] = (1, 8), prompt: int = 32, new: int = 64, count: int = 5
) -> list[Row]:
    """Continue random prompts of `prompt` ids by `new` tokens; this library is on XLA unless told otherwise."""
    config, rows = folders.plain(config), []
    with folders.written(config) as folder, tf_workers.running(PEERS, folder) as workers:
        for batch in batches:
            ids = np.random.default_rng(batch).integers(config.vocab_size, size=(batch, prompt)).tolist()
            what, call = f"TensorFlow, generate, batch {batch}", ("generate", ids, new)
            rows += tf_workers.measure(what, workers, call, batch * new, count, operator.eq)
    return rows
