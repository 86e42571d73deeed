"""Losses, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.model import inputs
from gpt2_multi.tf.fit.strategy import over_replicas
from gpt2_multi.tf.layers import facts

IGNORED = -100
UNDECAYED = r"(^|/)(bias|gamma|beta)(/replica_\d+)?(:\d+)?$"  # as TensorFlow names its variables


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """The mean negative log-likelihood of the labels that count: (..., K) logits, (...) labels -> ().

    A label counts unless it is -100 or `mask` (...) is 0 there; where none counts the loss is 0. Under a strategy the
    mean is over the labels of all replicas.
    """
    inputs.check_labels(facts("labels", labels), logits.shape)
    counted = labels != IGNORED
    if mask is not None:
        counted &= tf.cast(mask, tf.bool)
    logits = widened(logits)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(counted, labels, 0), logits)
    weights = tf.cast(counted, logits.dtype)
    return mean(tf.reduce_sum(each * weights), tf.reduce_sum(weights))


def mean(total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """A sum over a count, both over all replicas; 0 where nothing counts."""
    return total / tf.maximum(over_replicas(count), 1)


def widened(logits: tf.Tensor) -> tf.Tensor:
    """At least float32: a sum over many tokens is beyond float16, and beyond bfloat16's precision."""
    return logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)


def lm_loss(logits: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Next-token cross-entropy: (..., T, V) logits, (..., T) labels, shifted here.

    A token that the mask hides neither is predicted nor predicts.
    """
    inputs.check_labels(facts("labels", labels), logits.shape)
    kept = None
    if mask is not None:
        keep = tf.cast(mask, tf.bool)
        kept = keep & tf.roll(keep, -1, -1)
    last = tf.fill(tf.shape(labels[..., :1]), tf.constant(IGNORED, labels.dtype))
    return cross_entropy(logits, tf.concat([labels[..., 1:], last], -1), kept)  # to cut the logits would copy them


def classification_loss(logits: tf.Tensor, labels: tf.Tensor, problem_type: str | None) -> tf.Tensor:
    """The loss of (B, L) logits by `problem_type`, by default: one label is regression, floats are several labels.

    labels: (B,) classes; (B, L) floats for several labels; (B,) or (B, L) floats for regression.
    """
    logits = widened(logits)
    if problem_type is None:
        single = "multi_label_classification" if labels.dtype.is_floating else "single_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else single
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    if problem_type == "regression" and labels.shape.rank == 1:
        logits = tf.squeeze(logits, -1)
    inputs.check_shape("labels", facts("labels", labels).shape, logits.shape)
    labels = tf.cast(labels, logits.dtype)
    if problem_type == "regression":
        each = tf.square(logits - labels)
    else:
        each = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return mean(tf.reduce_sum(each), tf.cast(tf.size(each), each.dtype))


def span_loss(start_logits: tf.Tensor, end_logits: tf.Tensor, start: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """The loss of extractive question answering: (B, T) logits, (B,) positions; those beyond the text do not count."""

    def one(logits: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        length = tf.cast(tf.shape(logits)[1], position.dtype)
        outside = (position < 0) | (position >= length)
        return cross_entropy(logits, tf.where(outside, tf.constant(IGNORED, position.dtype), position))

    return (one(start_logits, start) + one(end_logits, end)) / 2


@keras.saving.register_keras_serializable("gpt2_multi")
class AdamW(keras.optimizers.AdamW):
    """AdamW (Loshchilov and Hutter 2019) that decays matrices and embeddings, not biases and layer norms.

    A class, since Keras' own forgets what it does not decay when it is saved. `options` are Keras', such as
    `global_clipnorm=1.0`.
    """

    def __init__(self, learning_rate: Any = 5e-5, weight_decay: float = 0.1, **options: Any) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **options)
        self.exclude_from_weight_decay(var_names=[UNDECAYED])


def cosine_schedule(step: tf.Tensor, steps: int, warmup: int = 0, least: float = 0.1) -> tf.Tensor:
    """The factor of the learning rate: linear warm-up, then a cosine down to `least` (Loshchilov and Hutter 2017)."""
    step = tf.cast(step, tf.float32)
    done = tf.clip_by_value((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    cosine = least + (1 - least) * 0.5 * (1 + tf.cos(math.pi * done))
    return tf.where(step < warmup, (step + 1) / max(warmup, 1), cosine)


@keras.saving.register_keras_serializable("gpt2_multi")
class CosineSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """`cosine_schedule` of a learning rate, for an optimizer; Keras' CosineDecay warms up otherwise, from step 0."""

    def __init__(self, learning_rate: float, steps: int, warmup: int = 0, least: float = 0.1) -> None:
        self.settings: dict[str, Any] = dict(learning_rate=learning_rate, steps=steps, warmup=warmup, least=least)

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        learning_rate, *shape = self.settings.values()
        return learning_rate * cosine_schedule(step, *shape)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same schedule from."""
        return dict(self.settings)
