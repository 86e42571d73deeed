"""Scores of texts in TensorFlow: see `gpt2_multi.generation.scoring`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from gpt2_multi.generation import scoring
from gpt2_multi.generation.scoring import Array
from gpt2_multi.tf.training import widened

if TYPE_CHECKING:
    from gpt2_multi.tf.heads import TFGPT2LMHeadModel
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def score(
    self: TFGPT2LMHeadModel,
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
    return scoring.score(partial(log_probs, self), texts, tokenizer, self.config, stride, batch_size)


def log_probs(model: TFGPT2LMHeadModel, ids: Array, mask: Array) -> Array:
    """The log-probability of each id but the first, given those before it: (B, T) -> (B, T - 1)"""
    output = model(ids, attention_mask=mask, use_cache=False, return_dict=True)
    logits = widened(output.logits[:, :-1])
    chosen = tf.gather(logits, tf.constant(ids[:, 1:]), batch_dims=2)
    return np.asarray(chosen - tf.reduce_logsumexp(logits, -1))
