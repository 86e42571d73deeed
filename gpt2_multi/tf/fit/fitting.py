"""What `compile`, `fit`, `evaluate` and `predict` do: methods of every model, which Keras calls.

Labels are among the inputs (x={"input_ids": ids, "labels": ids}) or are y: an array, or a mapping or a list where a
head has several. Without a compiled loss, the model's own counts: labels are shifted, -100 and padding left out, and
the mean is over a batch's labels. The loss of an epoch is Keras' mean of its batches, weighted by their rows. Metrics
and weights see the labels that the loss counts: see `gpt2_multi.tf.fit.metrics`.

A compiled loss is Keras': it and the metrics see labels as they are given, and logits. Nothing is shifted, nothing left
out, so shift the labels yourself and use SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100). Where a
head has several labels, losses and metrics are mappings under the labels' names, compile(loss={"labels": ...,
"mc_labels": ...}), or lists in their order; what the model gives besides logits has None in a list, or nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.quantized import check_trained
from gpt2_multi.model.outputs import Output
from gpt2_multi.tf.fit import metrics
from gpt2_multi.tf.fit.arguments import as_keywords, by_labels, plain
from gpt2_multi.tf.fit.metrics import Perplexity
from gpt2_multi.tf.fit.strategy import LossOverReplicas, is_on_hosts
from gpt2_multi.tf.layers import replicas
from gpt2_multi.tf.training import cross_entropy

OWN_LOSS = ("passthrough", "auto_with_warning")  # as transformers' `compile` asks for it


@functools.wraps(keras.Model.compile, assigned=())
def compile(self: Any, *args: Any, **options: Any) -> None:
    """Keras' own, which otherwise would keep the loss and the metrics of an earlier `compile`."""
    given = inspect.signature(keras.Model.compile).bind(self, *args, **options).arguments
    given.update(wanted(self, given))
    self._compile_loss = self._compile_metrics = self.loss = None
    keras.Model.compile(**given)
    check_moments(self.optimizer, self.variable_dtype)
    if self._compile_loss is None:
        self.__dict__["_loss_tracker"] = LossOverReplicas(name="loss")  # as an attribute it would be listed twice


