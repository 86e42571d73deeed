"""What metrics and weights see: the labels that a model's own loss counts, in the place where it counts them.

With the model's own loss a metric gets labels (N,) and logits (N, K), so that its mean is one over labels: shifted ones
for a language model, and none that is -100 or hidden by the mask. Keras' metrics get all of them, and weights of 0 for
those that do not count; a function or a class of another gets only those that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.tf.attention import upcast
from gpt2_multi.tf.layers import sizes
from gpt2_multi.tf.training import IGNORED, classification_loss, cross_entropy, shifted, within

Labels = dict[str, tf.Tensor]


@keras.saving.register_keras_serializable("gpt2_multi")
class Perplexity(keras.metrics.Mean):
    """exp of the mean loss of a token over all batches; logits, and labels of which `ignore_class` does not count.

    `compile(metrics=["perplexity"])` means it too.
    """

    def __init__(self, name: str = "perplexity", dtype: Any = None, ignore_class: int = IGNORED) -> None:
        super().__init__(name=name, dtype=dtype)
        self.ignore_class = ignore_class

    def update_state(self, y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: Any = None) -> None:
        """Labels (...), logits (..., V), and weights (...) or those of rows, (B,)."""
        labels, logits = tf.convert_to_tensor(y_true), upcast(tf.convert_to_tensor(y_pred))
        counted = labels != self.ignore_class
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(counted, labels, 0), logits)
        weights = tf.cast(counted, each.dtype)
        if sample_weight is not None:
            weights *= tf.cast(broadcast("sample_weight", sample_weight, labels), each.dtype)
        super().update_state(tf.reshape(each, [-1]), tf.reshape(weights, [-1]))

    def result(self) -> tf.Tensor:
        """The perplexity so far, ()."""
        return tf.exp(super().result())

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same metric from."""
        return {**super().get_config(), "ignore_class": self.ignore_class}


class Counted(keras.metrics.Metric):
    """A metric that sees the labels that count: those that are not -100."""

    def __init__(self, metric: keras.metrics.Metric) -> None:
        super().__init__(name=metric.name, dtype=metric.dtype)
        self.metric = metric
        self.weighs = weighs(metric)

    def update_state(self, y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor | None = None) -> None:
        """`targets` (...), logits (..., K), and weights (...)."""
        if y_true.dtype.is_floating:
            self.metric.update_state(y_true, y_pred, sample_weight)
            return
        labels, logits = tf.reshape(y_true, [-1]), tf.reshape(upcast(y_pred), [-1, sizes(y_pred)[-1]])  # (N,), (N, K)
        counted = labels != IGNORED
        weights = None if sample_weight is None else tf.reshape(sample_weight, [-1])
        if self.weighs:
            kept = tf.cast(counted, self.dtype)
            labels, weights = tf.where(counted, labels, 0), kept if weights is None else kept * weights
        else:
            labels, logits = tf.boolean_mask(labels, counted), tf.boolean_mask(logits, counted)
            weights = None if weights is None else tf.boolean_mask(weights, counted)
        self.metric.update_state(labels, logits, sample_weight=weights)

    def reset_state(self) -> None:
        """Forget what was seen."""
        self.metric.reset_state()

    def result(self) -> Any:
        """What the metric says."""
        return self.metric.result()


def weighs(metric: Any) -> bool:
    """Whether a metric is known to leave out what has a weight of 0: Keras' own, of a function of Keras; a name is."""
    if not isinstance(metric, keras.metrics.Metric):
        return not callable(metric) or is_known(metric)
    return is_known(type(metric).update_state) and is_known(getattr(metric, "_fn", metric.update_state))


def is_known(source: Any) -> bool:
    """Whether a function or a class is Keras', or of this library."""
    return source.__module__.split(".")[0] in ("keras", "gpt2_multi")


def count(metrics: Any, y: Any, logits: Any, is_xla: bool) -> None:
    """Let the metrics of a `compile` see what counts, when their first labels and logits are known."""
    if metrics.built:
        return
    for given in (metrics._user_metrics, metrics._user_weighted_metrics):
        check_labelled(given, y)
    if not isinstance(y, Mapping) and y.dtype.is_floating and y.shape[-1] == logits.shape[-1] > 1:
        metrics._user_metrics = of_several(metrics._user_metrics)
        metrics._user_weighted_metrics = of_several(metrics._user_weighted_metrics)
    metrics.build(y, logits)
    for each in filter(None, (*metrics._flat_metrics, *metrics._flat_weighted_metrics)):
        each.metrics = [Counted(metric) for metric in each.metrics]
        for counted in each.metrics:
            if is_xla and not counted.weighs:  # XLA takes the most that could count for what does
                raise InputError(
                    f"metrics: {counted.name} sees the labels that count, and XLA asks how many they are before it "
                    "knows them; compile with jit_compile=False, or take a metric of Keras"
                )


