"""Scores of texts in Flax: see `gpt2_multi.generation.scoring`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_multi.flax.attention import widened
from gpt2_multi.flax.params import Tree
from gpt2_multi.generation import scoring
from gpt2_multi.generation.rules import bucket
from gpt2_multi.generation.scoring import Array

if TYPE_CHECKING:
    from gpt2_multi.flax.heads import FlaxGPT2LMHeadModel
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def score(
    self: FlaxGPT2LMHeadModel,
    texts: str | Sequence[str],
    *,
    tokenizer: GPT2Tokenizer,
    params: Tree | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Any:
    """The `TextScore` of a text, or a list of them: log-probabilities of its tokens in nats, and its perplexity.

    Texts beyond `n_positions` are read in windows, each `stride` tokens (by default half the context) further than the
    one before. Raises InputError for what is no text, and for a stride that would leave tokens out.
    """
    return scoring.score(partial(log_probs, self, params), texts, tokenizer, self.config, stride, batch_size)


def log_probs(model: FlaxGPT2LMHeadModel, params: Tree | None, ids: Array, mask: Array) -> Array:
    """The log-probability of each id but the first, given those before it: (B, T) -> (B, T - 1)

    Lengths are filled up to a bucket, so that few are compiled.
    """
    length = ids.shape[1]
    more = [(0, 0), (0, min(bucket(length), model.config.n_positions) - length)]
    ids, mask = np.pad(ids, more), np.pad(mask, more)
    return np.asarray(_chosen(model(ids, mask, params=params).logits[:, :-1], ids[:, 1:]))[:, : length - 1]


@jax.jit
def _chosen(logits: jax.Array, ids: jax.Array) -> jax.Array:
    logits = widened(logits)
    chosen = jnp.take_along_axis(logits, ids[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)
