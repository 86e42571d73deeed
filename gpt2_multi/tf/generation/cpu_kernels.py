"""Products of one row with the kernels of a decode loop, on all threads of a CPU.

XLA multiplies one row by a kernel on a single thread, which does not read as fast as memory gives. Several products at
once it spreads over the threads: so a kernel is read as parts, each with some of the inputs, and what they make is
added up. Nothing is copied. More parts than there are threads are quicker still: a token of GPT-2 124M takes two
threads 12.9 ms in two parts, and 10.6 in eight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import tensorflow as tf

MOST = 8  # parts of a kernel, however many threads there are
_CALL = keras.layers.Dense.call  # another one that takes its place is nothing of ours


@contextmanager
def multiplied_in_parts(*models: keras.Model | None) -> Iterator[None]:
    """The context in which plain dense layers of these models multiply a row by all parts of a kernel at once."""
    layers = [layer for model in models if model is not None for layer in model._flatten_layers() if is_plain(layer)]
    layers = layers if are_worthwhile() else []
    for layer in layers:
        vars(layer)["call"] = partial(multiply, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)  # of one that two models share, or two threads compile, it may be gone


def are_worthwhile() -> bool:
    """Whether there are no other devices than a CPU, and threads for several parts."""
    return threads() > 1 and all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


def is_plain(layer: keras.layers.Layer) -> bool:
    """Whether a layer does what Keras' dense one does, and no more."""
    is_dense = type(layer) is keras.layers.Dense and keras.layers.Dense.call is _CALL
    return is_dense and layer.quantization_mode is None and "call" not in vars(layer)


def threads() -> int:
    """How many threads an operation may have."""
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1


def multiply(layer: keras.layers.Dense, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
    """What Keras' `Dense.call` makes of x (..., K)."""
    width = x.shape[-1]
    parts = next(count for count in range(MOST, 0, -1) if width % count == 0)
    is_wide = x.dtype.size >= 4  # others would be rounded once for each part
    if x.shape.num_elements() != width or parts == 1 or not is_wide:
        return _CALL(layer, x, training)
    kernel = tf.reshape(tf.convert_to_tensor(layer.kernel), (parts, width // parts, -1))
    products = tf.matmul(tf.reshape(x, (parts, 1, -1)), kernel)  # (parts, 1, N)
    y: Any = tf.reshape(tf.reduce_sum(products, 0), (*x.shape[:-1], -1))
    y = y if layer.bias is None else y + tf.convert_to_tensor(layer.bias)
    return y if layer.activation is None else layer.activation(y)
