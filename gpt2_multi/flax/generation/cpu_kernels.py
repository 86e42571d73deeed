"""Products of a few rows with the kernels of a decode loop, in the order that XLA is quick at on a CPU.

For `x @ kernel` XLA packs all of the kernel anew at every token. For `kernel.T @ x.T` it packs the few rows, but reads
kernels that are (in, out) against their order: so they are turned once, before the loop, and take their memory twice
while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from gpt2_multi.flax.params import Tree

ROWS = range(2, 33)  # one row needs no packing, and many are worth it
LEAST = 16  # tokens to come, above which turning the kernels pays


def pays(module: Any, rows: int, room: int) -> bool:
    """Whether a loop over so many rows and tokens is quicker with turned kernels."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return alone and not module.scan_layers and rows in ROWS and room > LEAST


def turned(params: Any) -> Any:
    """The parameters with each dense kernel as (out, in); those of `layers.dense` may have several axes of each."""
    if not isinstance(params, Mapping):  # dict or FrozenDict
        return params
    tree = {name: turned(value) for name, value in params.items()}
    if "kernel" in params:
        kernel, bias = params["kernel"], params.get("bias")
        width = kernel.shape[-1] if bias is None else bias.size
        tree["kernel"] = lax.optimization_barrier(kernel.reshape(-1, width).T)
    return tree


def prepared(module: Any, params: Tree, rows: int, room: int) -> tuple[Tree, AbstractContextManager[Any]]:
    """The parameters for a loop, and the context in which the module takes them."""
    if pays(module, rows, room):
        return turned(params), nn.intercept_methods(kernel_first)
    return params, nullcontext()


def kernel_first(call: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
    """Linen's interceptor: dense layers and the tied head by `product`."""
    layer = context.module
    if isinstance(layer, nn.DenseGeneral) and context.method_name == "__call__":
        features = (layer.features,) if isinstance(layer.features, int) else layer.features
        axes = 1 if isinstance(layer.axis, int) else len(layer.axis)
        kernel: Any = layer.get_variable("params", "kernel")
        bias: Any = layer.get_variable("params", "bias")
        x, kernel, bias = promote_dtype(args[0], kernel, bias, dtype=layer.dtype)
        x = product(x.reshape(*x.shape[: x.ndim - axes], -1), kernel)
        x = x.reshape(*x.shape[:-1], *features)
        return x if bias is None else x + bias
    if isinstance(layer, nn.Embed) and context.method_name == "attend":
        return product(*promote_dtype(args[0], layer.embedding, dtype=layer.dtype))
    return call(*args, **options)


def product(x: Array, kernel: Array) -> Array:
    """x @ kernel.T, computed as (kernel @ x.T).T: (..., K) and (N, K) -> (..., N)"""
    rows = x.reshape(math.prod(x.shape[:-1]), -1)
    columns = lax.optimization_barrier(kernel @ rows.T)  # otherwise XLA would swap them back
    return columns.T.reshape(*x.shape[:-1], -1)
