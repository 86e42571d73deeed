"""Linen's stock layers with the table's initial values."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax import Array, lax
from jax.sharding import PartitionSpec

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table

ROW_AXES = ("data", "fsdp")  # of a mesh, over which the rows of a batch are cut


def by_rows(x: Array, others: Any = None) -> Array:
    """x (B, ...) with its rows cut over the axes data and fsdp of the mesh that `jax.set_mesh` has set, if any.

    Without it the compiler would rather gather the activations of all rows than the parameters that FSDP cuts. `others`
    is what the other dimensions are: whole, or `PartitionSpec.UNCONSTRAINED`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ROW_AXES if axis in mesh.axis_names)
    if not axes or len(x) % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(axes, *[others] * (x.ndim - 1)))


def input_names(module: Any) -> list[str]:
    """What a module may be called with, by its `__call__` and those that it overrides."""
    calls = [vars(cls)["__call__"] for cls in type(module).__mro__ if "__call__" in vars(cls)]
    return [name for call in calls for name in getattr(call, "__annotations__", ()) if name != "return"]


def deviation(config: GPT2Config, path: str, head: str = "base") -> float:
    """The standard deviation that the table gives the tensor at the end of this path."""
    return next(w.std for w in table(config, head) if w.std and f".{w.path}".endswith(f".{path}"))


def initialiser(config: GPT2Config, path: str, head: str = "base") -> Any:
    """The first values of a tensor; the table is looked up when they are made."""

    def first(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
        return deviation(config, path, head) * jax.random.normal(key, shape, dtype)

    return first


def dense(
    owner: Any, features: int | tuple[int, ...], name: str, axis: Any = -1, head: str = "base", use_bias: bool = True
) -> nn.DenseGeneral:
    """A dense layer of a module that has `config`, `dtype` and `param_dtype`.

    Its kernel is (in, out), each with the table's named axes unflattened, so that heads can be sharded: c_attn's is
    (E, 3, H, D), c_proj's (H, D, E).
    """
    path = f"{owner.name}.{name}" if head == "base" else name
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        kernel_init=initialiser(owner.config, path, head),
        name=name,
    )


def embed(owner: Any, rows: int, name: str) -> nn.Embed:
    """An embedding (rows, E)."""
    return nn.Embed(
        rows,
        owner.config.n_embd,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        embedding_init=initialiser(owner.config, name),
        name=name,
    )


def norm(owner: Any, name: str) -> nn.LayerNorm:
    """A layer norm (Ba et al. 2016), with the variance from the deviations: the fast formula cancels."""
    return nn.LayerNorm(
        epsilon=owner.config.layer_norm_epsilon,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        use_fast_variance=False,
        name=name,
    )
