"""Keras' stock layers as GPT-2 uses them, with their variables made at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import keras
import optree
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.inputs import Facts
from gpt2_multi.model.spelling import KERAS
from gpt2_multi.model.weights import Weight


def dense(
    inputs: int, outputs: int, name: str, policy: keras.DTypePolicy, use_bias: bool = True, rank: int = 3
) -> keras.layers.Dense:
    """A Dense layer of tensors of this rank, with its variables; the table gives them their values."""
    layer = keras.layers.Dense(outputs, use_bias=use_bias, kernel_initializer="zeros", name=name, dtype=policy)
    layer.build((None,) * (rank - 1) + (inputs,))
    return layer


def dropout(rate: float, width: int, name: str, policy: keras.DTypePolicy) -> keras.layers.Dropout:
    """Dropout of hidden states (B, T, width)."""
    layer = keras.layers.Dropout(rate, name=name, dtype=policy)
    layer.build((None, None, width))
    return layer


def made(layer: keras.layers.Layer, *shape: int | None) -> None:
    """Say that a layer has its variables, and of which inputs `summary` speaks; Keras' `build` would also lock it."""
    layer.built, layer._build_shapes_dict = True, {"input_shape": shape}


def norm(config: GPT2Config, name: str, policy: keras.DTypePolicy) -> keras.layers.LayerNormalization:
    """A layer norm (Ba et al. 2016) with its variables."""
    layer = keras.layers.LayerNormalization(epsilon=config.layer_norm_epsilon, name=name, dtype=policy)
    layer.build((None, None, config.n_embd))
    return layer


def lookup(layer: keras.layers.Embedding, ids: tf.Tensor) -> tf.Tensor:
    """The rows of an embedding, (...) -> (..., E), with a dense gradient.

    Of a sparse one, Keras' Adam squares each slice before it adds up those of one row: v would be smaller than g ** 2.
    """
    if layer.quantization_mode is not None:
        return layer(ids)
    return tf.cast(tf.gather(with_dense_gradient(tf.convert_to_tensor(layer.embeddings)), ids), layer.compute_dtype)


def sizes(x: tf.Tensor) -> list[Any]:
    """The shape of a tensor: ints where they are known while tracing, tensors where they are not."""
    dynamic: Any = None if x.shape.is_fully_defined() else tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def known(value: Any) -> Any:
    """An int where a scalar's value is known already, the tensor while it is traced."""
    constant = tf.get_static_value(value)
    return value if constant is None else int(constant)


@tf.custom_gradient
def with_dense_gradient(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[Any], tf.Tensor]]:
    """The same tensor; slices of its gradient are added up."""
    return tf.identity(x), tf.convert_to_tensor


def replace_variable(layer: keras.layers.Layer, leaf: str, value: tf.Tensor) -> None:
    """Give a stock layer a variable of another shape in the place of the old one; a frozen one stays frozen."""
    name = leaf if leaf == "bias" else f"_{leaf}"  # where Keras keeps it
    old, variables = getattr(layer, name), layer._trainable_variables
    place = [variable is old for variable in variables].index(True)
    layer._tracker.unlock()
    delattr(layer, name)
    new = layer.add_weight(name=old.name, shape=value.shape, initializer="zeros")
    setattr(layer, name, new)
    variables.insert(place, variables.pop())  # `set_weights` goes by the order
    layer._tracker.lock()
    new.assign(value)
    new.trainable, new._path = old.trainable, old.path


def replace_layer(owner: keras.layers.Layer, name: str, layer: keras.layers.Layer | None) -> None:
    """Give a built layer another part in the place of the old one, or none; what has none yet gets it as its last."""
    old, layers = getattr(owner, name, None), owner._layers
    place = next((at for at, each in enumerate(layers) if each is old), len(layers))
    owner._tracker.unlock()
    if old is not None:
        delattr(owner, name)
        del layers[place]  # which Keras forgets
    if layer is not None:
        setattr(owner, name, layer)
        layers.insert(place, layers.pop())  # `set_weights` goes by the order
    owner._tracker.lock()


_Class = TypeVar("_Class", bound=type)


def register(cls: _Class) -> _Class:
    """Let `tf.function`, `tf.while_loop` and Keras look into a dataclass; a field that is None does not count."""

    def parts(value: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        names = tuple(field.name for field in fields(cls) if getattr(value, field.name) is not None)
        return names, tuple(getattr(value, name) for name in names)

    def whole(names: Any, values: Any) -> Any:
        return cls(**dict(zip(names, values, strict=True)))

    if not issubclass(cls, dict):  # into which TensorFlow looks as into any dict
        cls.__tf_flatten__ = parts  # type: ignore[attr-defined]
        cls.__tf_unflatten__ = staticmethod(whole)  # type: ignore[attr-defined]
    optree.register_pytree_node(cls, lambda value: parts(value)[::-1], whole, namespace="keras")  # Keras' own
    return cls


def initial(weight: Weight, dtype: str) -> tf.Tensor:
    """A first value as the table says, in Keras' layout."""
    shape = KERAS.shape(weight)
    if weight.std:
        return keras.random.normal(shape, stddev=weight.std, dtype=dtype)
    return tf.fill(shape, tf.constant(weight.constant, dtype))


def facts(name: str, x: Any) -> Facts:
    """What is known of an input: while a function is traced, its rank and the sizes that are not None."""
    if not tf.is_tensor(x):
        raise InputError(f"{name}: expected a tensor, found {type(x).__name__}; use tf.convert_to_tensor")
    if x.shape.rank is None:
        raise InputError(f"{name}: found a tensor whose rank is not known while tracing; tell it with tf.ensure_shape")
    kinds = {tf.int64: "integers", tf.int32: "integers", tf.string: "strings"}
    kind = "floats" if x.dtype.is_floating else kinds.get(x.dtype, "others")
    return Facts(tuple(x.shape), x.dtype.name, kind, lambda: x.numpy() if is_concrete(x) else None)


def is_concrete(x: Any) -> bool:
    """Whether a tensor has values already."""
    return bool(hasattr(x, "numpy")) and tf.executing_eagerly()


def replicas() -> int:
    """How many replicas run this code: 1 without a strategy."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def over_replicas(part: tf.Tensor) -> tf.Tensor:
    """A number summed over all replicas, () -> ()."""
    if replicas() == 1:
        return part
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, part)


def mean(total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """A sum over a count, both over all replicas; 0 where nothing counts."""
    return total / tf.maximum(over_replicas(count), 1)
