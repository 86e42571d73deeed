"""Keras' stock layers as GPT-2 uses them, with their variables made at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, TypeVar

import keras
import optree
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model.checkpoint.quantized import GREATEST, LEAST, UNIFORM, Quantized, scale_shape
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.inputs import Facts
from gpt2_multi.model.spelling import KERAS
from gpt2_multi.model.weights import Weight


def projection(
    config: GPT2Config, inputs: int, outputs: int, name: str, policy: keras.DTypePolicy, **options: Any
) -> Any:
    """A product of the blocks, or the head: in int8 where the configuration says so, else `dense` with its options."""
    if config.quantization is None:
        return dense(inputs, outputs, name, policy, **options)
    return QuantizedLinear(inputs, outputs, options.get("use_bias", True), name=name, dtype=policy)


def dense(
    inputs: int, outputs: int, name: str, policy: keras.DTypePolicy, use_bias: bool = True, rank: int = 3
) -> keras.layers.Dense:
    """A Dense layer of tensors of this rank, with its variables; the table gives them their values."""
    layer = keras.layers.Dense(outputs, use_bias=use_bias, kernel_initializer="zeros", name=name, dtype=policy)
    layer.build((None,) * (rank - 1) + (inputs,))
    return layer


def embedding(config: GPT2Config, name: str, policy: keras.DTypePolicy) -> Any:
    """The embedding of tokens, with its variables: in int8 where the configuration says so."""
    shape = config.vocab_size, config.n_embd
    if config.quantization is not None:
        return QuantizedEmbedding(*shape, name=name, dtype=policy)
    layer = keras.layers.ReversibleEmbedding(*shape, embeddings_initializer="zeros", name=name, dtype=policy)
    layer.build((None, None))
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
    if layer.quantization_mode is not None or isinstance(layer, QuantizedEmbedding):
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
    name = f"_{leaf}" if f"_{leaf}" in vars(layer) else leaf  # where Keras keeps it
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


def integers(weight: Weight) -> Quantized:
    """First integers of a row, each as likely, with their scales."""
    values = keras.random.randint(weight.shape, -GREATEST, GREATEST + 1, "int32")
    return Quantized(tf.cast(values, tf.int8), tf.fill(scale_shape(weight), weight.std / UNIFORM))


def variables_of(layer: Any) -> tuple[Any, Any]:
    """The integers of a layer, (out, in), and their scales."""
    if isinstance(layer, QuantizedEmbedding):
        return layer.embeddings, layer.embeddings_scale
    return layer.kernel, layer.kernel_scale


def assign_quantized(layer: Any, weight: Weight, found: Quantized) -> None:
    """Give a layer the integers of its row, in the table's layout, and their scales."""
    values, scale = variables_of(layer)
    values.assign(tf.transpose(found.values) if weight.kind == "kernel" else found.values)
    scale.assign(found.scale)


def quantized_of(layer: Any, weight: Weight) -> Quantized:
    """The integers of a layer, in the table's layout, and their scales."""
    values, scale = (tf.convert_to_tensor(variable).numpy() for variable in variables_of(layer))
    return Quantized(values.T if weight.kind == "kernel" else values, scale)


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


_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let a replica compute without the others: a mean is over its own labels, and nothing waits for them."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def replicas() -> int:
    """How many replicas run this code: 1 without a strategy, and `alone`."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None or _alone.get() else int(context.num_replicas_in_sync)


def over_replicas(part: tf.Tensor) -> tf.Tensor:
    """A number summed over all replicas, () -> ()."""
    if replicas() == 1:
        return part
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, part)


def mean(total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """A sum over a count, both over all replicas; 0 where nothing counts."""
    return total / tf.maximum(over_replicas(count), 1)


by_xla: ContextVar[bool] = ContextVar("by_xla", default=False)  # whether what is traced now is compiled by XLA


def traced_for_xla(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that says so while it is traced."""

    def traced(*args: Any, **given: Any) -> Any:
        token = by_xla.set(True)
        try:
            return function(*args, **given)
        finally:
            by_xla.reset(token)

    return traced


