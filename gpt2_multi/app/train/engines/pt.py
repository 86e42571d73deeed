"""Training in PyTorch: AdamW, mixed precision, adapters by PEFT, several processes by torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2_multi.app.train.engines.engine import Batch, Update, first_factor, read_state, write_state
from gpt2_multi.app.train.plan import BETAS, EPSILON, LORA_LAYERS, LORA_SCALE, Plan
from gpt2_multi.errors import InputError
from gpt2_multi.files.arrays import Made
from gpt2_multi.pt.heads import GPT2LMHeadModel
from gpt2_multi.pt.layers import NUMPY, to_numpy, to_torch
from gpt2_multi.pt.loading import device_of, devices, dtypes
from gpt2_multi.pt.training import IGNORED, parameter_groups

PARAMETER, UPDATES, MOMENTS = "parameter", "updates", ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them


class PTTeam:
    """The processes that torchrun started, or this one alone. See `Team`."""

    def __init__(self, device: str) -> None:
        self.process, self.processes, self._group = 0, 1, None
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
            self.process, self.processes = dist.get_rank(), dist.get_world_size()
        self.place = place_of(device)

    def agreed(self, flag: bool) -> bool:
        """See `Team.agreed`; on the CPU, so that no accelerator is waited for."""
        said = torch.tensor(int(flag))
        if self.processes > 1:
            dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said)

    def close(self) -> None:
        """See `Team.close`."""
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
        self._model = GPT2LMHeadModel.from_pretrained(folder, **dtypes, **plan.settings).to(self._place)
        self._trained: nn.Module = adapted(self._model, plan) if plan.lora else self._model
        self._trained.train()
        self._named = {name: p for name, p in self._trained.named_parameters() if p.requires_grad}
        self._call = DistributedDataParallel(self._trained) if team.processes > 1 else self._trained
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
            with self._unreduced() if part < parts - 1 else nullcontext():
                loss = self._loss(batch, part, items)
                loss.backward()
            found.append(loss.detach())
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return Update(self._summed(torch.stack(found).sum()).div_(self._team.processes), norm)

    def _unreduced(self) -> AbstractContextManager[Any]:
        return self._call.no_sync() if isinstance(self._call, DistributedDataParallel) else nullcontext()

    def _loss(self, batch: Batch, part: int, items: int) -> Any:
        """The part of the mean loss that a part of a batch has, ()."""
        given = {name: to_torch(batch[name][part]).to(self._place) for name in ("input_ids", "labels")}
        return self._call(**given, use_cache=False, skip_logits=True, num_items_in_batch=items).loss

    def _clip(self) -> Tensor:
        """The norm of all gradients, (), which are then no longer than `max_norm`."""
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.plan.max_norm:
            torch._foreach_mul_(gradients, (self.plan.max_norm / norm).clamp(max=1.0))
        return norm

    def _summed(self, x: Tensor) -> Tensor:
        if self._team.processes > 1:
            dist.all_reduce(x)
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
        if folder is not None:
            merged = merged_weights(self._model) if self.plan.lora else None
            self._model.save_pretrained(folder, state_dict=merged)

    def save_state(self, folder: Path | None) -> None:
        """See `Engine.save_state`."""
        if folder is not None:
            write_state(folder, {name: made(tensor) for name, tensor in self._state()})

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
        kinds = (PARAMETER, *MOMENTS)
        shapes = {f"{kind}.{name}": tuple(p.shape) for name, p in self._named.items() for kind in kinds}
        found = read_state(folder, {**shapes, UPDATES: ()})
        for name, parameter in self._named.items():
            parameter.copy_(to_torch(found[f"{PARAMETER}.{name}"]))
            sources = {moment: found[f"{moment}.{name}"] for moment in MOMENTS} | {"step": found[UPDATES]}
            state = {kind: to_torch(array).to(self._place, copy=True) for kind, array in sources.items()}
            self._optimizer.state[parameter] = state

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
    if plan.mesh:
        raise InputError(f"--mesh {plan.mesh}: PyTorch has the whole model in each process; use --backend flax")
    if plan.dtype not in (known := dtypes(str(team.place))):
        raise InputError(f"--dtype: {team.place} does not compute in {plan.dtype}; choose one of {', '.join(known)}")
    return PTEngine(plan, folder, team)


def place_of(device: str) -> torch.device:
    """Where a process computes: several of one machine each on an accelerator of its own."""
    known = devices()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = device_of(device or known[local % max(len(known) - 1, 1)])
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place


def made(tensor: Tensor) -> Made:
    """A tensor to write, which comes to the CPU when its turn is."""
    return NUMPY[tensor.dtype], tuple(tensor.shape), lambda: to_numpy(tensor)


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
