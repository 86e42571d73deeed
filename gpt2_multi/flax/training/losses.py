"""Losses, and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from gpt2_multi.flax.attention import upcast
from gpt2_multi.flax.layers import facts
from gpt2_multi.model import inputs

IGNORED = -100


def cross_entropy(logits: Array, labels: Array, mask: Array | None = None) -> Array:
    """The mean negative log-likelihood of the labels that count: (..., K) logits, (...) labels -> ().

    A label counts unless it is -100 or `mask` (...) is 0 there; where none counts the loss is 0. One row may have its
    label alone, ().
    """
    labels = batched(labels)
    inputs.check_labels(facts(labels), logits.shape)
    labels = labels.astype(jnp.int32)  # an unsigned dtype has no -100
    counted = labels != IGNORED if mask is None else (labels != IGNORED) & mask.astype(bool)
    each = optax.softmax_cross_entropy_with_integer_labels(upcast(logits), jnp.where(counted, labels, 0))
    return jnp.where(counted, each, 0).sum() / jnp.maximum(counted.sum(), 1).astype(each.dtype)


def lm_loss(logits: Array, labels: Array, mask: Array | None = None) -> Array:
    """Next-token cross-entropy: (..., T, V) logits, (..., T) labels, shifted here.

    A token that the mask hides neither is predicted nor predicts.
    """
    inputs.check_labels(facts(labels), logits.shape)
    return cross_entropy(logits, shifted(labels, mask))


def shifted(labels: Array, mask: Array | None) -> Array:
    """What each position has to predict, (..., T), -100 where nothing counts; see `lm_loss`."""
    labels = labels.astype(jnp.int32)  # an unsigned dtype has no -100
    following = jnp.concatenate([labels[..., 1:], jnp.full_like(labels[..., :1], IGNORED)], -1)
    if mask is None:
        return following
    keep = mask.astype(bool)
    return jnp.where(keep & jnp.roll(keep, -1, -1), following, IGNORED)


def classification_loss(logits: Array, labels: Array, problem_type: str | None) -> Array:
    """The loss of (B, L) logits by `problem_type`, by default: one label is regression, floats are several labels.

    labels: (B,) classes; (B, L) floats for several labels; (B,) or (B, L) floats for regression.
    """
    labels, logits = batched(labels), upcast(logits)
    if problem_type is None:
        floats = jnp.issubdtype(labels.dtype, jnp.floating)
        single = "multi_label_classification" if floats else "single_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else single
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    if problem_type == "regression" and labels.ndim == 1:
        logits = logits.squeeze(-1)
    inputs.check_shape("labels", labels.shape, logits.shape)
    labels = labels.astype(logits.dtype)
    if problem_type == "regression":
        return jnp.square(logits - labels).mean()
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def span_loss(start_logits: Array, end_logits: Array, start: Array, end: Array) -> Array:
    """The loss of extractive question answering: (B, T) logits, (B,) positions; those beyond the text do not count."""

    def one(logits: Array, position: Array) -> Array:
        outside = (position < 0) | (position >= logits.shape[1])
        return cross_entropy(logits, jnp.where(outside, IGNORED, position))

    return (one(start_logits, start) + one(end_logits, end)) / 2


def batched(labels: Array) -> Array:
    """A label () alone as that of a batch of one row, (1,); others as they are."""
    return labels[None] if labels.ndim == 0 else labels


def cosine_schedule(step: Any, steps: int, warmup: int = 0, least: float = 0.1) -> Array:
    """The factor of the learning rate: linear warm-up, then a cosine down to `least` (Loshchilov and Hutter 2017)."""
    done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    cosine = least + (1 - least) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return jnp.where(step < warmup, (step + 1) / max(warmup, 1), cosine)
