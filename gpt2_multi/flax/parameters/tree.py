"""The tree of parameters: which leaf each row of the table is, its shape there, its first value, how it is sharded.

A leaf is a row of the table with its named axes unflattened; with scanned layers, the rows of all layers stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gpt2_multi.errors import ConfigError, InputError
from gpt2_multi.flax.layers import integers, is_concrete
from gpt2_multi.model.checkpoint.quantized import SCALE, UNIFORM, Quantized, in_int8, scale_shape
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import FLAX
from gpt2_multi.model.weights import Weight, sizes, table

Path = tuple[str, ...]
Tree = dict[str, Any]
Read = Callable[[Weight], np.ndarray[Any, Any]]


class Leaf(NamedTuple):
    """A parameter of the tree: its rows of the table (several where layers are scanned), its named axes, sizes.

    `part` is "values" or "scale" where it holds that of rows in int8; such a kernel is (out, in), its axes in one.
    """

    rows: list[Weight]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    part: str = ""

    def dtype(self, param_dtype: Any) -> Any:
        """What it is stored in, where floats are stored in `param_dtype`."""
        return {"values": jnp.int8, "scale": jnp.float32}.get(self.part, param_dtype)

    @property
    def stacked(self) -> bool:
        """Whether the first dimension counts layers."""
        return self.axes[:1] == ("layer",)

    def value(self, read: Read, index: Any = ()) -> np.ndarray[Any, Any]:
        """The part of this leaf at an index; only what it touches is read."""
        if not self.stacked:
            return self._unflattened(read, self.rows[0])[index]
        layers, *rest = index or (slice(None),)
        return np.stack([self._unflattened(read, row)[tuple(rest)] for row in self.rows[layers]])

    def _unflattened(self, read: Read, row: Weight) -> np.ndarray[Any, Any]:
        found: Any = read(row)
        if self.part:
            found = _out_first(row, found.values) if self.part == "values" else found.scale
        else:
            found = FLAX.layout(row, found)
        return np.asarray(found).reshape(self.shape[1:] if self.stacked else self.shape)

    def row(self, value: Any, row: Weight) -> np.ndarray[Any, Any]:
        """One row of the table, in its layout, gathered from this leaf's value."""
        part = gathered(value[self.rows.index(row)] if self.stacked else value)
        if self.part:
            return _out_first(row, part) if self.part == "values" else part
        return FLAX.layout(row, part.reshape(FLAX.shape(row)))

    def spec(self, rules: Mapping[str, str | None]) -> PartitionSpec:
        """The mesh axis of each dimension under rules from named axes to mesh axes."""
        return PartitionSpec(*(rules.get(axis) for axis in self.axes))


def leaves(config: GPT2Config, head: str, scan_layers: bool) -> dict[Path, Leaf]:
    """Every leaf of the tree by its path."""
    if scan_layers and config.pruned_heads:
        raise ConfigError("scan_layers: layers with pruned heads differ in size and cannot be stacked; set it to False")
    found: dict[Path, Leaf] = {}
    for row in table(config, head):
        path, stacked = FLAX.spell(row, head != "base").split("."), scan_layers and row.path.startswith("h.")
        if stacked:
            path[path.index("h") + 1] = "layers"
        for end, leaf in _leaves(config, row, stacked).items():
            found.setdefault((*path[:-1], path[-1] + end), leaf).rows.append(row)
    return found


def _out_first(row: Weight, values: Any) -> Any:
    """Integers of a kernel as (out, in), or back; those of an embedding and of a head are so."""
    return values.T if row.kind == "kernel" else values


def _leaves(config: GPT2Config, row: Weight, stacked: bool) -> dict[str, Leaf]:
    """The leaves that a row has, by the end of their names: one, or integers and their scales."""
    if not in_int8(config, row):
        return {"": _leaf(config, row, stacked)}
    axes, before = ("layer",) if stacked else (), (config.n_layer,) if stacked else ()
    shape = row.shape[::-1] if row.kind == "kernel" else row.shape
    values = Leaf([], (*axes, "outputs", "inputs"), before + shape, "values")
    return {"": values, SCALE: Leaf([], (*axes, "outputs"), before + scale_shape(row), "scale")}


def _leaf(config: GPT2Config, row: Weight, stacked: bool) -> Leaf:
    size = sizes(config, int(row.path.split(".")[1]) if ".attn." in row.path else None)
    dims = row.axes[::-1] if row.kind in FLAX.transposed else row.axes
    axes = tuple(axis for dim in dims for axis in dim)
    shape = tuple(size[axis] for axis in axes)
    return Leaf([], ("layer", *axes), (config.n_layer, *shape)) if stacked else Leaf([], axes, shape)


