"""Sharding of the PyTorch model over a mesh of processes: plain dicts say which mesh axis cuts which named axis::

    mesh, rules = make_mesh("data=2,fsdp=2,tensor=2"), FSDP | TENSOR  # in each of 8 processes that torchrun started
    model = shard(GPT2LMHeadModel.from_pretrained("gpt2"), mesh, rules)

Named axes are those of the table of weights: vocab, position, embed, qkv, head, head_dim, mlp, and so on. What no rule
names is whole in every process. Rows of a batch are cut over `data` and `fsdp`. FSDP2, DTensor and `parallelize_module`
of torch do the work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import TORCH
from gpt2_multi.model.weights import (
    DATA,
    FSDP,
    MESH_AXES,
    ROW_AXES,
    TENSOR,
    Rules,
    Weight,
    check_cut_once,
    check_engines,
    check_named_axes,
    check_shared,
    check_used,
    mesh_sizes,
    sizes,
    table,
)
from gpt2_multi.pt.parameters.plans import tensor_parallel_plan, together, unflattened
from gpt2_multi.pt.state import check_present, is_split

__all__ = ["DATA", "FSDP", "MESH_AXES", "TENSOR", "Cut", "Rules", "cuts", "make_mesh", "shard", "shard_batch"]
__all__ += ["tensor_parallel_plan"]


def make_mesh(shape: str, device_type: str | None = None) -> DeviceMesh:
    """The mesh that a text such as "data=2,fsdp=2,tensor=2" describes; an axis that it leaves out has size 1.

    It has the axes data, fsdp and tensor, of all processes, each on a device of `device_type`, by default the fastest.
    Raises InputError for an unknown axis, for a size that is no positive number, where the sizes do not multiply to the
    processes, and where there is no process group.
    """
    size = mesh_sizes(shape)
    needed = math.prod(size.values())
    if not dist.is_initialized() and "RANK" not in os.environ:
        raise InputError(
            f"mesh: expected a process group, found none; start the program by torchrun --nproc-per-node {needed}, or "
            "call torch.distributed.init_process_group first"
        )
    found = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if needed != found:
        raise InputError(
            f"mesh: expected sizes whose product is the number of processes, {found}, found '{shape}', which needs "
            f"{needed}; change them, or start torchrun --nproc-per-node {needed}"
        )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device_type = device_type or ("cpu" if accelerator is None else accelerator.type)
    return init_device_mesh(device_type, tuple(size.values()), mesh_dim_names=MESH_AXES)


class Cut(NamedTuple):
    """How a parameter lies: its shape as a whole, and which mesh axis cuts which of its dimensions.

    Fused projections have a dimension for queries, keys and values before that of their heads.
    """

    row: Weight
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # the outermost named axis of each dimension,
    entries: tuple[int, ...]  # and how many it has
    over: dict[str, int]  # mesh axis -> dimension

    @property
    def by_fsdp(self) -> int:
        """The dimension that FSDP2 cuts, which cuts every parameter."""
        return self.over.get("fsdp", 0)

    def part(self, shape: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the largest part that a process has, where mesh axes have these sizes."""
        sizes, over = list(self.shape), {"fsdp": self.by_fsdp} | self.over
        for axis in reversed(MESH_AXES):
            if axis in over:
                sizes[over[axis]] = -(-sizes[over[axis]] // shape.get(axis, 1))
        return tuple(sizes)


def cuts(config: GPT2Config, rules: Rules, head: str = "lm") -> dict[str, Cut]:
    """How every parameter of a model is cut, by its name in the state dictionary.

    FSDP2 cuts what has no axis with a rule for "fsdp" at its first dimension. Raises InputError for a named axis that
    does not exist, or cannot be cut there, and where one mesh axis would cut two axes of a parameter.
    """
    check_rules(config, rules)
    if config.quantizer is not None:
        raise InputError("rules: expected none for a quantized model, which is not cut over devices; load it without")
    return {TORCH.spell(row, head != "base"): _cut(row, rules) for row in table(config, head)}


def _cut(row: Weight, rules: Rules) -> Cut:
    dims = [*zip(row.axes, row.lengths, strict=True)]
    dims = dims[::-1] if TORCH.turns(row) else dims
    names, lengths = dims[0]
    if names[0] in ("qkv", "kv"):
        dims[:1] = [(names[:1], lengths[:1]), (names[1:], lengths[1:])]
    axes = tuple(names[0] for names, _ in dims)
    check_cut_once(row.name, axes, rules)
    over = {by: dim for dim, axis in enumerate(axes) if (by := rules.get(axis)) is not None}
    return Cut(row, tuple(math.prod(n) for _, n in dims), axes, tuple(n[0] for _, n in dims), over)


def shard(model: Any, mesh: DeviceMesh, rules: Rules) -> Any:
    """Cut a model, in place, over a mesh of which all processes call this; `from_pretrained` reads shards directly.

    All get the values that the first process of the mesh has. The rows of a batch are for the caller to share out, by
    `shard_batch`; gradients become the mean over them. Raises InputError for what `cuts` refuses, for a mesh axis that
    cuts nothing, for parts that would not be equal, and for a model that is cut already.
    """
    found, shape = cuts(model.config, rules, model.head), check_mesh(mesh, rules)
    for cut in found.values():
        _check_divisible(cut, shape)
    if any(map(is_split, model.parameters())):
        raise InputError("model: expected one that is whole, found parameters that are cut already; shard it once")
    check_present(model, "cut over devices")
    _check_named(model, found)
    for x in model.parameters():
        agree(x.detach(), mesh)
    for module in [module for module in model.modules() if hasattr(module, "c_attn")]:
        unflattened(module)
    if shape["tensor"] > 1:
        over_tensor = {axis: over for axis, over in rules.items() if over == "tensor"}
        plan = tensor_parallel_plan(model.config, over_tensor, model.head)
        axis = mesh["tensor"] if mesh.size() > shape["tensor"] else _apart(mesh)
        parallelize_module(model, axis, plan, src_data_rank=None)
        model.tie_weights()
        model.register_forward_pre_hook(partial(together, axis), with_kwargs=True)
    if shape["tensor"] == 1 or shape["data"] * shape["fsdp"] > 1:
        _fully_shard(model, mesh["data", "fsdp"] if shape["data"] > 1 else mesh["fsdp"], found)
    if mesh.size() > shape["tensor"]:
        model.register_forward_pre_hook(partial(only_cut, frozenset(name for name, _ in model.named_parameters())))
    model.device_mesh = mesh
    return model


def _apart(mesh: DeviceMesh) -> DeviceMesh:
    """The axis tensor of a mesh that has no other, as one of its own: torch's compiler loses a part of a mesh."""
    return DeviceMesh.from_group(mesh.get_group("tensor"), mesh.device_type, mesh_dim_names=("tensor",))


def _check_named(model: Any, found: Mapping[str, Cut]) -> None:
    names = dict(model.named_parameters(remove_duplicate=False))
    if lacking := [name for name in found if name not in names]:
        raise InputError(
            f"model: expected the parameters of a GPT-2, found none under {lacking[0]}, as where PEFT or a "
            "parametrization has wrapped a layer; leave the layers as they are, or call torch's fully_shard for the "
            "blocks and the model"
        )


def only_cut(names: frozenset[str], model: Any, _: Any) -> None:
    """Before a training step: what was added to a model after it was cut has no part in the mean of gradients."""
    if not model.training or torch.compiler.is_compiling():
        return
    if added := [name for name, x in model.named_parameters() if x.requires_grad and name not in names]:
        raise InputError(
            f"model: expected parameters that were there when it was cut, found {added[0]}, which each process would "
            "train alone; add it first, and call torch's fully_shard for the blocks and the model"
        )


def _fully_shard(model: Any, mesh: DeviceMesh, found: Mapping[str, Cut]) -> None:
    named = dict(model.named_parameters())
    dims = {named[name]: cut.by_fsdp for name, cut in found.items()}
    options: dict[str, Any] = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=model.compute_dtype),
        shard_placement_fn=lambda parameter: Shard(dims.get(parameter, 0)),
    )
    for block in model.body.h:
        fully_shard(block, **options)
    model.register_forward_hook(unviewed)
    # at once: an optimizer that is made after a call would be given whole parameters, which nothing trains
    fully_shard(model, **options, reshard_after_forward=True)
    model.register_forward_pre_hook(in_one_dtype, prepend=True)


