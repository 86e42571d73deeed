"""The compiled functions of a model, made anew where the model is another than it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.request import NO_CALLBACKS
from gpt2_multi.tf.generation.decoding import Prompt, begin, decode, decode_in_place, prefill
from gpt2_multi.tf.generation.lookup import Assisted
from gpt2_multi.tf.layers import traced_for_xla

PACKAGE = __name__.partition(".")[0] + "."
OTHERS = {  # attributes of a model that no step reads: Keras' of training, and what each call hands over anew
    "compiled", "generation_config", "history", "loss", "optimizer", "predict_function", "stop_evaluating",
    "stop_predicting", "stop_training", "test_function", "train_function",
}  # fmt: skip
KEPT = 4  # sets of a model's functions with what callers bring: another one takes the oldest one's place


@dataclass(frozen=True)
class Decoders:
    """The functions that a model generates with, compiled, and what they were compiled of."""

    prefill: Any
    begin: Any
    decode: Any
    parts: Sequence[Any]
    callbacks: Callbacks  # which a strategy has to hold: others that are equal would be traced anew
    is_plain: bool  # whether nothing of a caller's is in them
    kept: dict[str, Any] = field(default_factory=dict)  # what others have compiled of the model

    @classmethod
    def of(
        cls, model: keras.Model, jit: bool = True, callbacks: Callbacks = NO_CALLBACKS, assistant: Any = None
    ) -> Decoders:
        """Those of a model as it is now, by XLA or as graphs; and of what else is compiled into the loop."""
        parts = [part for each in (model, assistant) if each is not None for part in parts_of(each)]
        kept = model.__dict__.setdefault("_decoders", {})  # Keras would look into an attribute
        is_plain = callbacks == NO_CALLBACKS and assistant is None
        found: Decoders | None = kept.pop((jit, callbacks, id(assistant)), None)
        if found is None or not are_same(found.parts, parts):
            reading = compiled(partial(prefill, model), jit) if is_plain else cls.of(model, jit).prefill
            going = decode_in_place if jit and has_own_attention(model, assistant) else decode
            starting, going = (compiled(partial(function, model), jit) for function in (begin, going))
            found = cls(reading, starting, going, parts, callbacks, is_plain)
        kept[jit, found.callbacks, id(assistant)] = found  # as the latest one
        for key in [key for key, one in kept.items() if not one.is_plain][:-KEPT]:
            del kept[key]
        return found


def helper_of(strategy: Assisted, prompt: Prompt, jit: bool) -> tuple[Any, ...]:
    """What an assistant has read before it guesses."""
    types = () if prompt.types is None else (prompt.types,)
    alone = Prompt(prompt.ids, prompt.mask, None, None, prompt.number, prompt.unseen, *types)
    return *Decoders.of(strategy.assistant, jit).prefill(alone, strategy.room + strategy.guesses, 1), *types


def parts_of(model: keras.Model) -> list[Any]:
    """What a compiled function holds fast of a model: variables, layers, their settings, methods and dtypes.

    So quantization, LoRA, another layer, activation or setting, and another method of a class or of one layer are seen.
    """
    layers = list(model._flatten_layers())
    named = [pair for layer in layers for pair in vars(layer).items()]
    settings = [value for name, value in named if name[0] != "_" and name not in OTHERS]
    classes = dict.fromkeys(cls for layer in layers for cls in type(layer).__mro__)
    methods = [value for cls in classes for value in vars(cls).values() if callable(value) or type(value) is property]
    policies = [layer.dtype_policy for layer in layers]
    return [*model.weights, *layers, *settings, *methods, *policies, repr(model.config)]


def are_same(kept: Sequence[Any], parts: Sequence[Any]) -> bool:
    """Whether these are the same objects; of configurations, which are changed in place, the same texts."""
    return list(map(id, kept[:-1])) == list(map(id, parts[:-1])) and kept[-1:] == parts[-1:]


def has_own_attention(*models: keras.Model | None) -> bool:
    """Whether nobody but our own code looks into a cache."""
    found = [(model, model.body()) for model in models if model is not None]
    return all(is_own(layer) for model, body in found for layer in (model, body, *body.h, *body.attentions()))


def is_own(layer: keras.layers.Layer) -> bool:
    """Whether all methods of ours are what we wrote, in a layer of ours: in itself, its class and any subclass."""
    own = [vars(cls) for cls in type(layer).__mro__ if cls.__module__.startswith(PACKAGE)]
    names = [name for each in own for name, value in each.items() if callable(value) and name[:2] != "__"]
    found = [vars(layer).get(name, getattr(type(layer), name)) for name in (*names, "__call__")]
    modules = [getattr(value, "__globals__", {}).get("__name__", "") for value in found if type(value) is not type]
    return bool(own) and all(module.startswith((PACKAGE, "keras.")) for module in modules)  # Keras wraps a few


def compiled(function: Callable[..., Any], jit: bool) -> Any:
    """A function compiled by XLA for each shape, or as a graph for many."""
    function = traced_for_xla(function) if jit else function
    made = tf.function(function, jit_compile=jit, autograph=False, reduce_retracing=not jit)
    made._omit_frequent_tracing_warning = True  # five buckets in a row are no mistake
    return made
