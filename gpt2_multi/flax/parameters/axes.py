"""Meshes of explicit axes, which `jax.make_mesh` makes by default: there each operation has to say how its result lies.

What this library computes leaves that to the compiler. It computes under automatic axes of the same mesh, and what it
gives lies on the caller's mesh again, with its rows cut as the rows of the ids are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_multi.errors import InputError
from gpt2_multi.flax.layers import is_concrete

NO_ROWS = -1  # in place of a dimension
INPUTS = 5  # of transformers' modules, before their flags
FLAGS = ("deterministic", "init_cache", "output_attentions", "output_hidden_states", "return_dict")
REFUSED = {
    "init_cache": (False, "give past_key_values what the model's init_cache(batch_size, max_length) returns"),
    "return_dict": (True, "call to_tuple() of what it returns"),
}


def explicit_mesh(*trees: Any) -> Any:
    """The abstract mesh that has an explicit axis: that of `jax.set_mesh`, or of an array in these trees; or None."""
    arrays = (x for x in leaves_of(trees) if isinstance(x, Array))
    meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def leaves_of(tree: Any) -> list[Any]:
    """What a tree of arguments holds."""
    return jax.tree.leaves(tree, is_leaf=is_table)


def is_table(value: Any) -> bool:
    """Whether it is an option such as `logit_bias`: its keys, ids and tuples, have no order, as a tree's must have."""
    return isinstance(value, dict) and not all(isinstance(key, str) for key in value)


@nn.nowrap
def apply(self: nn.Module, variables: Any, *args: Any, **given: Any) -> Any:
    """Linen's `apply`, under any axes of a mesh, with the arguments of transformers' modules too: see `as_ours`."""
    args, given = as_ours(args, given)
    sources = (*args, given.get("input_ids"), given.get("inputs_embeds"))
    source = next((x for x in sources if x is not None), None)
    return automatic(partial(nn.Module.apply, self), source, variables, *args, **given)


@nn.nowrap
def init(self: nn.Module, rngs: Any, *args: Any, return_dict: Any = None, **given: Any) -> Any:
    """Linen's `init`, in the same way; it gives variables alone, whatever a call would return."""
    return nn.Module.init(self, rngs, *args, **given)


@nn.nowrap
def init_with_output(self: nn.Module, rngs: Any, *args: Any, **given: Any) -> Any:
    """Linen's `init_with_output`, which `init` calls, in the same way; variables of a traced call are whole."""
    args, given = as_ours(args, given)
    return automatic(partial(nn.Module.init_with_output, self), None, rngs, *args, **given)


