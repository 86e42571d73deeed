"""The compiled functions of a model, made anew where the model is another than it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.request import NO_CALLBACKS
from gpt2_multi.tf.attention import Attention
from gpt2_multi.tf.generation.decoding import Prompt, begin, decode, decode_in_place, prefill
from gpt2_multi.tf.generation.lookup import Assisted
from gpt2_multi.tf.layers import traced_for_xla

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

    @classmethod
    def of(
        cls, model: keras.Model, jit: bool = True, callbacks: Callbacks = NO_CALLBACKS, assistant: Any = None
    ) -> Decoders:
        """Those of a model as it is now, by XLA or as graphs; and of what else is compiled into the loop."""
        parts = [part for each in (model, assistant) if each is not None for part in parts_of(each)]
        kept = model.__dict__.setdefault("_decoders", {})  # Keras would look into an attribute
        is_plain = callbacks == NO_CALLBACKS and assistant is None
        found: Decoders | None = kept.pop((jit, callbacks, id(assistant)), None)
        if found is None or list(map(id, found.parts)) != list(map(id, parts)):
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
    """What a compiled function holds fast of a model: variables, layers, what each of them computes and in which dtype.

    So quantization, LoRA, another layer, and another `call` of a class or of one layer are seen.
    """
    layers = list(model._flatten_layers())
    calls = [part for layer in layers for part in (type(layer).__call__, type(layer).call, vars(layer).get("call"))]
    return [*model.weights, *layers, *calls, *(layer.dtype_policy for layer in layers)]


def has_own_attention(*models: keras.Model | None) -> bool:
    """Whether nobody but our own code looks into a cache."""
    layers = [layer for model in models if model is not None for layer in model.body().attentions()]
    return all(type(layer) is Attention and "call" not in vars(layer) for layer in layers)


def compiled(function: Callable[..., Any], jit: bool) -> Any:
    """A function compiled by XLA for each shape, or as a graph for many."""
    function = traced_for_xla(function) if jit else function
    made = tf.function(function, jit_compile=jit, autograph=False, reduce_retracing=not jit)
    made._omit_frequent_tracing_warning = True  # five buckets in a row are no mistake
    return made