def initial(config: GPT2Config, head: str, scan_layers: bool, key: Array, dtype: Any) -> Tree:
    """First values, as the table says; layers that are scanned get the values that they get alone."""
    order = {row.name: number for number, row in enumerate(table(config, head))}

    def first(row: Weight, shape: tuple[int, ...], part: str) -> Array:
        if part == "scale":
            return jnp.full(shape, row.std / UNIFORM, jnp.float32)
        if part:
            return integers(jax.random.fold_in(key, order[row.name]), shape, jnp.int8)
        if not row.std:
            return jnp.full(shape, row.constant, dtype)
        return normal(key, order[row.name], row.std, shape, dtype)

    def whole(leaf: Leaf) -> Array:
        if not leaf.stacked:
            return first(leaf.rows[0], leaf.shape, leaf.part)
        return jnp.stack([first(row, leaf.shape[1:], leaf.part) for row in leaf.rows])

    return unflatten_dict({path: whole(leaf) for path, leaf in leaves(config, head, scan_layers).items()})


@partial(jax.jit, static_argnums=(3, 4))
def normal(key: Array, number: Any, std: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """The first value of the tensor of this number: one compilation for each shape."""
    return jnp.asarray(std, dtype) * jax.random.normal(jax.random.fold_in(key, number), shape, dtype)


def placed(leaf: Leaf, read: Read, dtype: Any, sharding: NamedSharding | None) -> Array:
    """A leaf on its devices: each shard straight from where it is read, never the whole on one device of a mesh."""
    if sharding is None:
        return jnp.array(leaf.value(read), dtype)
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: np.asarray(leaf.value(read, index)).astype(dtype)
    )


def rows_of(params: Tree, config: GPT2Config, head: str, scan_layers: bool) -> dict[str, Callable[[], Any]]:
    """A function for each row of the table, by its name, that gathers it from the devices, in the table's layout.

    On several hosts every one has to call the same functions in the same order.
    """
    flat = flatten_dict(params)
    found, made = leaves(config, head, scan_layers), dict[str, Callable[[], Any]]()
    for path, leaf in found.items():
        for row in leaf.rows:
            made.setdefault(row.name, partial(leaf.row, flat[path], row))
            if leaf.part == "scale":
                made[row.name] = partial(_quantized, made[row.name], partial(leaf.row, flat[path], row))
    return made


def _quantized(values: Callable[[], Any], scale: Callable[[], Any]) -> Quantized:
    return Quantized(values(), scale())


def gathered(value: Any) -> np.ndarray[Any, Any]:
    """A whole array on this host, whichever devices of whichever hosts hold its parts."""
    if not isinstance(value, Array) or value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def check_tree(params: Tree, config: GPT2Config, head: str, scan_layers: bool) -> None:
    """A tree has to have the leaves of the configuration, each of its shape."""
    if not isinstance(params, (dict, FrozenDict)):
        raise InputError(f"params: expected a nested dict, found {type(params).__name__}; take model.params")
    found = {path: _shape(value) for path, value in flatten_dict(params).items()}
    wanted = {path: leaf.shape for path, leaf in leaves(config, head, scan_layers).items()}
    if found == wanted:
        return
    path = min((path for path in {*found, *wanted} if found.get(path) != wanted.get(path)), key=str)
    raise InputError(
        f"params: {'/'.join(map(str, path))} has shape {found.get(path, 'none, it is missing')}, expected "
        f"{wanted.get(path, 'no such parameter')}; take model.params, or what from_pretrained returned"
    )


def _shape(value: Any) -> Any:
    return tuple(value.shape) if hasattr(value, "dtype") else f"none, it is a {type(value).__name__}"


def dtypes_of(params: Tree, config: GPT2Config, head: str, scan_layers: bool) -> dict[str, np.dtype[Any]]:
    """What each row of the table, by its name, is stored in; the trees that `to_bf16` makes are of several dtypes."""
    flat = flatten_dict(params)
    found = leaves(config, head, scan_layers).items()
    return {row.name: np.dtype(flat[path].dtype) for path, leaf in found for row in leaf.rows if leaf.part != "scale"}


def check_alive(name: str, tree: Any) -> None:
    """JAX gives the memory of a donated argument to the function that it is donated to."""
    if any(isinstance(x, Array) and is_concrete(x) and x.is_deleted() for x in jax.tree.leaves(tree)):
        raise InputError(
            f"{name}: the memory was given away, to a function that arguments are donated to such as train_step; go on "
            "with what that returned, or give it a copy"
        )


def resized(value: Array, axes: tuple[str, ...], number: int, std: float | None, key: Array) -> Array:
    """A leaf with so many entries of the vocabulary, new ones the mean or random; one without a vocabulary stays."""
    if "vocab" not in axes:
        return value
    axis = axes.index("vocab")
    new = jnp.repeat(value.mean(axis, keepdims=True), max(number - value.shape[axis], 0), axis)
    new = new if std is None else std * jax.random.normal(key, new.shape, new.dtype)
    return jnp.concatenate([lax.slice_in_dim(value, 0, min(number, value.shape[axis]), axis=axis), new], axis)


def pruned(value: Array, leaf: Leaf, kept: list[list[int]]) -> Array:
    """A leaf with those heads alone whose places are kept, of each layer; one without heads that can go stays."""
    _, *path = leaf.rows[0].path.split(".")
    if path[1:2] != ["attn"] or "head" not in leaf.axes:
        return value
    return jnp.take(value, jnp.asarray(kept[int(path[0])]), leaf.axes.index("head"))
