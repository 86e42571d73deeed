"""Training in PyTorch: AdamW, mixed precision, adapters by PEFT, several processes by torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2_multi.app.train.engines.engine import Batch, Update
from gpt2_multi.app.train.plan import BETAS, EPSILON, LORA_LAYERS, LORA_SCALE, Plan
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.pt.heads import GPT2LMHeadModel
from gpt2_multi.pt.layers import to_torch
from gpt2_multi.pt.loading import device_of, devices, dtypes
from gpt2_multi.pt.training import IGNORED, parameter_groups

STATE = "state.safetensors"
PARAMETER, MOMENTS = "parameter", ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them


class PTEngine:
    """See `Engine`."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.process, self.processes, self._group = join()
        self._place = place_of(plan, self.process)
        self.device = torch.cuda.get_device_name(self._place) if self._place.type == "cuda" else self._place.type
        self.devices = self.processes
        stored = "float64" if plan.dtype == "float64" else "float32"
        self._model = GPT2LMHeadModel.from_pretrained(folder, dtype=plan.dtype, param_dtype=stored).to(self._place)
        self._trained: nn.Module = adapted(self._model, plan) if plan.lora else self._model
        self._trained.train()
        self._named = {name: p for name, p in self._trained.named_parameters() if p.requires_grad}
        self._call = DistributedDataParallel(self._trained) if self._group else self._trained
        groups = parameter_groups(self._trained, plan.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=True)

    def train(self, batch: Batch, step: int, rate: float) -> Update:
        """See `Engine.train`."""
        torch.manual_seed(seed_of(self.plan.seed, step, self.process))
        self._optimizer.zero_grad(set_to_none=True)
        parts = batch["input_ids"].shape[0]
        items = max(int((batch["labels"][..., 1:] != IGNORED).sum()), 1)
        total = torch.zeros((), device=self._place, dtype=torch.float64)
        for part in range(parts):
            with self._unreduced() if part < parts - 1 else nullcontext():
                loss = self._loss(batch, part, items)
                loss.backward()
            total += loss.detach()
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return Update(self._summed(total).div_(self.processes), norm)

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
        if self._group:
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
            ).loss.double()  # fmt: skip
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
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._state()}
            save_file(tensors, folder / STATE, {"steps": str(self._steps())})

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items():
            yield f"{PARAMETER}.{name}", parameter
            for moment in MOMENTS:
                there = self._optimizer.state.get(parameter, {}).get(moment)
                yield f"{moment}.{name}", torch.zeros_like(parameter) if there is None else there

    def _steps(self) -> int:
        states = list(self._optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        """See `Engine.load_state`."""
        path = folder / STATE
        try:
            with safe_open(path, "pt", device=str(self._place)) as file:
                check_state(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, self._named)
                step = torch.tensor(float(file.metadata()["steps"]), device=self._place)
                for name, parameter in self._named.items():
                    parameter.copy_(file.get_tensor(f"{PARAMETER}.{name}"))
                    moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}
                    self._optimizer.state[parameter] = {"step": step.clone(), **moments}
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            what = f"{path}: is damaged ({error})"
            raise CheckpointError(f"{what}; delete its folder to go on from the one before") from error

    def agreed(self, flag: bool) -> bool:
        """See `Engine.agreed`."""
        if self._group is None:
            return flag
        said = torch.tensor(int(flag))
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group)
        return bool(said)

    def product(self, size: int) -> float:
        """See `Engine.product`."""
        x = torch.randn(size, size, device=self._place).to(getattr(torch, self.plan.dtype))
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            float((x @ x)[0, 0])
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._group is not None:
            dist.destroy_process_group()


def build(plan: Plan, folder: Path) -> PTEngine:
    """See `engine.build`."""
    if plan.mesh:
        raise InputError(f"--mesh {plan.mesh}: PyTorch has the whole model in each process; use --backend flax")
    return PTEngine(plan, folder)


def join() -> tuple[int, int, Any]:
    """This process, the number of processes, and what they agree by on the CPU: as torchrun says, or this one alone."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, None
    if not dist.is_initialized():
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo")


def place_of(plan: Plan, process: int) -> torch.device:
    """Where a process computes: with several, each on an accelerator of its own."""
    if plan.device:
        place = device_of(plan.device)
    else:
        known = devices()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device(known[local % max(len(known) - 1, 1)])
    if plan.dtype not in dtypes(str(place)):
        raise InputError(
            f"--dtype: {place} does not compute in {plan.dtype}; choose one of {', '.join(dtypes(str(place)))}"
        )
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place


def seed_of(*numbers: int) -> int:
    """A seed that follows from some numbers, and looks like none that follows from others."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(seed)


def adapted(model: GPT2LMHeadModel, plan: Plan) -> nn.Module:
    """The model with adapters (Hu et al. 2021), which alone are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise InputError("--lora: needs PEFT: pip install peft") from None
    torch.manual_seed(seed_of(plan.seed))
    options: Any = {"lora_alpha": LORA_SCALE * plan.lora, "target_modules": list(LORA_LAYERS)}
    made: nn.Module = get_peft_model(model, LoraConfig(r=plan.lora, **options))  # type: ignore[arg-type,unused-ignore]
    return made


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


def check_state(path: Path, found: Mapping[str, tuple[int, ...]], named: Mapping[str, Tensor]) -> None:
    """CheckpointError where the shapes of a saved state are not those of these parameters."""
    expected = {f"{kind}.{name}": tuple(x.shape) for name, x in named.items() for kind in (PARAMETER, *MOMENTS)}
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{path}: expected {name} to be {expected.get(name, 'absent')}, found {found.get(name, 'none')}; the "
                "state is of another model"
            )
