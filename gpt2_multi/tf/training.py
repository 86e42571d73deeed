"""Losses, what `fit` does with labels, optimizer settings and the learning-rate schedule.

The steps and `compute_loss` are methods of every model: Keras calls them from `fit`, `evaluate` and `predict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gpt2_multi import limits
from gpt2_multi.errors import InputError
from gpt2_multi.tf.sharding import over_replicas

if TYPE_CHECKING:
    from gpt2_multi.tf.loading import TFGPT2PreTrainedModel

IGNORED = -100


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """The mean negative log-likelihood of the labels that count: (..., K) logits, (...) labels -> ().

    A label counts unless it is -100 or `mask` (...) is 0 there; where none counts the loss is 0. Under a strategy the
    mean is over the labels of all replicas.
    """
    check_labels(labels, logits)
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


def check_labels(labels: tf.Tensor, logits: tf.Tensor) -> None:
    """Labels (...) have to fit logits (..., K) in shape, and be classes or -100."""
    from gpt2_multi.tf.checks import check_integers, extremes, is_concrete, shape

    expected = logits.shape[:-1]
    limits.check_shape("labels", shape(labels, *expected), expected)
    check_integers("labels", labels)
    if is_concrete(labels):
        limits.check_labels(*extremes(labels), logits.shape[-1])


def lm_loss(logits: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Next-token cross-entropy: (..., T, V) logits, (..., T) labels, shifted here.

    A token that the mask hides neither is predicted nor predicts.
    """
    check_labels(labels, logits)
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
    check_fit(labels, logits)
    labels = tf.cast(labels, logits.dtype)
    if problem_type == "regression":
        each = tf.square(logits - labels)
    else:
        each = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return mean(tf.reduce_sum(each), tf.cast(tf.size(each), each.dtype))


def check_fit(labels: tf.Tensor, logits: tf.Tensor) -> None:
    """Labels that are numbers have to have the logits' shape."""
    from gpt2_multi.tf.checks import shape

    limits.check_shape("labels", shape(labels, *logits.shape), logits.shape)


def span_loss(start_logits: tf.Tensor, end_logits: tf.Tensor, start: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """The loss of extractive question answering: (B, T) logits, (B,) positions; those beyond the text do not count."""

    def one(logits: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        length = tf.cast(tf.shape(logits)[1], position.dtype)
        outside = (position < 0) | (position >= length)
        return cross_entropy(logits, tf.where(outside, tf.constant(IGNORED, position.dtype), position))

    return (one(start_logits, start) + one(end_logits, end)) / 2


def adamw(learning_rate: Any = 5e-5, weight_decay: float = 0.1, **options: Any) -> keras.optimizers.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices and embeddings, not biases and layer norms."""
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay, **options)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def cosine_schedule(
    learning_rate: float, steps: int, warmup: int = 0, least: float = 0.1
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up, then a cosine down to the fraction `least` (Loshchilov and Hutter 2017)."""
    return keras.optimizers.schedules.CosineDecay(
        learning_rate / max(warmup, 1) if warmup else learning_rate,
        max(steps - warmup, 1),
        alpha=least,
        warmup_target=learning_rate if warmup else None,
        warmup_steps=warmup,
    )


def labelled(model: TFGPT2PreTrainedModel, data: Any) -> tuple[dict[str, Any], Any, Any]:
    """A batch of `fit` as (inputs, labels, sample weights); with no loss compiled, the labels are inputs too."""
    from gpt2_multi.tf.loading import as_keywords

    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = as_keywords(type(model), (x,), {})
    given = {name: inputs.pop(name) for name in model.label_names if name in inputs}
    if y is not None:
        given |= dict(y) if isinstance(y, Mapping) else {model.label_names[0]: y}
    if model._compile_loss is None:
        check_trainable(given, weight)
        inputs |= given
    return inputs, given[model.label_names[0]] if len(given) == 1 else given, weight


def check_trainable(given: Mapping[str, Any], weight: Any) -> None:
    """The model's own loss needs labels, and has no use for weights."""
    if not given:
        raise InputError(
            "fit and evaluate need labels: in the inputs (x={'input_ids': ids, 'labels': ids}) or as y; "
            "the language model shifts them itself"
        )
    if weight is not None:
        raise InputError("sample_weight: the model's own loss is a mean over labels; compile a loss to weight samples")


def train_step(self: TFGPT2PreTrainedModel, data: Any) -> dict[str, Any]:
    """One update: Keras' own, on what `labelled` made of the batch."""
    return keras.Model.train_step(self, labelled(self, data))


def test_step(self: TFGPT2PreTrainedModel, data: Any) -> dict[str, Any]:
    """One batch of `evaluate`."""
    return keras.Model.test_step(self, labelled(self, data))


def predict_step(self: TFGPT2PreTrainedModel, data: Any) -> Any:
    """One batch of `predict`: the outputs without labels, losses and caches, which do not add up over batches."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    from gpt2_multi.tf.loading import as_keywords

    inputs = as_keywords(type(self), (x,), {})
    inputs = {name: value for name, value in inputs.items() if name not in self.label_names}
    output = self(**inputs, training=False, return_dict=True)
    return replace(output, past_key_values=None) if hasattr(output, "past_key_values") else output


def compute_loss(
    self: TFGPT2PreTrainedModel,
    x: Any = None,
    y: Any = None,
    y_pred: Any = None,
    sample_weight: Any = None,
    training: bool = True,
) -> tf.Tensor:
    """The compiled loss of labels and logits, or the model's own, and what layers added."""
    if self._compile_loss is not None:
        return keras.Model.compute_loss(self, x, y, logits_of(self, y_pred), sample_weight, training)
    return tf.add_n([y_pred.loss, *(tf.cast(loss, y_pred.loss.dtype) for loss in self.losses)])


def compute_metrics(
    self: TFGPT2PreTrainedModel, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
) -> dict[str, Any]:
    """Keras' metrics, which see labels and logits."""
    return keras.Model.compute_metrics(self, x, y, logits_of(self, y_pred), sample_weight)


def logits_of(model: TFGPT2PreTrainedModel, output: Any) -> Any:
    """What a loss or a metric sees of an output: the logits, or all of them by name where there are several."""
    logits = {name: output[name] for name in model.logit_names}
    return logits if len(logits) > 1 else next(iter(logits.values()))