def in_one_dtype(model: Any, _: Any) -> None:
    """Before a call: FSDP2 goes on to gather parameters in the dtype that they had at the first."""
    found = next(model.parameters()).dtype
    first = vars(model).setdefault("first_dtype", found)
    if found != first:
        raise InputError(
            f"dtype: expected parameters of {first}, in which FSDP2 gathers them since the first call, found {found}; "
            "cast the model before it is called"
        )


def unviewed(_: Any, __: Any, output: Any) -> Any:
    """What a model gives, no tensor of which is a view: of one that is written to, FSDP2 would lose its hook."""
    if isinstance(output, tuple):
        return tuple(map(_unviewed, output))
    for name, x in vars(output).items():
        if isinstance(x, Tensor):
            setattr(output, name, _unviewed(x))
    return output


def _unviewed(x: Any) -> Any:
    return torch.ops.aten._unsafe_view(x, x.shape) if isinstance(x, Tensor) and x._is_view() else x


def agree(x: Tensor, mesh: DeviceMesh) -> None:
    """Give a tensor the values that it has in the first process of a mesh."""
    for dim in range(mesh.ndim if not x.is_meta else 0):
        if mesh.size(dim) > 1:
            dist.broadcast(x, group=mesh.get_group(dim), group_src=0)


def shard_batch(batch: Mapping[str, Tensor | None], mesh: DeviceMesh) -> dict[str, Tensor]:
    """The rows of a batch that are this process's, which the axes data and fsdp of a mesh share.

    Tensors hold the rows of all processes, the same in each. Raises InputError where they cannot be shared equally.
    """
    return {name: _own_rows(name, x, mesh) for name, x in batch.items() if x is not None}


