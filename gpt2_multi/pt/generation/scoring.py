"""Scores of texts in PyTorch: see `gpt2_multi.generation.scoring`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gpt2_multi.generation import scoring
from gpt2_multi.generation.scoring import Array
from gpt2_multi.pt.layers import to_numpy
from gpt2_multi.pt.training import widened

if TYPE_CHECKING:
    from gpt2_multi.pt.heads import GPT2LMHeadModel
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def score(
    self: GPT2LMHeadModel,
    texts: str | Sequence[str],
    *,
    tokenizer: GPT2Tokenizer,
    stride: int | None = None,
    batch_size: int = 8,
) -> Any:
    """The `TextScore` of a text, or a list of them: log-probabilities of its tokens in nats, and its perplexity.

    Texts beyond `n_positions` are read in windows, each `stride` tokens (by default half the context) further than the
    one before. Raises InputError for what is no text, and for a stride that would leave tokens out.
    """
    was_training = self.training
    try:
        self.eval()  # dropout would score another model
        return scoring.score(partial(log_probs, self), texts, tokenizer, self.config, stride, batch_size)
    finally:
        self.train(was_training)


@torch.no_grad()
def log_probs(model: GPT2LMHeadModel, ids: Array, mask: Array) -> Array:
    """The log-probability of each id but the first, given those before it: (B, T) -> (B, T - 1)"""
    given, keep = (torch.from_numpy(x).to(model.device) for x in (ids, mask))
    logits = model(given, attention_mask=keep, use_cache=False, return_dict=True).logits[:, :-1]
    chosen = logits.gather(-1, given[:, 1:, None]).squeeze(-1)
    return to_numpy(widened(chosen) - widened(logits).logsumexp(-1))