def as_ours(args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that may have been written for transformers' modules: `deterministic` is not `train`.

    Their flags stand by name, or in order after the first five inputs, where ours take a cache, which no flag is.
    Raises InputError for a flag that asks for what our modules do otherwise.
    """
    if len(args) > INPUTS and isinstance(args[INPUTS], bool) and given.get("method") is None:
        given, args = dict(zip(FLAGS, args[INPUTS:], strict=False)) | given, args[:INPUTS]
    for name, (usual, instead) in REFUSED.items():
        if given.pop(name, usual) is not usual:
            raise InputError(f"{name}: expected {usual} of a module, found another; {instead}")
    if "deterministic" in given:
        train = not given.pop("deterministic")
        if given.setdefault("train", train) is not train:
            raise InputError(f"deterministic: expected the opposite of train, found both {not train}; leave one out")
    return args, given


def under_any_axes(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method with an argument `params` be called under any axes of a mesh; its first argument has the rows."""

    @wraps(method)
    def called(self: Any, *args: Any, params: Any = None, **given: Any) -> Any:
        params = self._params if params is None else params
        return automatic(partial(method, self), next(iter(args), None), *args, params=params, **given)

    return called


def automatic(call: Callable[..., Any], source: Any, *args: Any, **given: Any) -> Any:
    """What a function gives for these arguments, computed under automatic axes; rows are those of `source` (B, ...)."""
    mesh = explicit_mesh(args, given)
    if mesh is None:
        return call(*args, **given)
    if all(map(is_concrete, leaves_of((args, given)))):
        return _computed(call, args, given)
    return _traced(call, mesh, source, args, given)


def _computed(call: Callable[..., Any], args: Any, given: Any) -> Any:
    """The same for arrays with values, which change their mesh without being moved."""
    mesh = mesh_of((args, given)) or jax.device_put(0, PartitionSpec()).sharding.mesh  # of the context
    args, given = on_automatic_axes((args, given))
    with jax.set_mesh(twin(mesh)):
        output = call(*args, **given)
    return _each(output, mesh) if isinstance(output, Iterator) else moved(output, mesh)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of explicit axes that an array with values lies on, if any does."""
    found = (getattr(x.sharding, "mesh", None) for x in leaves_of(tree) if isinstance(x, Array))
    return next((mesh for mesh in found if mesh is not None and AxisType.Explicit in mesh.axis_types), None)


def twin(mesh: Mesh) -> Mesh:
    """The same mesh, whose axes are automatic."""
    return Mesh(mesh.devices, mesh.axis_names)


def on_automatic_axes(tree: Any) -> Any:
    """A tree of arrays with values, under automatic axes."""
    mesh = mesh_of(tree)
    return tree if mesh is None else moved(tree, twin(mesh))


def _each(made: Iterator[Any], mesh: Mesh) -> Iterator[Any]:
    """One after the other; the caller's own mesh is set in between."""
    end = object()
    while True:
        with jax.set_mesh(twin(mesh)):
            found = next(made, end)
        if found is end:
            return
        yield moved(found, mesh)


def moved(tree: Any, mesh: Mesh) -> Any:
    """The arrays of a tree that lie on a mesh of the same devices, as arrays on this one, which shares their memory."""

    def one(x: Any) -> Any:
        old = x.sharding if isinstance(x, Array) and is_concrete(x) else None
        if not isinstance(old, NamedSharding) or old.mesh == mesh or not np.array_equal(old.mesh.devices, mesh.devices):
            return x
        return jax.device_put(x, NamedSharding(mesh, old.spec, memory_kind=old.memory_kind))

    return jax.tree.map(one, tree, is_leaf=is_table)


def _traced(call: Callable[..., Any], mesh: Any, source: Any, args: Any, given: Any) -> Any:
    """The same while another function is traced; there it has to be said how the outputs lie."""
    leaves, tree = jax.tree.flatten((args, given), is_leaf=is_table)
    arrays = {place: x for place, x in enumerate(leaves) if isinstance(x, (Array, np.ndarray))}
    rows = jax.typeof(source).sharding.spec[0] if isinstance(source, Array) and source.ndim else None
    structure: list[Any] = []

    def inside(arrays: dict[int, Any]) -> dict[int, list[Any]]:
        args, given = jax.tree.unflatten(tree, [arrays.get(place, x) for place, x in enumerate(leaves)])
        output, whole = jax.tree.flatten(call(*args, **given))
        dims = [NO_ROWS if rows is None else row_dim(x.shape, len(source)) for x in output]
        structure[:] = whole, dims
        return {dim: [x for x, own in zip(output, dims, strict=True) if own == dim] for dim in specs}

    specs = {NO_ROWS: PartitionSpec(), 0: PartitionSpec(rows), 1: PartitionSpec(None, rows)}
    out = {dim: NamedSharding(mesh, spec) for dim, spec in specs.items()}
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    groups = jax.jit(jax.sharding.auto_axes(inside, axes=axes, out_sharding=out))(arrays)
    whole, dims = structure
    each = {dim: iter(group) for dim, group in groups.items()}
    return jax.tree.unflatten(whole, [next(each[dim]) for dim in dims])


def row_dim(shape: tuple[int, ...], rows: int) -> int:
    """Which dimension of an output has so many rows, or each several times: of stacked layers (n_layer, B, ...)."""
    if shape and shape[0] % rows == 0:
        return 0
    return 1 if len(shape) == 5 and shape[1] == rows else NO_ROWS