def _own_rows(name: str, x: Tensor, mesh: DeviceMesh) -> Tensor:
    axes = [axis for axis in ROW_AXES if axis in (mesh.mesh_dim_names or ())]
    parts, place = 1, 0
    for axis in axes:
        parts, place = parts * mesh[axis].size(), place * mesh[axis].size() + mesh.get_local_rank(axis)
    inputs.check_shape(name, tuple(x.shape[:1]), (None,))
    if len(x) % parts:
        raise InputError(
            f"{name}: expected a number of rows that {parts} processes share equally, found {len(x)}; change the batch "
            "or the mesh"
        )
    return x.narrow(0, place * (len(x) // parts), len(x) // parts)


def check_rules(config: GPT2Config, rules: Rules) -> None:
    """Rules have to name axes of the table, and mesh axes that can cut them."""
    check_named_axes(rules, [*sizes(config)])
    check_engines(rules)


def check_mesh(mesh: DeviceMesh, rules: Rules) -> dict[str, int]:
    """A mesh has axes that the rules use; how many processes each axis has."""
    given: object = mesh
    if not isinstance(given, DeviceMesh):
        raise InputError(
            f"mesh: expected a torch.distributed.DeviceMesh, found {type(given).__name__}; sharding.make_mesh makes one"
        )
    names = mesh.mesh_dim_names or ()
    shape = dict.fromkeys(MESH_AXES, 1) | dict(zip(names, mesh.mesh.shape, strict=False))
    if len(shape) > len(MESH_AXES) or "fsdp" not in names:
        raise InputError(
            f"mesh: expected axes among {', '.join(MESH_AXES)}, fsdp among them, found {', '.join(names) or 'no names'}"
            "; sharding.make_mesh makes one"
        )
    check_used(rules, shape)
    return shape


def _check_divisible(cut: Cut, shape: Mapping[str, int]) -> None:
    for over, dim in cut.over.items():
        check_shared(cut.row.name, cut.axes[dim], cut.entries[dim], over, shape[over], "processes")
    if cut.over.get("tensor") == cut.by_fsdp and shape["tensor"] > 1:  # then parts of parts
        dim, count = cut.by_fsdp, shape["tensor"]
        check_shared(cut.row.name, cut.axes[dim], cut.shape[dim] // count, "fsdp", shape["fsdp"], "processes")
