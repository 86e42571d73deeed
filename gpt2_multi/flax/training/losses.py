"""Losses, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from gpt2_multi.flax.attention import upcast
from gpt2_multi.flax.layers import facts
from gpt2_multi.model import inputs

IGNORED = -100
CHUNK = 2**27, 2**30  # bytes of logits at a time, on a CPU and elsewhere; each costs a sum of gradients (V, E)


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


def head_loss(hidden: Array, weight: Array, labels: Array, mask: Array | None = None, dtype: Any = None) -> Array:
    """What `lm_loss` gives of the logits of a head, of (..., T, E) hidden states and its weight (V, E).

    The logits are computed a chunk of tokens at a time, and with them the gradients, so that they are never there as a
    whole. `dtype` is that of the products, by default that of the hidden states.
    """
    inputs.check_labels(facts(labels), (*hidden.shape[:-1], len(weight)))
    targets = shifted(labels, mask)
    count, length = chunk_count(hidden, len(weight)), hidden.shape[-2]
    x, t = hidden.reshape(-1, *hidden.shape[-2:]), targets.reshape(-1, length)  # (B, T, E), (B, T)
    room = -length % count  # chunks have one length
    x = jnp.pad(x, ((0, 0), (0, room), (0, 0)))
    t = jnp.pad(t, ((0, 0), (0, room)), constant_values=IGNORED)
    chunks = x.reshape(len(x), count, -1, x.shape[-1]).swapaxes(0, 1)  # (count, B, T / count, E)
    total = total_loss(chunks, weight, t.reshape(len(t), count, -1).swapaxes(0, 1), dtype or hidden.dtype)
    return total / jnp.maximum((targets != IGNORED).sum(), 1).astype(total.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def total_loss(hidden: Array, weight: Array, targets: Array, dtype: Any) -> Array:
    """The sum of -log p(target) over chunks (N, B, T, E), targets (N, B, T) -> (); of those -100 does not count."""
    return walk(hidden, weight, targets, dtype, (False, False))[0]


@partial(total_loss.defjvp, symbolic_zeros=True)
def _derived(dtype: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """The loss and how it changes: its gradients are made beside it, and a backward pass only scales them."""
    hidden, weight, targets = primals
    moves = [not isinstance(x, SymbolicZero) for x in tangents[:2]]
    total, *gradients = walk(hidden, weight, targets, dtype, moves)
    parts = [jnp.vdot(g, upcast(x)) for g, x, moved in zip(gradients, tangents, moves, strict=False) if moved]
    return total, sum(parts, jnp.zeros_like(total))


def walk(hidden: Array, weight: Array, targets: Array, dtype: Any, wanted: Sequence[bool]) -> tuple[Any, Any, Any]:
    """The sum that is `total_loss`, and its gradients of hidden states and weight, None where they are not wanted."""
    cast = weight.astype(dtype)  # (V, E)
    wide = upcast(jnp.zeros((), dtype)).dtype

    def one(sums: Any, chunk: Any) -> Any:
        x, t = chunk[0].astype(dtype), chunk[1]  # (B, T, E), (B, T)
        loss, gradient = turn(jnp.einsum("bte,ve->btv", x, cast).astype(wide), t)
        gradient = gradient.astype(dtype)
        of_hidden = jnp.einsum("btv,ve->bte", gradient, cast).astype(wide) if wanted[0] else None
        of_weight = sums[1] if sums[1] is None else sums[1] + jnp.einsum("btv,bte->ve", gradient, x).astype(wide)
        return (sums[0] + loss, of_weight), of_hidden

    start = jnp.zeros((), wide), jnp.zeros(weight.shape, wide) if wanted[1] else None
    (total, of_weight), of_hidden = lax.scan(one, start, (hidden, targets))
    return total, of_hidden, of_weight


def turn(logits: Array, targets: Array) -> tuple[Array, Array]:
    """The sum of the losses of a chunk, (B, T, V) and (B, T) -> (), and its gradient of the logits."""
    counted = targets != IGNORED
    at = jnp.where(counted, targets, 0)
    moved = logits - logits.max(-1, keepdims=True)
    powers = jnp.exp(moved)
    sums = powers.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(moved, at[..., None], -1)
    loss = jnp.where(counted[..., None], jnp.log(sums) - chosen, 0).sum()
    kept = counted[..., None].astype(logits.dtype)
    is_target = lax.broadcasted_iota(at.dtype, logits.shape, logits.ndim - 1) == at[..., None]
    return loss, kept * (powers / sums - is_target.astype(logits.dtype))


def chunk_count(hidden: Array, words: int) -> int:
    """In how many chunks (..., T, E) hidden states have logits (..., T, words)."""
    if not all(isinstance(size, int) for size in hidden.shape):  # it is exported for any sizes
        return 1
    logits = hidden.size // hidden.shape[-1] * words * max(hidden.dtype.itemsize, 4)
    return max(1, min(hidden.shape[-2], math.ceil(logits / CHUNK[jax.default_backend() != "cpu"])))


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
