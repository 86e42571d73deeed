"""Losses, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.tf.attention import upcast
from gpt2_multi.tf.layers import facts, mean, sizes

IGNORED = -100
CHUNK = 2**27, 2**30  # bytes of logits at a time, on a CPU and elsewhere; each costs a sum of gradients (V, E)


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


def head_loss(
    hidden: tf.Tensor,
    weight: tf.Tensor,
    labels: tf.Tensor,
    mask: tf.Tensor | None = None,
    wanted: Sequence[bool] = (True, True),
    training: bool = True,
) -> tf.Tensor:
    """What `lm_loss` gives of the logits of a head, of (..., T, E) hidden states and its weight (V, E).

    The logits are computed a chunk of rows at a time, and in training with them those gradients of hidden states and
    weight that are wanted, so that they are never there as a whole. Others are computed when they are asked for.
    """
    inputs.check_labels(facts("labels", labels), (*hidden.shape[:-1], weight.shape[0]))
    targets = tf.reshape(shifted(labels, mask), [-1])
    total = total_loss(tf.reshape(hidden, [-1, hidden.shape[-1]]), weight, targets, wanted, training)
    return mean(total, tf.reduce_sum(tf.cast(targets != IGNORED, total.dtype)))


def total_loss(
    hidden: tf.Tensor, weight: tf.Tensor, targets: tf.Tensor, wanted: Sequence[bool], training: bool
) -> tf.Tensor:
    """The sum of -log p(target) over rows (N, E), targets (N,) -> (); of those -100 does not count."""

    @tf.custom_gradient
    def total(hidden: tf.Tensor, weight: tf.Tensor) -> Any:
        given = tf.stop_gradient(hidden), tf.stop_gradient(weight), targets  # or a tape would keep all chunks
        loss, *made = walk(*given, wanted if training else (False, False))

        def scaled(grad: tf.Tensor) -> Any:
            of_hidden, of_weight = made if training else walk(*given, wanted)[1:]
            of_hidden = walk(*given, (True, False))[1] if of_hidden is None else of_hidden
            of_weight = walk(*given, (False, True))[2] if of_weight is None else of_weight
            gradients = zip((of_hidden, of_weight), (hidden, weight), strict=True)
            return once(hidden, weight, *(tf.cast(grad * tf.cast(x, grad.dtype), y.dtype) for x, y in gradients))

        return loss, scaled

    return total(hidden, weight)


@tf.custom_gradient
def once(hidden: tf.Tensor, weight: tf.Tensor, of_hidden: tf.Tensor, of_weight: tf.Tensor) -> Any:
    """The gradients of a loss, which is not derived twice: TensorFlow would take them for constants."""

    def refuse(*_: tf.Tensor) -> None:
        raise InputError(
            "loss: it was computed in chunks, which have no second derivative in TensorFlow; call the model with "
            "skip_logits=False"
        )

    return (of_hidden, of_weight), refuse


def walk(hidden: tf.Tensor, weight: tf.Tensor, targets: tf.Tensor, wanted: Sequence[bool]) -> list[tf.Tensor | None]:
    """The sum that is `total_loss`, and its gradients of hidden states and weight, None where they are not wanted."""
    cast = tf.cast(weight, hidden.dtype)  # (V, E)
    count, kept = chunk_count(hidden, weight.shape[0]), tf.cast(targets != IGNORED, hidden.dtype)[:, None]
    rows = -(-sizes(hidden)[0] // count)
    room = [0, count * rows - sizes(hidden)[0]]  # chunks have one length
    x = tf.reshape(tf.pad(hidden * kept, [room, [0, 0]]), [count, rows, hidden.shape[-1]])
    t = tf.reshape(tf.pad(targets, [room], constant_values=IGNORED), [count, rows])
    wide = upcast(kept).dtype

    def one(i: tf.Tensor, total: tf.Tensor, of_hidden: Any, of_weight: Any) -> Any:
        part = tf.gather(x, i)
        loss, gradient = turn(upcast(tf.matmul(part, cast, transpose_b=True)), tf.gather(t, i))
        gradient = tf.cast(gradient, part.dtype)
        if wanted[0]:
            of_hidden = of_hidden.write(i, tf.matmul(gradient, cast))
        if wanted[1]:
            of_weight += tf.cast(tf.matmul(gradient, part, transpose_a=True), wide)
        return i + 1, total + loss, of_hidden, of_weight

    shape = None if tf.is_tensor(rows) else rows, hidden.shape[-1]
    of_hidden = tf.TensorArray(hidden.dtype, count, element_shape=shape) if wanted[0] else ()
    start = tf.constant(0), tf.zeros((), wide), of_hidden, tf.zeros(tf.shape(weight), wide) if wanted[1] else ()
    _, total, of_hidden, of_weight = tf.while_loop(lambda i, *_: i < count, one, start, parallel_iterations=1)
    if wanted[0]:
        of_hidden = tf.reshape(of_hidden.stack(), [-1, hidden.shape[-1]])[: sizes(hidden)[0]] * kept
    return [total, of_hidden if wanted[0] else None, of_weight if wanted[1] else None]


def turn(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The sum of the losses of a chunk, (N, V) and (N,) -> (), and its gradient of the logits of rows that count."""
    counted = targets != IGNORED
    each, gradient = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
        features=logits, labels=tf.where(counted, targets, 0)
    )
    return tf.reduce_sum(each * tf.cast(counted, each.dtype)), gradient


def chunk_count(hidden: tf.Tensor, words: int) -> Any:
    """In how many chunks (..., E) hidden states have logits (..., words); a tensor where sizes are not known."""
    room = CHUNK[bool(tf.config.list_logical_devices("GPU"))]
    most = max(1, room // (words * max(hidden.dtype.size, 4)))
    count = -(-math.prod(sizes(hidden)[:-1]) // most)
    return tf.maximum(count, 1) if tf.is_tensor(count) else max(count, 1)


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
