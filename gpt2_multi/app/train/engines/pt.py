"""Training in PyTorch: AdamW, mixed precision, adapters by PEFT, several processes by torchrun."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpt2_multi.app.train.engines.engine import Array, Batch, Update, first_factor, read_state, write_state
from gpt2_multi.app.train.plan import BETAS, EPSILON, LORA_LAYERS, LORA_SCALE, Plan
from gpt2_multi.errors import InputError
from gpt2_multi.model.weights import mesh_sizes
from gpt2_multi.pt.heads import GPT2LMHeadModel
from gpt2_multi.pt.layers import NUMPY, to_numpy, to_torch
from gpt2_multi.pt.loading import devices, dtypes
from gpt2_multi.pt.parameters.placement import device_of
from gpt2_multi.pt.parameters.plans import FusedLinear
from gpt2_multi.pt.parameters.sharding import FSDP, TENSOR, make_mesh
from gpt2_multi.pt.state import cut_as, gather, is_split, local, write_together
from gpt2_multi.pt.training import IGNORED, parameter_groups

PARAMETER, UPDATES, MOMENTS = "parameter", "updates", ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them


class PTTeam:
    """The processes that torchrun started, or this one alone. See `Team`."""

    def __init__(self, device: str) -> None:
        self.process, self.processes = 0, 1
        if "WORLD_SIZE" in os.environ and not dist.is_initialized():
            dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
        if dist.is_initialized():
            self.process, self.processes = dist.get_rank(), dist.get_world_size()
        self.place = place_of(device)
        self._meshes: dict[str, DeviceMesh] = {}
        self._wrappers: list[DistributedDataParallel] = []

    def wrapped(self, module: nn.Module) -> nn.Module:
        """A module whose gradients become the mean over all processes, each of which has it whole."""
        self._wrappers.append(DistributedDataParallel(module))
        return self._wrappers[-1]

    def mesh(self, shape: str) -> DeviceMesh | None:
        """The processes as a mesh of this shape, which is made once; None without a shape, and in one process."""
        needed = math.prod(mesh_sizes(shape).values())
        if not shape or self.processes == needed == 1:
            return None
        if not dist.is_initialized():
            raise InputError(
                f"--mesh {shape}: expected {needed} processes, found one; start it by torchrun --nproc-per-node "
                f"{needed}, or give --mesh data=1"
            )
        if shape not in self._meshes:
            self._meshes[shape] = make_mesh(shape, self.place.type)
        return self._meshes[shape]

    def share(self, mesh: str) -> tuple[int, int]:
        """See `Team.share`; the processes of a tensor axis have the same rows."""
        if (found := self.mesh(mesh)) is None:
            return self.process, self.processes
        data, fsdp, _ = found.get_coordinate() or ()
        return data * found.size(1) + fsdp, found.size(0) * found.size(1)

    def agreed(self, flag: bool) -> bool:
        """See `Team.agreed`; on the CPU, so that no accelerator is waited for."""
        said = torch.tensor(int(flag))
        if self.processes > 1:
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said)

    def close(self) -> None:
        """See `Team.close`; what was wrapped can train no more."""
        for wrapper in self._wrappers:  # whose reducer, if it went last, would hold Python while threads wait for it
            del wrapper.reducer, wrapper.logger
        self._wrappers.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


class PTEngine:
    """See `Engine`."""

    def __init__(self, plan: Plan, folder: Path, team: PTTeam) -> None:
        self.plan, self._team, self._place = plan, team, team.place
        self.device = torch.cuda.get_device_name(self._place) if self._place.type == "cuda" else self._place.type
        self.devices = team.processes
        stored = "float64" if plan.dtype == "float64" else "float32"
        dtypes: Any = {"dtype": plan.dtype, "param_dtype": stored}
        mesh, (_, self._shares) = team.mesh(plan.mesh), team.share(plan.mesh)
        where: Any = {"mesh": mesh, "rules": FSDP | TENSOR} if mesh else {"device_map": str(self._place)}
        self._model = GPT2LMHeadModel.from_pretrained(folder, **dtypes, **where, **plan.settings)
        self._trained: nn.Module = adapted(self._model, plan) if plan.lora else self._model
        self._trained.train()
        self._named = {name: p for name, p in self._trained.named_parameters() if p.requires_grad}
        self._call = self._trained if mesh or team.processes == 1 else team.wrapped(self._trained)
        groups = parameter_groups(self._trained, plan.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)

    def train(self, batch: Batch, step: int, rate: float) -> Update:
        """See `Engine.train`."""
        torch.manual_seed(seed_of(self.plan.seed, step, self._team.process))
        self._optimizer.zero_grad(set_to_none=True)
        parts = batch["input_ids"].shape[0]
        items = max(int((batch["labels"][..., 1:] != IGNORED).sum()), 1)
        found = []
        for part in range(parts):
            self._reduce(part == parts - 1)
            loss = self._loss(batch, part, items)
            loss.backward()
            found.append(loss.detach())
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return Update(self._summed(torch.stack(found).sum()).div_(self._shares), norm)

    def _reduce(self, is_last: bool) -> None:
        """Let processes that have the same parameters add up their gradients after the last part of a batch alone."""
        if isinstance(self._call, DistributedDataParallel):
            self._call.require_backward_grad_sync = is_last
        elif isinstance(self._call, FSDPModule):
            self._call.set_requires_all_reduce(is_last)

    def _loss(self, batch: Batch, part: int, items: int) -> Any:
        """The part of the mean loss that a part of a batch has, ()."""
        given = {name: to_torch(batch[name][part]).to(self._place) for name in ("input_ids", "labels")}
        return self._call(**given, use_cache=False, skip_logits=True, num_items_in_batch=items).loss

    def _clip(self) -> Tensor:
        """The norm of all gradients, (), which are then no longer than `max_norm`."""
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.plan.max_norm:
            torch._foreach_mul_([*map(local, gradients)], (self.plan.max_norm / norm).clamp(max=1.0))
        return norm

    def _summed(self, x: Tensor) -> Tensor:
        """The sum over all shares of the rows."""
        if self._team.processes > 1:
            dist.all_reduce(x)
            x *= self._shares / self._team.processes  # those of a tensor axis have the same
        return x

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Engine.evaluate`."""
        self._trained.eval()
        try:
            loss = self._trained(
                **{name: to_torch(batch[name]).to(self._place) for name in ("input_ids", "labels")},
                use_cache=False, skip_logits=True, num_items_in_batch=1,
            ).loss  # fmt: skip
        finally:
            self._trained.train()
        count = torch.tensor((batch["labels"][..., 1:] != IGNORED).sum(), dtype=loss.dtype, device=self._place)
        return self._summed(loss), self._summed(count)

    def save_model(self, folder: Path | None) -> None:
        """See `Engine.save_model`."""
        merged = merged_weights(self._model) if self.plan.lora and folder is not None else None
        self._model.save_pretrained(folder or "", folder is not None, merged)

    def save_state(self, folder: Path | None) -> None:
        """See `Engine.save_state`."""
        tensors = [(name, self._shape(name, tensor), tensor) for name, tensor in self._state()]

        def write(makes: Sequence[Any]) -> None:
            if folder is not None:
                beside = zip(tensors, makes, strict=True)
                write_state(folder, {name: (NUMPY[x.dtype], shape, make) for (name, shape, x), make in beside})

        write_together(self._named.values(), [partial(whole_array, x, shape) for _, shape, x in tensors], write)

    def _shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a tensor of the state in a model that is not cut, whose fused projections have one dimension."""
        path = name.partition(".")[2].rpartition(".")[0]
        is_apart = isinstance(self._trained.get_submodule(path), FusedLinear)
        return (math.prod(tensor.shape[:2]), *tensor.shape[2:]) if is_apart else tuple(tensor.shape)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Each trained parameter with its moments, and how many updates they are the mean of."""
        states = self._optimizer.state
        for name, parameter in self._named.items():
            yield f"{PARAMETER}.{name}", parameter.detach()
            for moment in MOMENTS:
                there = states.get(parameter, {}).get(moment)
                yield f"{moment}.{name}", torch.zeros_like(parameter) if there is None else there
        yield UPDATES, next((state["step"] for state in states.values()), torch.zeros(()))

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        """See `Engine.load_state`."""
        found = read_state(folder, {name: self._shape(name, tensor) for name, tensor in self._state()})
        for name, parameter in self._named.items():
            refill(parameter, found[f"{PARAMETER}.{name}"])
            state = {moment: refill(torch.zeros_like(parameter), found[f"{moment}.{name}"]) for moment in MOMENTS}
            step = to_torch(found[UPDATES]).to(self._place, copy=True)
            self._optimizer.state[parameter] = {**state, "step": step}

    def product(self, size: int) -> float:
        """See `Engine.product`."""
        x = torch.randn(size, size, device=self._place).to(getattr(torch, self.plan.dtype))
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            float((x @ x)[0, 0])
            seconds.append(time.perf_counter() - start)
        return min(seconds)


