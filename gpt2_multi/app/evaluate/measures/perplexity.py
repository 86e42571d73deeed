"""How well a model predicts texts: perplexity of a token and of a word, and bits per byte.

A text is read as `model.score` reads it: after the token that begins one, in windows that go on by `stride`, each token
counted once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2_multi.app.evaluate.scorer import Done, Scorer, start_of
from gpt2_multi.errors import InputError
from gpt2_multi.generation.scoring import windows_of
from gpt2_multi.generation.stopping.spelling import token_bytes
from gpt2_multi.model.config import GPT2Config


@dataclass(frozen=True)
class Perplexity:
    """The measure of plain texts.

    length: tokens that are read at once, by default all that the model can. stride: how much further each window
    begins, by default half of them. start: whether the token that begins a text is read before each.
    """

    length: int | None = None
    stride: int | None = None
    start: bool = True

    name = "perplexity"

    def settled(self, config: GPT2Config) -> Perplexity:
        """The same with every choice made, as a model allows; InputError for what would leave tokens out."""
        most = config.n_positions
        length = most if self.length is None else self.length
        if not 2 <= length <= most:
            raise InputError(f"length: expected 2 to {most}, which the model can read at once, found {length}")
        stride = max(length // 2, 1) if self.stride is None else self.stride
        if not 1 <= stride < length:
            raise InputError(f"stride: expected 1 to {length - 1}, less than the length of a window, found {stride}")
        return Perplexity(length, stride, self.start and start_of(config) is not None)

    def parse(self, document: str) -> str:
        """A document is a text as it is."""
        return document

    def measure(self, texts: Sequence[str], scorer: Scorer, done: Done = float) -> list[dict[str, Any]]:
        """Of each text its counts of what is scored, and its log-probability in nats."""
        assert self.length is not None and self.stride is not None, "settle the measure before"
        rows = [np.asarray(self._row(text, scorer), np.int64) for text in texts]
        each = [list(windows_of(i, row, self.length, self.stride)) for i, row in enumerate(rows)]
        found = iter(scorer.scored([window for windows in each for window in windows], done))
        totals = [sum(float(next(found)[0].sum()) for _ in windows) for windows in each]
        return [self._result(*parts, scorer) for parts in zip(texts, rows, totals, strict=True)]

    def _row(self, text: str, scorer: Scorer) -> list[int]:
        start = start_of(scorer.config)
        return [start, *scorer.ids(text)] if self.start and start is not None else scorer.ids(text)

    def _result(self, text: str, row: Any, total: float, scorer: Scorer) -> dict[str, Any]:
        """The first id is not scored, so that where it is of the text its bytes do not count."""
        unscored = b"" if self.start or not len(row) else token_bytes(scorer.tokenizer, int(row[0]))
        size = len(text.encode("utf-8", "surrogatepass")) - len(unscored)
        words = len(re.split(r"\s+", text)) if text else 0  # as lm_eval counts them
        return {"tokens": max(len(row) - 1, 0), "bytes": size, "words": words, "log_prob": total}

    def summary(self, results: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Over all documents, each weighted by its tokens, words and bytes."""
        count, sums = 0, dict.fromkeys(("tokens", "bytes", "words"), 0)
        total = 0.0
        for result in results:
            count, total = count + 1, total + result["log_prob"]
            sums = {name: value + result[name] for name, value in sums.items()}
        if not sums["tokens"]:
            raise InputError("data: has no token that could be scored; give texts of some tokens")
        return {
            "documents": count,
            **sums,
            "perplexity": exp(-total / sums["tokens"]),
            "bits_per_byte": -total / math.log(2) / sums["bytes"],
            "byte_perplexity": exp(-total / sums["bytes"]),
            "word_perplexity": exp(-total / sums["words"]),
        }


def exp(x: float) -> float:
    """e to a power, infinite where it is too large for a number."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))
