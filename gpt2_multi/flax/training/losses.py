"""Losses, the optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gpt2_multi.flax.layers import facts
from gpt2_multi.model import inputs
from gpt2_multi.model.spelling import FLAX

IGNORED = -100
DECAYED = {FLAX.leaves[kind] for kind in ("embedding", "kernel", "linear")}  # of the table's kinds


def cross_entropy(logits: Array, labels: Array, mask: Array | None = None) -> Array:
    """The mean negative log-likelihood of the labels that count: (..., K) logits, (...) labels -> ().

    A label counts unless it is -100 or `mask` (...) is 0 there; where none counts the loss is 0.
    """
    inputs.check_labels(facts(labels), logits.shape)
    labels = labels.astype(jnp.int32)  # an unsigned dtype has no -100
    counted = labels != IGNORED if mask is None else (labels != IGNORED) & (mask != 0)
    each = optax.softmax_cross_entropy_with_integer_labels(widened(logits), jnp.where(counted, labels, 0))
    return jnp.where(counted, each, 0).sum() / jnp.maximum(counted.sum(), 1)


def widened(logits: Array) -> Array:
    """At least float32: a sum over many tokens is beyond float16, and beyond bfloat16's precision."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


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
    return jnp.where((mask != 0) & (jnp.roll(mask, -1, -1) != 0), following, IGNORED)


def classification_loss(logits: Array, labels: Array, problem_type: str | None) -> Array:
    """The loss of (B, L) logits by `problem_type`, by default: one label is regression, floats are several labels.

    labels: (B,) classes; (B, L) floats for several labels; (B,) or (B, L) floats for regression.
    """
    logits = widened(logits)
    if problem_type is None:
        floats = jnp.issubdtype(labels.dtype, jnp.floating)
        single = "multi_label_classification" if floats else "single_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else single
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    if problem_type == "regression" and labels.ndim == 1:
        logits = logits.squeeze(-1)
    inputs.check_shape("labels", labels.shape, logits.shape)
    if problem_type == "regression":
        return jnp.square(logits - labels).mean()
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)).mean()


def span_loss(start_logits: Array, end_logits: Array, start: Array, end: Array) -> Array:
    """The loss of extractive question answering: (B, T) logits, (B,) positions; those beyond the text do not count."""

    def one(logits: Array, position: Array) -> Array:
        outside = (position < 0) | (position >= logits.shape[1])
        return cross_entropy(logits, jnp.where(outside, IGNORED, position))

    return (one(start_logits, start) + one(end_logits, end)) / 2


def decay_mask(params: Any) -> Any:
    """True where a parameter decays: matrices and embeddings, not biases and layer norms (Radford et al. 2018).

    The table's kinds decide, since unflattened and stacked biases have two dimensions and more.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def optimizer(
    learning_rate: float | optax.Schedule, weight_decay: float = 0.1, max_norm: float | None = 1.0, **options: Any
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) with gradients clipped to `max_norm` together (Pascanu et al. 2013).

    `options` are those of `optax.adamw`, such as b1, b2 and eps.
    """
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, **{"mask": decay_mask, **options})
    return adamw if max_norm is None else optax.chain(optax.clip_by_global_norm(max_norm), adamw)


def cosine_schedule(step: Any, steps: int, warmup: int = 0, least: float = 0.1) -> Array:
    """The factor of the learning rate: linear warm-up, then a cosine down to `least` (Loshchilov and Hutter 2017)."""
    done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    cosine = least + (1 - least) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return jnp.where(step < warmup, (step + 1) / max(warmup, 1), cosine)


def cosine_rate(learning_rate: float, steps: int, warmup: int = 0, least: float = 0.1) -> optax.Schedule:
    """A learning rate under `cosine_schedule`, for `optimizer`."""
    return lambda step: learning_rate * cosine_schedule(step, steps, warmup, least)
