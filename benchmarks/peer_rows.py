"""What is measured of the peers of TensorFlow and JAX on the CPU, in float32: tokens in a second."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from benchmarks import folders
from benchmarks.harness import Row
from benchmarks.peer_workers import Framework, Peer, measure, running
from gpt2_multi.model.config import GPT2Config


def generate(
    framework: Framework,
    peers: Sequence[Peer],
    config: GPT2Config | None = None,
    batches: Sequence[int] = (1, 8),
    prompt: int = 32,
    new: int = 64,
    count: int = 5,
) -> list[Row]:
    """Greedy generation: continue random prompts of `prompt` ids by `new` tokens."""
    config, rows = folders.plain(config), []
    with folders.written(config) as folder, running(framework, peers, folder) as workers:
        for batch in batches:
            ids = np.random.default_rng(batch).integers(config.vocab_size, size=(batch, prompt)).tolist()
            what, call = f"{framework.title}, generate, batch {batch}", ("generate", ids, new)
            rows += measure(what, workers, call, batch * new, count, operator.eq)
    return rows


def train(
    framework: Framework,
    groups: Mapping[str, Sequence[Peer]],
    config: GPT2Config | None = None,
    batch: int = 2,
    length: int = 256,
    count: int = 5,
) -> list[Row]:
    """A step of AdamW on random tokens, without dropout, by each group of peers; its name ends that of its rows."""
    config, rows = folders.plain(config), []
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(batch, length)).tolist()
    same = partial(math.isclose, rel_tol=1e-3)
    with folders.written(config) as folder:
        for name, peers in groups.items():
            what = f"{framework.title}, training step, {batch} x {length}{name}"
            with running(framework, peers, folder) as workers:
                rows += measure(what, workers, ("train", ids), batch * length, count, same)
    return rows