def wanted(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The losses and the metrics that `compile` was given, by the names of labels where a head has several."""
    loss = None if isinstance(given.get("loss"), str) and given["loss"] in OWN_LOSS else given.get("loss")
    found = {"loss": understood("loss", by_label(model, "loss", loss))}
    if given.get("loss_weights") is not None:
        found["loss_weights"] = by_label(model, "loss_weights", given["loss_weights"])
        if found["loss"] is None:
            raise InputError("loss_weights: weigh compiled losses; compile a loss for each of them, or leave it out")
    for name in ("metrics", "weighted_metrics"):
        if given.get(name) is not None:
            several = given[name] if isinstance(given[name], (list, tuple, Mapping)) else [given[name]]
            found[name] = understood(name, by_label(model, name, several))
            if found[name] is not None and not isinstance(found[name], (list, dict)):
                found[name] = [found[name]]
    if found["loss"] is None and given.get("jit_compile", "auto") == "auto":
        leaves = keras.tree.flatten([found.get("metrics"), found.get("weighted_metrics")])
        found |= {} if all(map(metrics.weighs, leaves)) else {"jit_compile": False}
    return found


def by_label(model: Any, argument: str, given: Any) -> Any:
    """What `compile` gives for each output, by the names of labels; for the one that a head has, alone."""
    names = model.label_names or model.logit_names
    if isinstance(given, Mapping):
        label = dict(zip((*model.logit_names, *names), names * 2, strict=True))
        there = {name: each for name, each in given.items() if each is not None}
        inputs.check_names(f"{argument} of {type(model).__name__}", list(there), list(label), "output")
        found = {label[name]: each for name, each in there.items()}
    elif isinstance(given, (list, tuple)) and not is_flat(model, argument, given):
        found = {name: each for name, each in zip(names, given, strict=False) if each is not None}
        more = argument != "loss_weights" and any(each is not None for each in given[len(names) :])
        if more or len(given) < len(names):
            raise InputError(
                f"{argument}: expected an entry for each of {', '.join(names)}, found {len(given)}; "
                f"give a mapping of them, and None for what else {type(model).__name__} returns"
            )
    else:
        return given
    return found if len(names) > 1 else next(iter(found.values()), None)


def is_flat(model: Any, argument: str, given: Sequence[Any]) -> bool:
    """Whether a list has metrics of the one output that there is, and not an entry for each output."""
    nested = any(isinstance(each, (list, tuple)) for each in given)
    return not given or ("metrics" in argument and len(model.label_names) < 2 and not nested)


def understood(argument: str, given: Any) -> Any:
    """Losses or metrics that are given by a name, if the name alone would mean another thing of logits."""
    if isinstance(given, dict):
        return {name: understood(argument, each) for name, each in given.items()}
    if isinstance(given, (list, tuple)):
        return [understood(argument, each) for each in given if each is not None]
    if isinstance(given, str):
        return of_logits(argument, given)
    options = getattr(given, "_fn_kwargs", {"from_logits": getattr(given, "_from_logits", None)})
    made = inspect.isfunction(given) or inspect.isclass(given)
    if made and given.__module__.startswith("keras.") and "from_logits" in inspect.signature(given).parameters:
        options = {"from_logits": False}
    if options.get("from_logits") is False:
        name = getattr(given, "name", None) or given.__name__
        raise InputError(f"{argument}: {name} expects probabilities, but the model gives logits; say from_logits=True")
    return given


def of_logits(argument: str, name: str) -> Any:
    """A loss or a metric by its name; of what it is, logits or probabilities, a name says nothing."""
    if argument != "loss" and name.lower() in ("perplexity", "auc"):
        return Perplexity(name) if name.lower() == "perplexity" else keras.metrics.AUC(from_logits=True, name=name)
    full = "sparse_categorical_crossentropy" if name.lower() in ("ce", "crossentropy") else name
    room = keras.losses if argument == "loss" else keras.metrics
    kind: Any = getattr(room, full.title().replace("_", "") if "_" in full else full, None)
    return name if kind is None or "crossentropy" not in full.lower() else kind(from_logits=True, name=name)


def check_moments(optimizer: Any, dtype: str) -> None:
    """Keras' Adam rounds its decay rates to the variables' dtype; one that becomes 1 there makes every step zero."""
    beta = getattr(optimizer, "beta_2", None)
    if beta is not None and float(tf.cast(beta, dtype)) == 1.0:
        raise InputError(
            f"{optimizer.name}: beta_2 {beta} is 1 in {dtype}, so nothing would be learnt; store float32 and compute "
            f'in {dtype} (dtype="mixed_{dtype}"), or give a smaller beta_2'
        )


def compile_from_config(self: Any, config: dict[str, Any]) -> None:
    """Compile as a .keras file says, with the variables that the optimizer's state is read into."""
    self.compile(**keras.saving.deserialize_keras_object(config))
    if self.optimizer is not None:
        self.optimizer.build(self.trainable_variables)


def build_compiled(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
    """Under a strategy, make what `compile` named before the replicas run, from a first batch, or one replica's part.

    Keras' own averages the replicas' parts, which makes fractions of ids and fails where the parts differ in size.
    """
    strategy = self._distribute_strategy
    if strategy is not None and iterator is not None:
        _, _, batches = next(iter(iterator))
        data_batch = keras.tree.map_structure(lambda x: strategy.experimental_local_results(x)[0], next(batches))
    if strategy is not None and not all(part.built for part in (self._compile_loss, self._compile_metrics) if part):
        with strategy.scope(), keras.StatelessScope():
            self.test_step(data_batch)
    keras.Model._maybe_symbolic_build(self, data_batch=data_batch)


def labelled(model: Any, data: Any) -> tuple[dict[str, Any], Any, Any]:
    """A batch of `fit` as (inputs, labels, sample weights); labels are inputs too where the model computes its loss."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = as_keywords(type(model), (x,), {"return_dict": True})
    labels = {name: inputs.pop(name) for name in model.label_names if name in inputs}
    labels |= named(model, y)
    if isinstance(weight, (list, tuple)):
        weight = dict(zip(model.label_names, weight, strict=False))
    if isinstance(weight, Mapping):
        weight = by_labels(model, "sample_weight", weight)
        weight = weight if len(model.label_names) > 1 else next(iter(weight.values()), None)
    if model._compile_loss is None and weight is None:
        inputs |= labels | skipped(model, labels)
    return inputs, labels if len(model.label_names) > 1 else next(iter(labels.values()), y), weight


def skipped(model: Any, labels: Mapping[str, Any]) -> dict[str, bool]:
    """Whether metrics read the logits of a language model, as far as no code but our own does."""
    names = ("call", "__call__", "compute_loss", "compute_metrics")
    is_own = all(metrics.is_known(getattr(type(model), name)) and name not in vars(model) for name in names)
    if model.head not in ("lm", "double_heads") or "labels" not in labels or not is_own:
        return {}
    return {"skip_logits": model._compile_metrics is None}


def named(model: Any, y: Any) -> dict[str, Any]:
    """`fit`'s y by the labels' names: an array is the first of them, a list is in their order."""
    if y is None:
        return {}
    if isinstance(y, Mapping):
        return by_labels(model, f"y of {type(model).__name__}", y)
    parts = y if isinstance(y, (list, tuple)) else [y]
    return dict(zip(model.label_names, parts, strict=False))


def train_step(self: Any, data: Any) -> dict[str, Any]:
    """One update: Keras' own, on what `labelled` made of the batch."""
    is_frozen = self.config.quantization is not None and not self.trainable_variables
    check_trained(not is_frozen, 'call quantize("int8") and enable_lora(rank) of a model in floats')
    return reducible(self, keras.Model.train_step(self, labelled(self, data)))


def test_step(self: Any, data: Any) -> dict[str, Any]:
    """One batch of `evaluate`."""
    return reducible(self, keras.Model.test_step(self, labelled(self, data)))


def reducible(model: Any, logs: dict[str, Any]) -> dict[str, Any]:
    """What a step reports; of several hosts as arrays (1,), since Keras takes the mean along a first axis there."""
    return {name: value[None] for name, value in logs.items()} if is_on_hosts(model._distribute_strategy) else logs


def predict_step(self: Any, data: Any) -> dict[str, Any]:
    """One batch of `predict`: the outputs without labels, losses and caches, which do not add up over batches."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    inputs = as_keywords(type(self), (x,), {"return_dict": True})
    output = self({name: value for name, value in inputs.items() if name not in self.label_names}, training=False)
    return {name: value for name, value in output.items() if name != "past_key_values"}


@functools.wraps(keras.Model.predict, assigned=())
def predict(self: Any, *args: Any, **options: Any) -> Output:
    """Keras' own; the batches' outputs in one, as NumPy arrays."""
    given = inspect.signature(keras.Model.predict).bind(self, *args, **options).arguments
    return self.output_class(**keras.Model.predict(**{**given, "x": plain(given["x"])}))


@functools.wraps(keras.Model.predict_on_batch, assigned=())
def predict_on_batch(self: Any, x: Any) -> Output:
    """Keras' own; the output holds NumPy arrays."""
    return self.output_class(**keras.Model.predict_on_batch(self, x))


def compute_loss(
    self: Any,
    x: Any = None,
    y: Any = None,
    y_pred: Any = None,
    sample_weight: Any = None,
    training: bool = True,
) -> tf.Tensor:
    """The compiled loss of labels and logits, or the model's own, and what layers added."""
    if self._compile_loss is not None:
        logits = logits_of(self, y, y_pred)
        return keras.Model.compute_loss(self, x, y, logits, metrics.beside(logits, sample_weight), training)
    own = [y_pred[name] for name in ("loss", "mc_loss") if name in y_pred]
    if sample_weight is not None and has_labels(self, y):
        labels = metrics.targets(self, x, y, y_pred)
        own = [metrics.weighted_loss(self, labels, metrics.weights_of(self, labels, sample_weight), y_pred)]
    if not own:
        raise InputError(f"{type(self).__name__}: {what_fit_needs(self.label_names)}")
    return tf.add_n([*own, *(tf.cast(loss, own[0].dtype) / replicas() for loss in self.losses)])


def has_labels(model: Any, y: Any) -> bool:
    """Whether there are labels enough for the model's own loss."""
    return len(y) == 2 if model.head == "question_answering" else y is not None and not (isinstance(y, dict) and not y)


def hf_compute_loss(self: Any, labels: Any, logits: Any) -> tf.Tensor:
    """The loss of labels and logits under transformers' name: of tokens their mean, (1,), of texts that of each, (B,).

    Nothing is shifted here, as there; -100 does not count. `model(ids, labels=labels).loss` shifts.
    """

    def each(labels: Any, logits: Any) -> tf.Tensor:  # Keras makes floats of the labels that it gives a loss
        return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(labels, tf.int64), logits)

    if self.head in ("lm", "token_classification"):
        return tf.reshape(cross_entropy(logits, tf.cast(labels, tf.int64)), [1])
    if self.head == "question_answering":
        start, end = (labels.get(f"{place}_position", labels.get(f"{place}_positions")) for place in ("start", "end"))
        return (each(start, logits[0]) + each(end, logits[1])) / 2
    if self.head != "sequence_classification":
        raise InputError(f"hf_compute_loss: {type(self).__name__} has none; take the losses of model(...)")
    if logits.shape[-1] == 1:
        return tf.square(tf.reshape(logits, [-1]) - tf.cast(tf.reshape(labels, [-1]), logits.dtype))
    return each(labels, logits)


def what_fit_needs(names: tuple[str, ...]) -> str:
    """What is missing where a model gave no loss, in one sentence."""
    if not names:
        return "the bare model has no loss of its own; compile one, or use a class with a head"
    example = ", ".join(f"'{name}': {name}" for name in ("input_ids", *names))
    return f"fit and evaluate need {' and '.join(names)}, in x={{{example}}} or as y, or a compiled loss"


def compute_metrics(self: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
    """Keras' metrics, which see labels and logits: with the model's own loss, those that it counts."""
    if self._compile_metrics is None:
        return keras.Model.compute_metrics(self, x, y, y_pred, sample_weight)
    logits = logits_of(self, y, y_pred)
    if self._compile_loss is not None:
        sample_weight = metrics.beside(logits, sample_weight)
    else:
        labels = metrics.targets(self, x, y, y_pred)
        weights = None if sample_weight is None else metrics.weights_of(self, labels, sample_weight)
        y = of_head(self, labels)
        if isinstance(y, dict) or not y.dtype.is_floating:  # of numbers as labels Keras weighs rows
            sample_weight = of_head(self, weights)
        metrics.count(self._compile_metrics, y, logits, self.jit_compile)
    return keras.Model.compute_metrics(self, x, y, logits, sample_weight)


def of_head(model: Any, by_name: Any) -> Any:
    """What is given by the names of labels, alone where a head has one kind."""
    return by_name[model.label_names[0]] if by_name is not None and len(model.label_names) == 1 else by_name


def logits_of(model: Any, y: Any, output: Any) -> Any:
    """What a loss or a metric sees of an output: its logits, by the names of their labels where there are several."""
    if len(model.logit_names) == 1:
        return output[model.logit_names[0]]
    pairs = zip(model.label_names, model.logit_names, strict=True)
    return {label: output[logit] for label, logit in pairs if label in y}
