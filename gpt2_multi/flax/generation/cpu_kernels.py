"""Products of a few rows with the kernels of a decode loop, in the order that XLA is quick at on a CPU.

For `x @ kernel` XLA packs all of the kernel anew at every token. For `kernel.T @ x.T` it packs the few rows, but reads
kernels that are (in, out) against their order: so they are transposed once, before the loop, and take their memory
twice while it runs. At 4 and 8 rows a loop of GPT-2 124M makes 10 to 18 % more tokens so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict
from jax import Array, lax

from gpt2_multi.flax.layers import are_stock
from gpt2_multi.flax.parameters.tree import Tree

Kernels = Mapping[str, Array]  # (out, in) each, by the path of its layer
ROWS = range(2, 33)  # one row needs no packing, and many are worth it
LEAST = 16  # tokens to come, above which it is worth the time to transpose


def are_worthwhile(model: Any, rows: int, room: int) -> bool:
    """Whether a loop over so many rows and tokens is quicker so, and reads no other kernels than its parameters'."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    alone = alone and are_stock() and model.config.quantization is None  # integers are (out, in) as they are
    return alone and model.is_plain and not model.scan_layers and rows in ROWS and room > LEAST


def transposed(params: Tree) -> Kernels:
    """Each dense kernel as (out, in); those of `layers.dense` may have several axes of each."""
    flat, kernels = flatten_dict(params), {}
    for path, kernel in flat.items():
        if path[-1] == "kernel":
            bias = flat.get((*path[:-1], "bias"))
            width = kernel.shape[-1] if bias is None else bias.size
            kernels["/".join(path[:-1])] = lax.optimization_barrier(kernel.reshape(-1, width).T)
    return kernels


def multiplied_first(kernels: Kernels) -> AbstractContextManager[None]:
    """The context in which dense layers and the tied head multiply by these, if there are any."""
    return nn.intercept_methods(partial(kernel_first, kernels)) if kernels else nullcontext()


def kernel_first(kernels: Kernels, call: Callable[..., Any], args: Any, options: Any, context: Any) -> Any:
    """Linen's interceptor: dense layers and the tied head by `product`."""
    layer = context.module
    if type(layer) is nn.DenseGeneral and context.method_name == "__call__":
        features = (layer.features,) if isinstance(layer.features, int) else layer.features
        axes = 1 if isinstance(layer.axis, int) else len(layer.axis)
        bias: Any = layer.get_variable("params", "bias")
        x, kernel, bias = promote_dtype(args[0], kernels["/".join(layer.path)], bias, dtype=layer.dtype)
        x = product(x.reshape(*x.shape[: x.ndim - axes], -1), kernel)
        x = x.reshape(*x.shape[:-1], *features)
        return x if bias is None else x + bias.reshape(*[1] * (x.ndim - bias.ndim), *features)
    if type(layer) is nn.Embed and context.method_name == "attend":
        return product(*promote_dtype(args[0], layer.embedding, dtype=layer.dtype))
    return call(*args, **options)


def product(x: Array, kernel: Array) -> Array:
    """x @ kernel.T, computed as (kernel @ x.T).T: (..., K) and (N, K) -> (..., N)"""
    rows = x.reshape(math.prod(x.shape[:-1]), -1)
    columns = lax.optimization_barrier(kernel @ rows.T)  # otherwise XLA would swap them back
    return columns.T.reshape(*x.shape[:-1], -1)