def of_several(given: Any) -> Any:
    """Metrics of several labels a text that are given by a name: a label is chosen by a logit above 0, not 0.5."""
    kinds: dict[Any, Any] = {"precision": keras.metrics.Precision, "recall": keras.metrics.Recall}
    kinds |= dict.fromkeys(("accuracy", "acc", "binary_accuracy"), keras.metrics.BinaryAccuracy)

    def of_logits(each: Any) -> Any:
        kind = kinds.get(each.lower()) if isinstance(each, str) else None
        threshold = "threshold" if kind is keras.metrics.BinaryAccuracy else "thresholds"
        return kind(name=each, **{threshold: 0.0}) if kind else each

    return keras.tree.map_structure(of_logits, given)


def check_labelled(given: Any, y: Any) -> None:
    """Metrics need their labels: Keras would let those of labels that are missing see others."""
    if isinstance(given, Mapping) and not set(given) <= set(y):
        raise InputError(
            f"metrics: expected {', '.join(given)}, found {', '.join(y)}; give the labels too, or leave out the metrics"
        )


def targets(model: Any, x: Mapping[str, Any], y: Any, output: Mapping[str, Any]) -> Labels:
    """What the logits of each position have to predict, by the names of labels: -100 where no label counts.

    y: labels, or a mapping of them where the model has several kinds.
    """
    labels = y if isinstance(y, Mapping) else {model.label_names[0]: y}
    return {name: _target(model, name, tf.convert_to_tensor(each), x, output) for name, each in labels.items()}


def _target(model: Any, name: str, labels: tf.Tensor, x: Mapping[str, Any], output: Mapping[str, Any]) -> tf.Tensor:
    if model.head == "question_answering":
        return within(output[model.logit_names[model.label_names.index(name)]], labels)
    if model.head == "sequence_classification":
        kind = model.config.problem_type or ("regression" if output["logits"].shape[-1] == 1 else None)
        are_classes = kind in (None, "single_label_classification")
        return labels if are_classes or labels.dtype.is_floating else tf.cast(labels, keras.config.floatx())
    if name == "mc_labels":
        return labels
    mask = x.get("attention_mask")
    if mask is not None:  # one of rank 4 says nothing about labels, and one of more columns has those of a past
        mask = tf.convert_to_tensor(mask)
        mask = mask[..., -sizes(labels)[-1] :] if mask.shape.rank == labels.shape.rank else None
    if is_shifted(model, name):
        return shifted(labels, mask)
    return labels if mask is None else tf.where(tf.cast(mask, tf.bool), labels, tf.constant(IGNORED, labels.dtype))


def is_shifted(model: Any, name: str) -> bool:
    """Whether labels are those of the tokens that follow."""
    return name == "labels" and model.head in ("lm", "double_heads")


def weights_of(model: Any, labels: Labels, given: Any) -> Labels:
    """Sample weights in the shape and the place of `targets`, by their names: a weight belongs to its label.

    given: weights (B,) of rows or (...) of labels for all names, or a mapping of them.
    """
    if isinstance(given, Mapping):
        inputs.check_names("sample_weight", list(given), model.label_names)
    else:
        given = dict.fromkeys(labels, given)
    found = {}
    for name, each in labels.items():
        weight = tf.ones(tf.shape(each)) if given.get(name) is None else broadcast("sample_weight", given[name], each)
        found[name] = tf.roll(weight, -1, -1) if is_shifted(model, name) else weight
    return found


def broadcast(name: str, weight: Any, labels: tf.Tensor) -> tf.Tensor:
    """Weights of rows, (B,), or of labels, (...), in the shape of labels (...)."""
    weight = tf.cast(weight, keras.config.floatx())
    shape = tuple(labels.shape)[: weight.shape.rank or len(labels.shape)]
    found = tuple(size if one == 1 else one for one, size in zip(weight.shape, shape, strict=False))
    inputs.check_shape(name, found if len(weight.shape) <= len(shape) else tuple(weight.shape), shape)
    return tf.broadcast_to(tf.reshape(weight, [*sizes(weight), *[1] * (len(labels.shape) - len(shape))]), sizes(labels))


def beside(logits: Any, weight: Any) -> Any:
    """Weights of rows, (B,), as Keras can multiply losses of labels by them, (B, 1): it takes them as they are."""
    if isinstance(logits, Mapping):
        each = weight if isinstance(weight, Mapping) else dict.fromkeys(logits, weight)
        return None if weight is None else {name: beside(x, each.get(name)) for name, x in logits.items()}
    labels = len(logits.shape) - 1
    return tf.reshape(weight, [-1, *[1] * (labels - 1)]) if weight is not None and len(weight.shape) == 1 else weight


def weighted_loss(model: Any, labels: Labels, weights: Labels, output: Mapping[str, Any]) -> tf.Tensor:
    """The model's own loss with weights, (): the sum of weighted losses over how many labels count."""
    if type(model).call.__module__.split(".")[0] != "gpt2_multi":
        raise InputError(
            f"sample_weight, class_weight: how {type(model).__name__} computes its loss is its own; compile a loss to "
            "weight it"
        )
    if model.head == "sequence_classification":
        return classification_loss(output["logits"], labels["labels"], model.config.problem_type, weights["labels"])
    logits = dict(zip(model.label_names, model.logit_names, strict=True))
    losses = [cross_entropy(output[logits[name]], each, weight=weights[name]) for name, each in labels.items()]
    return tf.add_n(losses) / (2 if model.head == "question_answering" else 1)
