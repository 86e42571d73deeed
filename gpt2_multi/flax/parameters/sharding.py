"""Sharding of the Flax model over a mesh of devices: plain dicts say which mesh axis cuts which named axis::

    mesh, rules = make_mesh("data=2,fsdp=2,tensor=2"), FSDP | TENSOR
    model = FlaxGPT2LMHeadModel.from_pretrained("gpt2", mesh=mesh, rules=rules)

Named axes are those of the table of weights: vocab, position, embed, qkv, head, head_dim, mlp, and so on; with scanned
layers also `layer`. What no rule names is whole on every device. Rows of a batch are cut over `data` and `fsdp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt2_multi.errors import InputError, nearest
from gpt2_multi.flax.layers import on_host
from gpt2_multi.flax.parameters.axes import moved
from gpt2_multi.flax.parameters.tree import Tree, check_tree, leaves
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import (
    DATA,
    FSDP,
    MESH_AXES,
    ROW_AXES,
    TENSOR,
    Rules,
    check_cut_once,
    check_named_axes,
    check_shared,
    mesh_sizes,
    sizes,
)

__all__ = [
    "DATA", "FSDP", "MESH_AXES", "TENSOR", "Rules", "check_rules", "init_params", "make_mesh", "param_shardings",
    "param_specs", "shard_batch", "shard_params",
]  # fmt: skip


def make_mesh(shape: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a text such as "data=2,fsdp=2,tensor=2" describes; an axis that it leaves out has size 1.

    It has the axes data, fsdp and tensor, of all devices of all hosts unless `devices` are given. Raises InputError for
    an unknown axis, for a size that is no positive number, and where the sizes do not multiply to the devices.
    """
    found = jax.devices() if devices is None else list(devices)
    size = mesh_sizes(shape)
    if (needed := math.prod(size.values())) != len(found):
        raise InputError(
            f"mesh: expected sizes whose product is the number of devices, {len(found)}, found '{shape}', which needs "
            f"{needed}; change them (XLA_FLAGS=--xla_force_host_platform_device_count={needed} makes virtual ones of a "
            "CPU)"
        )
    return jax.make_mesh(tuple(size.values()), MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=found)


def param_specs(config: GPT2Config, rules: Rules, head: str = "lm", scan_layers: bool = False) -> Tree:
    """The tree of PartitionSpecs of a model's parameters, one entry for each dimension.

    Kernels have their named axes unflattened, c_attn's (E, 3, H, D) and c_proj's (H, D, E), so that "head" can be cut.
    Raises InputError for a named axis that does not exist, and where one mesh axis would cut two axes of a parameter.
    """
    check_rules(config, rules, scan_layers)
    if rules and config.quantization is not None:
        raise InputError("rules: expected none for a quantized model, which is not cut over devices; load it without")
    found = leaves(config, head, scan_layers)
    for leaf in found.values():
        check_cut_once(leaf.rows[0].name, leaf.axes, rules)
    return unflatten_dict({path: leaf.spec(rules) for path, leaf in found.items()})


def param_shardings(config: GPT2Config, mesh: Mesh, rules: Rules, head: str = "lm", scan_layers: bool = False) -> Tree:
    """The tree of NamedShardings of a model's parameters on a mesh; see `param_specs`.

    Raises InputError too for a mesh axis that does not exist, and for parts that would not be equal.
    """
    specs = flatten_dict(param_specs(config, rules, head, scan_layers))
    _check_mesh(mesh, rules)
    for path, leaf in leaves(config, head, scan_layers).items():
        for axis, size, over in zip(leaf.axes, leaf.shape, specs[path], strict=True):
            check_shared(leaf.rows[0].name, axis, size, over, 1 if over is None else mesh.shape[over])
    return unflatten_dict({path: NamedSharding(mesh, spec) for path, spec in specs.items()})


def shard_params(
    params: Tree, config: GPT2Config, mesh: Mesh, rules: Rules, head: str = "lm", scan_layers: bool = False
) -> Tree:
    """Parameters that are there already, on the devices of a mesh; `from_pretrained` places those of files directly."""
    check_tree(params, config, head, scan_layers)
    return jax.device_put(params, param_shardings(config, mesh, rules, head, scan_layers))


def init_params(model: Any, mesh: Mesh, rules: Rules, seed: int = 0) -> Tree:
    """First parameters, each shard made where it lies, for a model made with `_do_init=False`."""
    shardings = param_shardings(model.config, mesh, rules, model.head, model.scan_layers)
    return jax.jit(model.init_weights, out_shardings=shardings)(jax.random.key(seed))


def shard_batch(batch: Mapping[str, Any], mesh: Mesh, micro: bool = False) -> dict[str, Array]:
    """A batch with its rows cut over the axes data and fsdp; with `micro`, micro-batches are stacked before the rows.

    Arrays of NumPy hold the rows of all hosts, the same on each. Arrays of JAX stay where they are. Raises InputError
    where the devices cannot share the rows equally.
    """
    given = {name: value for name, value in batch.items() if value is not None}
    return {name: _rows_placed(name, value, mesh, int(micro)) for name, value in given.items()}


def _rows_placed(name: str, value: Any, mesh: Mesh, dim: int) -> Array:
    if isinstance(value, jax.Array):
        return moved(value, mesh)  # type: ignore[no-any-return]
    value, axes = on_host(name, value), [axis for axis in ROW_AXES if axis in mesh.shape]
    parts = math.prod(mesh.shape[axis] for axis in axes)
    inputs.check_shape(name, value.shape[: dim + 1], (None,) * (dim + 1))
    if value.shape[dim] % parts:
        raise InputError(
            f"{name}: expected a number of rows that {parts} devices share equally, found {value.shape[dim]}; change "
            "the batch or the mesh"
        )
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * dim, tuple(axes)))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def check_rules(config: GPT2Config, rules: Rules, scan_layers: bool) -> None:
    """Rules have to name axes of the table."""
    known = [*sizes(config), *["layer"] * scan_layers]
    check_named_axes(rules, known, {"layer": " (only scanned layers have it)"})


def _check_mesh(mesh: Mesh, rules: Rules) -> None:
    given: object = mesh
    if not isinstance(getattr(given, "shape", None), Mapping):
        raise InputError(
            f"mesh: expected a jax.sharding.Mesh, found {type(given).__name__}; sharding.make_mesh makes one"
        )
    for axis, over in rules.items():
        if over is not None and over not in mesh.shape:
            raise InputError(
                f"rules: '{axis}' is to be cut over the mesh axis '{over}', expected one of "
                f"{', '.join(mesh.axis_names)}{nearest(str(over), mesh.axis_names)}"
            )