def quantize_rows(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The integers from -127 to 127 that the numbers of each row (..., K) are nearest to, as floats, and its scale."""
    scale = tf.maximum(tf.reduce_max(tf.abs(x), -1, keepdims=True) / GREATEST, tf.constant(LEAST, x.dtype))
    return tf.round(x / scale), scale


@tf.custom_gradient
def product(x: tf.Tensor, kernel: tf.Tensor, kernel_scale: tf.Tensor) -> tuple[tf.Tensor, Callable[[Any], Any]]:
    """x (R, K) in at least float32, each row rounded, by integers (N, K) with their scales (N,): (R, N)

    Only XLA multiplies integers quickly: two rows and more, so that one gets a second. Elsewhere they are multiplied as
    floats. A gradient goes through as if nothing were rounded; integers and their scales have none.
    """
    rows, scale = quantize_rows(x)
    if by_xla.get():
        several = tf.pad(rows, [(0, 1), (0, 0)]) if rows.shape[0] == 1 else rows
        y = tf.matmul(tf.cast(several, tf.int8), kernel, transpose_b=True, output_type=tf.int32)
        y = tf.cast(y[: sizes(rows)[0]], x.dtype)
    else:
        y = tf.matmul(rows, tf.cast(kernel, x.dtype), transpose_b=True)

    def slope(dy: tf.Tensor) -> tuple[tf.Tensor, None, None]:
        return tf.matmul(dy, tf.cast(kernel, dy.dtype) * tf.cast(kernel_scale, dy.dtype)[:, None]), None, None

    return y * tf.cast(kernel_scale, x.dtype) * scale, slope


def multiplied(x: tf.Tensor, kernel: Any, kernel_scale: Any) -> tf.Tensor:
    """`product` of x (..., K), in float32 at least: (..., N)"""
    wide = x if x.dtype.size >= 4 else tf.cast(x, tf.float32)
    rows = tf.reshape(wide, (-1, kernel.shape[1]))
    y = product(rows, tf.convert_to_tensor(kernel), tf.convert_to_tensor(kernel_scale))
    return tf.reshape(y, (*sizes(x)[:-1], kernel.shape[0]))


class QuantizedLinear(keras.layers.Layer):
    """A dense layer whose kernel is in int8, (out, in), with a scale for each output; what it takes is rounded alike.

    Keras' own int8 layers keep kernels as (in, out), by which XLA multiplies integers less than half as fast.
    """

    def __init__(self, inputs: int, outputs: int, use_bias: bool, **options: Any) -> None:
        super().__init__(autocast=False, **options)
        self.units = outputs
        self.kernel, self.kernel_scale = add_integers(self, "kernel", outputs, inputs)
        self.bias = self.add_weight(name="bias", shape=(outputs,), initializer="zeros") if use_bias else None
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        y = multiplied(tf.cast(x, self.compute_dtype), self.kernel, self.kernel_scale)
        return tf.cast(y if self.bias is None else y + tf.cast(self.bias, y.dtype), self.compute_dtype)


class QuantizedEmbedding(keras.layers.Layer):
    """An embedding whose rows are in int8, each with a scale; a tied head is of the same integers."""

    def __init__(self, input_dim: int, output_dim: int, **options: Any) -> None:
        super().__init__(autocast=False, **options)
        self.input_dim, self.output_dim = input_dim, output_dim
        self.embeddings, self.embeddings_scale = add_integers(self, "embeddings", input_dim, output_dim)
        self.built = True

    def call(self, ids: tf.Tensor) -> tf.Tensor:
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        rows, scale = (tf.gather(tf.convert_to_tensor(x), ids) for x in (self.embeddings, self.embeddings_scale))
        return tf.cast(tf.cast(rows, wide) * tf.cast(scale, wide)[..., None], self.compute_dtype)

    def attend(self, x: tf.Tensor) -> tf.Tensor:
        """The tied head: (..., E) -> (..., V)"""
        return tf.cast(multiplied(x, self.embeddings, self.embeddings_scale), x.dtype)


def add_integers(layer: keras.layers.Layer, name: str, outputs: int, inputs: int) -> tuple[Any, Any]:
    """Variables of a layer in int8, (out, in), and in float32, whatever else is stored in, for their scales."""
    given = {"trainable": False, "autocast": False}
    values = layer.add_weight(name=name, shape=(outputs, inputs), dtype="int8", initializer="zeros", **given)
    scale = layer.add_weight(name=f"{name}_scale", shape=(outputs,), dtype="float32", initializer="ones", **given)
    return values, scale