def join(device: str) -> PTTeam:
    """See `engine.join`."""
    return PTTeam(device)


def build(plan: Plan, folder: Path, team: PTTeam) -> PTEngine:
    """See `engine.build`."""
    if plan.lora and plan.mesh:
        raise InputError(f"--lora: PEFT's adapters want a whole model, which --mesh {plan.mesh} cuts; leave --mesh out")
    if plan.dtype not in (known := dtypes(str(team.place))):
        raise InputError(f"--dtype: {team.place} does not compute in {plan.dtype}; choose one of {', '.join(known)}")
    return PTEngine(plan, folder, team)


def place_of(device: str) -> torch.device:
    """Where a process computes: several of one machine each on an accelerator of its own."""
    known = devices()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = device_of(device or known[local % max(len(known) - 1, 1)], known)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place


def whole_array(tensor: Tensor, shape: tuple[int, ...]) -> Array:
    """A tensor to write, which comes to the CPU when its turn is, from all processes that have parts of it."""
    found: Array = to_numpy(gather(tensor).view(shape))
    return found


def refill(tensor: Tensor, array: Array) -> Tensor:
    """Give a tensor the values of a file, of which each process reads its part; returns it."""
    value = to_torch(array).view(tensor.shape)
    return tensor.copy_(cut_as(tensor, value) if is_split(tensor) else value)


def seed_of(*numbers: int) -> int:
    """A seed that follows from some numbers, and looks like none that follows from others."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(seed)


@torch.no_grad()
def adapted(model: GPT2LMHeadModel, plan: Plan) -> nn.Module:
    """The model with adapters (Hu et al. 2021), which alone are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise InputError("--lora: needs PEFT: pip install peft") from None
    torch.manual_seed(seed_of(plan.seed))
    options: Any = {"lora_alpha": LORA_SCALE * plan.lora, "target_modules": list(LORA_LAYERS)}
    wrapped: nn.Module = get_peft_model(model, LoraConfig(r=plan.lora, **options))  # type: ignore[arg-type,unused-ignore]
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." in name:
            path = name[name.index(".h.") + 1 : name.index(".lora_A.")]
            parameter.copy_(to_torch(first_factor(plan, path, parameter.shape[1])))
    return wrapped


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model with adapters, by the names that they have without, the adapters added."""
    merged: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        if path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
            layer: Any = model.get_submodule(path)
            parameter = parameter + layer.get_delta_weight("default") if leaf == "weight" else parameter
        merged[f"{path}.{leaf}"] = parameter
    return merged
