"""`model.export`: Keras' own, of a model that was never called, was called or was fitted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf


class Tensors(keras.Model):
    """What is exported of a model: a call whose outputs are tensors by their names, as a signature wants them."""

    def __init__(self, model: Any) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.built = True

    def __call__(self, *inputs: Any, training: bool = False) -> Any:
        """What the model gives but for its cache; hidden states and attentions are stacked, (layers, ...)."""
        given = self.model(*inputs, return_dict=True, training=training)
        if not isinstance(given, Mapping):  # of a class of a caller's own
            return given
        outputs = {name: value for name, value in given.items() if name != "past_key_values"}
        return {name: tf.stack(value) if isinstance(value, tuple) else value for name, value in outputs.items()}


def export(
    self: Any, filepath: str | os.PathLike[str], format: str = "tf_saved_model", verbose: bool | None = None,
    input_signature: Any = None, **options: Any,
) -> None:  # fmt: skip
    """Keras' own: a SavedModel whose `serve` takes what the model takes and gives its logits, or another format.

    Without an `input_signature` it takes {"input_ids", "attention_mask"}, int32 of any size: (B, T), or (B, C, T) of
    the double heads. Caches are left out. `export_saved_model` writes what generates texts.
    """
    if input_signature is None:
        shape = self._build_shapes_dict["input_shape"]
        names = ("input_ids", "attention_mask")
        input_signature = [{name: tf.TensorSpec(shape, tf.int32, name) for name in names}]
    keras.Model.export(Tensors(self), filepath, format, verbose, input_signature, **options)
