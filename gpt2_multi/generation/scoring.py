"""Scores of texts: log-probabilities and perplexity, with a strided window over texts beyond the context.

The model sees windows of `n_positions` tokens, each `stride` further than the one before, and a token counts in the
first window that holds it: so each has the context of n_positions - stride tokens at least, as in Hugging Face's guide
to the perplexity of fixed-length models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpt2_multi.files.progress import watched
from gpt2_multi.generation import texts
from gpt2_multi.generation.stopping.spelling import ids_of
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]
# From ids and mask (B, T), of each id but the first its log-probability, and whether none is likelier: (B, T - 1).
LogProbsOf = Callable[[Array, Array], tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class TextScore:
    """How likely a text is.

    token_ids: what was scored. log_probs: (len(token_ids),) float64, in nats, of each after those before it.
    """

    token_ids: tuple[int, ...]
    log_probs: Array

    @property
    def log_prob(self) -> float:
        """The log-probability of the whole text, in nats."""
        return float(self.log_probs.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; nan for a text without any."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.log_probs.mean())) if self.token_ids else math.nan


class Window(NamedTuple):
    """A part of a text that the model reads at once; what stands at `first` and after it is scored."""

    text: int
    ids: Sequence[int] | Array
    first: int


def score(
    log_probs_of: LogProbsOf,
    given: str | Sequence[str],
    tokenizer: GPT2Tokenizer,
    model: GPT2Config,
    stride: int | None,
    batch_size: int,
) -> Any:
    """The `TextScore` of a text, or a list of them.

    A text is scored after the model's `bos_token_id`; where the model has none, its first token is not scored.
    """
    inputs.check_tokenizer(tokenizer)
    inputs.check_scoring(texts.are_texts(given), stride, batch_size, model.n_positions)
    prompts = [given] if isinstance(given, str) else list(given)
    rows = [started(prompt, tokenizer, model) for prompt in prompts]
    size = model.n_positions
    windows = [window for i, row in enumerate(rows) for window in windows_of(i, row, size, stride or max(size // 2, 1))]
    parts: list[list[Array]] = [[] for _ in rows]
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    for batch in watched(batches, "Scoring", len(batches)):
        for window, (found, _) in zip(batch, scored(log_probs_of, batch), strict=True):
            parts[window.text].append(found)
    scores = [TextScore(tuple(row[1:]), concatenated(found)) for row, found in zip(rows, parts, strict=True)]
    return scores[0] if isinstance(given, str) else scores


def scored(log_probs_of: LogProbsOf, batch: Sequence[Window]) -> Iterator[tuple[Array, Array]]:
    """Of each id that windows score: its log-probability, and whether none is likelier. They are read at once."""
    log_probs, likeliest = log_probs_of(*texts.pad([window.ids for window in batch], side="right"))
    for row, window in enumerate(batch):
        place = slice(window.first - 1, len(window.ids) - 1)
        yield log_probs[row, place], likeliest[row, place]


def started(text: str, tokenizer: GPT2Tokenizer, model: GPT2Config) -> list[int]:
    """The ids of a text, after the token that begins one, if it does not begin with it."""
    start, ids = model.bos_token_id, ids_of(tokenizer, text)
    return ids if start is None or not 0 <= start < model.vocab_size or ids[:1] == [start] else [start, *ids]


def windows_of(text: int, row: Sequence[int] | Array, size: int, stride: int) -> Iterator[Window]:
    """The windows of a text; its first token is not scored, and where it is alone there is none."""
    done = 1
    for start in range(0, len(row), stride):
        end = min(start + size, len(row))
        if done < end:
            yield Window(text, row[start:end], done - start)
        done = max(done, end)


def concatenated(parts: Sequence[Array]) -> Array:
    """The log-probabilities of a text's windows, one after the other."""
    return np.concatenate([np.zeros(0), *parts]).astype(np.float64)
