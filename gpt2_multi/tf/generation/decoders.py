"""The compiled functions of a model, made anew where the model is another than it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.tf.generation.decoding import decode, prefill


@dataclass(frozen=True)
class Decoders:
    """The functions that a model generates with, compiled, and what they were compiled of."""

    prefill: Any
    decode: Any
    parts: Sequence[Any]

    @classmethod
    def of(cls, model: keras.Model, jit: bool = True) -> Decoders:
        """Those of a model as it is now, by XLA or as graphs."""
        kept, parts = model.__dict__.setdefault("_decoders", {}), parts_of(model)  # Keras would look into an attribute
        if jit not in kept or list(map(id, kept[jit].parts)) != list(map(id, parts)):
            kept[jit] = cls(compiled(partial(prefill, model), jit), compiled(partial(decode, model), jit), parts)
        found: Decoders = kept[jit]
        return found


def parts_of(model: keras.Model) -> list[Any]:
    """What a compiled function holds fast of a model: variables, layers, what each of them computes and in which dtype.

    So quantization, LoRA, another layer, and another `call` of a class or of one layer are seen.
    """
    layers = list(model._flatten_layers())
    calls = [part for layer in layers for part in (type(layer).__call__, type(layer).call, vars(layer).get("call"))]
    return [*model.weights, *layers, *calls, *(layer.dtype_policy for layer in layers)]


def compiled(function: Callable[..., Any], jit: bool) -> Any:
    """A function compiled by XLA for each shape, or as a graph for many."""
    made = tf.function(function, jit_compile=jit, autograph=False, reduce_retracing=not jit)
    made._omit_frequent_tracing_warning = True  # five buckets in a row are no mistake
    return made
