"""Losses, and the learning-rate schedule."""

from __future__ import annotations

import math

import tensorflow as tf

from gpt2_multi.model import inputs
from gpt2_multi.tf.attention import upcast
from gpt2_multi.tf.layers import facts, mean

IGNORED = -100


def cross_entropy(
    logits: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor | None = None, weight: tf.Tensor | None = None
) -> tf.Tensor:
    """The mean negative log-likelihood of the labels that count: (..., K) logits, (...) labels -> ().

    A label counts unless it is -100 or `mask` (...) is 0 there; where none counts the loss is 0. One row may have its
    label alone, (). Under a strategy the mean is over the labels of all replicas. `weight` (...) multiplies, and the
    mean stays one over the labels that count, as in Keras.
    """
    labels = batched(labels)
    inputs.check_labels(facts("labels", labels), logits.shape)
    counted = labels != IGNORED
    if mask is not None:
        counted &= tf.cast(mask, tf.bool)
    logits = upcast(logits)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(counted, labels, 0), logits)
    kept = tf.cast(counted, logits.dtype)
    return mean(tf.reduce_sum(weighted(each * kept, weight)), tf.reduce_sum(kept))


def lm_loss(logits: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Next-token cross-entropy: (..., T, V) logits, (..., T) labels, shifted here.

    A token that the mask hides neither is predicted nor predicts.
    """
    inputs.check_labels(facts("labels", labels), logits.shape)
    return cross_entropy(logits, shifted(labels, mask))  # to cut the logits would copy them


def shifted(labels: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """What each position has to predict, (..., T), -100 where nothing counts; see `lm_loss`."""
    ignored = tf.constant(IGNORED, labels.dtype)
    following = tf.concat([labels[..., 1:], tf.fill(tf.shape(labels[..., :1]), ignored)], -1)
    if mask is None:
        return following
    keep = tf.cast(mask, tf.bool)
    return tf.where(keep & tf.roll(keep, -1, -1), following, ignored)


def classification_loss(
    logits: tf.Tensor, labels: tf.Tensor, problem_type: str | None, weight: tf.Tensor | None = None
) -> tf.Tensor:
    """The loss of (B, L) logits by `problem_type`, by default: one label is regression, floats are several labels.

    labels: (B,) classes; (B, L) floats for several labels; (B,) or (B, L) floats for regression. `weight` is as in
    `cross_entropy`, of the labels' shape.
    """
    labels, logits = batched(labels), upcast(logits)
    if problem_type is None:
        single = "multi_label_classification" if labels.dtype.is_floating else "single_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else single
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels, weight=weight)
    if problem_type == "regression" and labels.shape.rank == 1:
        logits = tf.squeeze(logits, -1)
    inputs.check_shape("labels", facts("labels", labels).shape, logits.shape)
    labels = tf.cast(labels, logits.dtype)
    if problem_type == "regression":
        each = tf.square(logits - labels)
    else:
        each = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return mean(tf.reduce_sum(weighted(each, weight)), tf.cast(tf.size(each), each.dtype))


def span_loss(start_logits: tf.Tensor, end_logits: tf.Tensor, start: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """The loss of extractive question answering: (B, T) logits, (B,) positions; those beyond the text do not count."""

    losses = [cross_entropy(x, within(x, position)) for x, position in ((start_logits, start), (end_logits, end))]
    return (losses[0] + losses[1]) / 2


def within(logits: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """Positions (B,) in a text of logits (B, T), -100 for those beyond it."""
    outside = (position < 0) | (position >= tf.cast(tf.shape(logits)[1], position.dtype))
    return tf.where(outside, tf.constant(IGNORED, position.dtype), position)


def weighted(each: tf.Tensor, weight: tf.Tensor | None) -> tf.Tensor:
    """Losses times their weights, of one shape, if there are any."""
    return each if weight is None else each * tf.cast(weight, each.dtype)


def batched(labels: tf.Tensor) -> tf.Tensor:
    """A label () alone as that of a batch of one row, (1,); others as they are."""
    return labels[None] if labels.shape.rank == 0 else labels


def cosine_schedule(step: tf.Tensor, steps: int, warmup: int = 0, least: float = 0.1) -> tf.Tensor:
    """The factor of the learning rate: linear warm-up, then a cosine down to `least` (Loshchilov and Hutter 2017)."""
    step = tf.cast(step, tf.float32)
    done = tf.clip_by_value((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    cosine = least + (1 - least) * 0.5 * (1 + tf.cos(math.pi * done))
    return tf.where(step < warmup, (step + 1) / max(warmup, 1), cosine)
