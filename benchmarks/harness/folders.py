"""Random models for the benchmarks: their configuration, and a folder made without any framework."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.model.checkpoint import write_weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import Weight, table

TINY = GPT2Config(vocab_size=512, n_embd=64, n_layer=1, n_head=2)  # to try whether all runs


def plain(config: GPT2Config | None = None) -> GPT2Config:
    """GPT-2 124M, or `config`, without dropout and without an end token, so that every run does the same work."""
    config = config or GPT2Config()
    return config.replace(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=None, bos_token_id=None)


@contextmanager
def written(config: GPT2Config, seed: int = 0) -> Iterator[Path]:
    """A temporary folder with a randomly initialised language model in float32."""
    rng, dtype = np.random.default_rng(seed), np.dtype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        config.replace(architectures=["GPT2LMHeadModel"]).save_pretrained(name)
        sources = [(weight, dtype, lambda weight=weight: _initial(weight, rng)) for weight in table(config, "lm")]
        write_weights(Path(name), sources, "lm")
        yield Path(name)


def _initial(weight: Weight, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """What training starts from; biases are random too, so that no peer can lose one unseen."""
    mean = 1.0 if weight.kind == "scale" else 0.0
    return rng.normal(mean, 0.02, weight.shape).astype(np.float32)
