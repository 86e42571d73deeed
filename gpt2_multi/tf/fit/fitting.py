"""What `compile`, `fit`, `evaluate` and `predict` do: methods of every model, which Keras calls.

Labels are among the inputs (x={"input_ids": ids, "labels": ids}) or are y: an array, or a mapping or a list where a
head has several. Without a compiled loss, the model's own counts: labels are shifted, -100 and padding left out, and
the mean is over a batch's labels. The loss of an epoch is Keras' mean of its batches, weighted by their rows.

A compiled loss and the metrics see labels as they are given, and logits: nothing is shifted, nothing left out, so shift
the labels yourself and use SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100). Where a head has several
labels, they see mappings under the labels' names: compile(loss={"labels": ..., "mc_labels": ...}). Sample weights need
a compiled loss, and its shape: (B, T) for a language model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import Output
from gpt2_multi.tf.fit.arguments import as_keywords
from gpt2_multi.tf.fit.strategy import LossOverReplicas
from gpt2_multi.tf.layers import replicas


@functools.wraps(keras.Model.compile, assigned=())
def compile(self: Any, *args: Any, **options: Any) -> None:
    """Keras' own, which otherwise would keep the loss and the metrics of an earlier `compile`."""
    self._compile_loss = self._compile_metrics = self.loss = None
    keras.Model.compile(self, *args, **options)
    check_moments(self.optimizer, self.variable_dtype)
    if self._compile_loss is None:
        self.__dict__["_loss_tracker"] = LossOverReplicas(name="loss")  # as an attribute it would be listed twice


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
    """A batch of `fit` as (inputs, labels, sample weights); with no loss compiled, the labels are inputs too."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = as_keywords(type(model), (x,), {"return_dict": True})
    labels = {name: inputs.pop(name) for name in model.label_names if name in inputs}
    labels |= named(model, y)
    if model._compile_loss is None:
        if weight is not None:
            raise InputError(
                "sample_weight, class_weight: the model's own loss is a mean over labels; compile a loss to weight it"
            )
        inputs |= labels
    return inputs, labels if len(model.label_names) > 1 else next(iter(labels.values()), y), weight


def named(model: Any, y: Any) -> dict[str, Any]:
    """`fit`'s y by the labels' names: an array is the first of them, a list is in their order."""
    if y is None:
        return {}
    if isinstance(y, Mapping):
        inputs.check_names(f"y of {type(model).__name__}", list(y), model.label_names)
        return dict(y)
    parts = y if isinstance(y, (list, tuple)) else [y]
    return dict(zip(model.label_names, parts, strict=False))


def train_step(self: Any, data: Any) -> dict[str, Any]:
    """One update: Keras' own, on what `labelled` made of the batch."""
    return keras.Model.train_step(self, labelled(self, data))


def test_step(self: Any, data: Any) -> dict[str, Any]:
    """One batch of `evaluate`."""
    return keras.Model.test_step(self, labelled(self, data))


def predict_step(self: Any, data: Any) -> dict[str, Any]:
    """One batch of `predict`: the outputs without labels, losses and caches, which do not add up over batches."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    inputs = as_keywords(type(self), (x,), {"return_dict": True})
    output = self({name: value for name, value in inputs.items() if name not in self.label_names}, training=False)
    return {name: value for name, value in output.items() if name != "past_key_values"}


@functools.wraps(keras.Model.predict, assigned=())
def predict(self: Any, *args: Any, **options: Any) -> Output:
    """Keras' own; the batches' outputs in one, as NumPy arrays."""
    return self.output_class(**keras.Model.predict(self, *args, **options))


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
        return keras.Model.compute_loss(self, x, y, logits_of(self, y, y_pred), sample_weight, training)
    own = [y_pred[name] for name in ("loss", "mc_loss") if name in y_pred]
    if not own:
        raise InputError(f"{type(self).__name__}: {what_fit_needs(self.label_names)}")
    return tf.add_n([*own, *(tf.cast(loss, own[0].dtype) / replicas() for loss in self.losses)])


def what_fit_needs(names: tuple[str, ...]) -> str:
    """What is missing where a model gave no loss, in one sentence."""
    if not names:
        return "the bare model has no loss of its own; compile one, or use a class with a head"
    example = ", ".join(f"'{name}': {name}" for name in ("input_ids", *names))
    return f"fit and evaluate need {' and '.join(names)}, in x={{{example}}} or as y, or a compiled loss"


def compute_metrics(self: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
    """Keras' metrics, which see labels and logits."""
    return keras.Model.compute_metrics(self, x, y, logits_of(self, y, y_pred), sample_weight)


def logits_of(model: Any, y: Any, output: Any) -> Any:
    """What a loss or a metric sees of an output: its logits, by the names of their labels where there are several."""
    if len(model.logit_names) == 1:
        return output[model.logit_names[0]]
    pairs = zip(model.label_names, model.logit_names, strict=True)
    return {label: output[logit] for label, logit in pairs if label in y}
