"""A model that tells how likely texts are, on any backend: windows of any lengths, read in batches of like ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpt2_multi.app import backends
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import resolve
from gpt2_multi.generation.scoring import Window, scored
from gpt2_multi.generation.stopping.spelling import ids_of
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.fast import GPT2TokenizerFast
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]
Scored = tuple[Array, Array]
Done = Callable[[float], object]  # is told which part of the work is done more
# Tokens that are read at once, padding counted: gpt2's logits of them take 0.4 GB on a CPU, 1.6 elsewhere.
TOKENS = {"cpu": 2048}
MOST_TOKENS = 8192


@dataclass(frozen=True)
class Source:
    """Which model, and where and how it computes: all that another process needs to load the same.

    model: a folder, or a name that is resolved where it is loaded.
    """

    model: str
    backend: str | None = None
    device: str | None = None
    dtype: str = "float32"
    quantize: str | None = None
    batch_size: int | None = None

    def load(self) -> Scorer:
        """The model, ready to score."""
        row = backends.resolve(self.backend)
        device = row.device(self.device)
        folder = resolve(self.model)
        model = row.load(folder, device, self.dtype, quantization=self.quantize)
        quick = GPT2TokenizerFast if importlib.util.find_spec("gigatoken") else GPT2Tokenizer  # which gives the same
        return Scorer(model, quick.from_pretrained(folder, split_special_tokens=True), row, device, self.batch_size)


@dataclass(frozen=True)
class Scorer:
    """A model with its tokenizer, and how many windows it reads at once: `batch_size`, or as their lengths allow."""

    model: Any
    tokenizer: Any
    row: backends.Backend
    device: str
    batch_size: int | None = None

    @property
    def config(self) -> GPT2Config:
        """The model's configuration."""
        config: GPT2Config = self.model.config
        return config

    def ids(self, text: str) -> list[int]:
        """The ids of a text, in which nothing is a control token."""
        return ids_of(self.tokenizer, text)

    def scored(self, windows: Sequence[Window], done: Done = float) -> list[Scored]:
        """Of each id that a window scores its log-probability, and whether none is likelier; windows stay in order."""
        found = dict(self.answers(windows, done))
        return [found[i] for i in range(len(windows))]

    def answers(self, windows: Sequence[Window], done: Done = float) -> Iterator[tuple[int, Scored]]:
        """The same as soon as it is known, with the place of each window."""
        log_probs_of = partial(self.row.log_probs, self.model)
        total = sum(len(window.ids) for window in windows)
        for batch in self.batches([len(window.ids) for window in windows]):
            scores = scored(log_probs_of, [windows[i] for i in batch])
            yield from ((i, (numbers(log_probs), best)) for i, (log_probs, best) in zip(batch, scores, strict=True))
            done(sum(len(windows[i].ids) for i in batch) / total)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Which windows are read at once, the longest first: by the same lengths the same ones."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        most = TOKENS.get(self.device, MOST_TOKENS)
        while order:
            widest = 1 << (lengths[order[0]] - 1).bit_length()  # so that where shapes are compiled few are
            count = self.batch_size or max(most // widest, 1)
            yield order[:count]
            order = order[count:]


def numbers(log_probs: Array) -> Array:
    """Log-probabilities in float64; InputError where one is no number, with which any ending would be the likeliest."""
    if not np.isfinite(log_probs).all():
        wrong = log_probs[~np.isfinite(log_probs)][0]
        raise InputError(f"the model gives a log-probability of {wrong}: look at its weights, or compute in float32")
    return log_probs.astype(np.float64)


def start_of(config: GPT2Config) -> int | None:
    """The token that begins a text, if the model has one in its vocabulary."""
    start = config.bos_token_id
    return start if start is not None and 0 <= start < config.vocab_size else None
