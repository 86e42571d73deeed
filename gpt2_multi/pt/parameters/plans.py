"""How modules compute whose parameters are cut over tensor-parallel processes (Shoeybi et al. 2019).

c_attn has queries, keys and values in one dimension; to be cut by heads its weight becomes (3, H * D, E). H heads,
D head width, E `n_embd`, B batch, T length of this call, S keys (past included).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import TORCH
from gpt2_multi.model.weights import TENSOR, Rules, table
from gpt2_multi.pt.attention import Context
from gpt2_multi.pt.layers import to_numpy
from gpt2_multi.pt.state import REPLICATED, check_same, local

HEADED = ("attn", "crossattention")


def tensor_parallel_plan(config: GPT2Config, rules: Rules = TENSOR, head: str = "lm") -> dict[str, ParallelStyle]:
    """A plan for `parallelize_module` of torch, of a model with this head (a key of `weights.HEADS`)::

        parallelize_module(model, mesh["tensor"], tensor_parallel_plan(model.config)).tie_weights()

    Each module computes the parts that the rules cut, whatever the mesh axis; what they do not name is whole in each
    process. `sharding.shard` does this, and checks what does not fit.
    """
    cut = {axis for axis, over in rules.items() if over is not None}
    plan: dict[str, ParallelStyle] = {}
    for row in table(config.replace(tie_word_embeddings=False), head):
        path = TORCH.spell(row, head != "base").rpartition(".")[0]
        above = path.rpartition(".")[0]
        if "head" in cut and above.endswith(HEADED):
            plan.setdefault(above, HeadParallel())
        elif path not in plan:
            outer = tuple(dim[0] for dim in row.axes)
            is_linear = row.kind in ("linear", "embedding")
            outputs, inputs = outer if is_linear else outer[::-1] if len(outer) > 1 else (outer[0], None)
            plan[path] = _style(row.kind, outputs in cut, inputs in cut)
    return plan


def _style(kind: str, outputs: bool, inputs: bool) -> ParallelStyle:
    """How a module computes of which outputs or inputs are cut."""
    if kind == "embedding" and outputs:
        return RowwiseParallel(input_layouts=Replicate())
    if outputs:  # what is no kernel of a block gives its outputs to somebody who wants all
        return ColwiseParallel(output_layouts=Replicate() if kind == "linear" else None)
    return RowwiseParallel() if inputs else Replicated()


class FusedLinear(nn.Linear):
    """nn.Linear of several projections at once, its weight (parts, out / parts, in): each part can be cut alike.

    Cut, it takes the whole input, and gives its share of each part, (..., parts * share).
    """

    @classmethod
    def of(cls, layer: nn.Linear, parts: int) -> FusedLinear:
        """The same layer, with its parameters unflattened."""
        made = cls(layer.in_features, layer.out_features, device="meta")
        for name, x in layer.named_parameters():
            made.register_parameter(name, nn.Parameter(x.detach().view(parts, -1, *x.shape[1:]), x.requires_grad))
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, cast(Tensor, self.bias)
        if isinstance(weight, DTensor):  # which a compiler sees, and not what `local` asks
            x = entering(x, weight.device_mesh) if weight.placements[0].is_shard() else x
            weight, bias = weight.to_local(), cast(DTensor, bias).to_local()
        return F.linear(x, weight.flatten(0, 1), bias.flatten())


def entering(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that all processes have, and each computes something else with: its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def unflattened(attention: Any) -> FusedLinear:
    """The fused projection of an attention, which can be cut by heads from now on."""
    layer = attention.c_attn
    if not isinstance(layer, FusedLinear):
        attention.c_attn = FusedLinear.of(layer, layer.out_features // attention.split_size)
    return cast(FusedLinear, attention.c_attn)


def distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement, source: int | None) -> None:
    """Have the processes share a module's own parameters; `source` has the values, of None each has them."""
    for name, x in list(module.named_parameters(recurse=False)):
        shared = distribute_tensor(x.detach(), mesh, [placement], src_data_rank=source)
        module.register_parameter(name, nn.Parameter(shared, x.requires_grad))


class Replicated(ParallelStyle):
    """A module that each process computes whole, with parameters on the mesh beside those that are cut."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, Replicate(), self.src_data_rank)
        if isinstance(module, FusedLinear):
            return module
        distribute_module(module, device_mesh, lambda *_: None, self._wrapped, self._unwrapped)
        hooks = module._forward_pre_hooks.copy(), module._forward_hooks.copy()
        setattr(module, REPLICATED, hooks)
        return module

    @staticmethod
    def _wrapped(_: nn.Module, given: Any, mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in given)

    @staticmethod
    def _unwrapped(_: nn.Module, found: Any, mesh: DeviceMesh) -> Any:
        return found.to_local()


class HeadParallel(ParallelStyle):
    """Self- or cross-attention of which each process computes some heads, with their columns of q, k and v."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attention: Any = module
        count = device_mesh.size()
        if attention.num_heads % count:
            raise InputError(
                f"head: the attention of layer {attention.layer} has {attention.num_heads} heads, which {count} "
                "processes cannot share equally; change the mesh or leave 'head' out of the rules"
            )
        distribute(unflattened(attention), device_mesh, Shard(1), self.src_data_rank)
        for name, style in (("q_attn", ColwiseParallel()), ("c_proj", RowwiseParallel())):
            if hasattr(attention, name):
                style.src_data_rank = self.src_data_rank
                style._apply(getattr(attention, name), device_mesh)
        attention.num_heads, attention.split_size = attention.num_heads // count, attention.split_size // count
        attention.register_forward_pre_hook(partial(narrowed, device_mesh))
        attention.register_forward_hook(partial(gathered, device_mesh))
        noise = OwnNoise(device_mesh, attention)
        getattr(attention, "q_attn", attention.c_attn).register_forward_hook(noise.begin)
        attention.c_proj.register_forward_pre_hook(noise.end)
        return attention


def narrowed(mesh: DeviceMesh, attention: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an attention, whose biases and masks are of its own heads."""
    x, context, *masks = given
    own_heads = partial(heads_of, mesh, attention.num_heads)
    return x, replace(cast(Context, context), bias=own_heads(context.bias)), *map(own_heads, masks)


def heads_of(mesh: DeviceMesh, heads: int, x: Tensor | None) -> Tensor | None:
    """Of (B, H, T, S), what concerns the heads of this process; what has one dimension for all heads as it is."""
    if x is None or x.shape[1] == 1:
        return x
    return x.narrow(1, mesh.get_local_rank() * heads, heads)


def gathered(mesh: DeviceMesh, _: nn.Module, __: Any, found: Any) -> Any:
    """What an attention gives, with the probabilities of all heads where there are any."""
    if found.probs is None:
        return found
    own = DTensor.from_local(found.probs, mesh, [Shard(1)], run_check=False)
    return found._replace(probs=own.redistribute(placements=[Replicate()]).to_local())


class OwnNoise:
    """Dropout within an attention, whose heads must not share one mask, while what follows has the same everywhere."""

    def __init__(self, mesh: DeviceMesh, attention: Any) -> None:
        self.mesh, self.rate = mesh, attention.config.attn_pdrop
        self.common: Tensor | None = None  # the state of the generator that all processes have

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, layer: nn.Module, *_: Any) -> None:
        """Draw from a stream of this process, which follows from that of all."""
        if layer.training and self.rate:
            self.common = random_state(self.mesh.device_type)
            seed = crc32(self.common.numpy().tobytes(), self.mesh.get_local_rank())
            reseed(self.mesh.device_type, seed)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, *_: Any) -> None:
        """Go on with that of all."""
        if self.common is not None:
            restore(self.mesh.device_type, self.common)
            self.common = None


def random_state(kind: str) -> Tensor:
    """The state of the generator of a kind of devices, of bytes on the CPU."""
    return (torch.get_rng_state() if kind == "cpu" else torch.get_device_module(kind).get_rng_state()).cpu()


def restore(kind: str, state: Tensor) -> None:
    """Let the generator go on from a state."""
    (torch.set_rng_state if kind == "cpu" else torch.get_device_module(kind).set_rng_state)(state.cpu())


def reseed(kind: str, seed: int) -> None:
    """Let the generator begin anew."""
    (torch.default_generator if kind == "cpu" else torch.get_device_module(kind)).manual_seed(seed)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def together(mesh: DeviceMesh, model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Before a call of a model, of which each of these processes computes a part: they read the same rows.

    In training they go on with the random state of the first, so that dropout is the same in all.
    """
    found = (args[0] if args else given.get("input_ids")), given.get("inputs_embeds")
    read = [(tuple(x.shape), to_numpy(local(x)).tobytes()) for x in found if isinstance(x, Tensor)]
    check_same("input_ids", read, mesh)
    config = model.config
    if model.training and (config.embd_pdrop or config.resid_pdrop or config.attn_pdrop):
        state = random_state(mesh.device_type).to(mesh.device_type)
        dist.broadcast(state, group=mesh.get_group(), group_src=0)
        restore(mesh.device_type, state)
