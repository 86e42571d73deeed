"""Training that goes on where it stopped, on any number of processes: states that torch.distributed.checkpoint keeps::

step = restore_state("run", model, optimizer) if saved_steps("run") else 0
for step in range(step, steps):
    train_step(model, optimizer, batches(step))
save_state("run", model, optimizer, steps)
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.folders import exchange
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.states import check_fit, chosen_step
from gpt2_multi.pt.parameters.sharding import cuts
from gpt2_multi.pt.state import heard

STEP = re.compile(r"step-(\d{9,})")  # a state that is whole
UNFINISHED = ".unfinished"  # what its folder is called until it is


def save_state(
    folder: str | os.PathLike[str], model: Any, optimizer: torch.optim.Optimizer, step: int, keep: int | None = 2
) -> None:
    """Write a model and its optimizer to `folder`, under a step; the last `keep` stay. Every process has to call it.

    Each writes its own parts. The folder of a step appears whole or not at all. Raises CheckpointError in all processes
    where one cannot write.
    """
    inputs.check_size("step", step, 0)
    if keep is not None:
        inputs.check_size("keep", keep, 1)
    place, unfinished = Path(folder) / f"step-{step:09}", Path(folder) / UNFINISHED
    failed: BaseException | None = None
    try:
        if _is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
        _meet()
        with alone():
            save(_named(model, optimizer), checkpoint_id=unfinished)
        if _is_first():
            exchange(unfinished, place)
    except (OSError, CheckpointException) as error:
        failed = error
    _check_saved(folder, failed)
    if _is_first():
        for old in (UNFINISHED, *(f"step-{old:09}" for old in saved_steps(folder)[: -keep if keep else 0])):
            shutil.rmtree(Path(folder) / old, ignore_errors=True)  # the first is what had the name of this one
    _meet()


def _check_saved(folder: str | os.PathLike[str], failed: BaseException | None) -> None:
    """All processes raise where one, or the first by itself, could not save."""
    elsewhere = dist.is_initialized() and heard(int(failed is not None))
    if failed is not None or elsewhere:
        why = "see the error of the first process" if failed is None else _line(failed)
        raise CheckpointError(f"{folder}: the state could not be saved ({why})") from failed


def restore_state(
    folder: str | os.PathLike[str], model: Any, optimizer: torch.optim.Optimizer, step: int | None = None
) -> int:
    """Take over the last state of `folder`, or that of a step, bit by bit, in place; returns its step.

    `model` and `optimizer` are of the same configuration and kind as when it was saved; the mesh may be another, or
    none. Rates and other settings stay those of `optimizer`. Every process has to call it. Raises CheckpointError where
    there is no such state, and where it does not fit.
    """
    step = chosen_step(folder, saved_steps(folder), step)
    what, place = f"{folder}: the state of step {step}", Path(folder) / f"step-{step:09}"
    try:
        found = FileSystemReader(place).read_metadata().state_dict_metadata
        begin(optimizer, _moving(model, found))
        wanted = _named(model, optimizer)
        check_fit(what, {name: _kind(x) for name, x in found.items()}, {name: _kind(x) for name, x in wanted.items()})
        with alone():
            load(wanted, checkpoint_id=place)
    except CheckpointError:
        raise
    except (OSError, EOFError, ValueError, CheckpointException) as error:
        raise CheckpointError(f"{what} is damaged ({_line(error)}); delete it to go on from the one before") from error
    return step


def saved_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps whose states a folder has."""
    if not Path(folder).is_dir():
        return []
    return sorted(int(name[1]) for path in Path(folder).iterdir() if (name := STEP.fullmatch(path.name)))


@contextmanager
def alone() -> Iterator[None]:
    """Let torch not warn of a process that is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _moving(model: Any, found: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a model of which a state has what the optimizer knows: a frozen one has nothing."""
    names = {name.partition(".")[2] for name in found if not name.startswith("model.")}
    model.state_dict()  # FSDP2 has whole parameters after a call, until somebody asks for this
    return [x for name, x in model.named_parameters() if name in names]


@torch.no_grad()
def begin(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """Have an optimizer make its state of these parameters, and of no others, by a step that changes nothing."""
    every = [x for group in optimizer.param_groups for x in group["params"]]
    optimizer.state.clear()
    rates, gradients = [group["lr"] for group in optimizer.param_groups], [x.grad for x in every]
    chosen = {id(x) for x in parameters}
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    for x in every:
        x.grad = torch.zeros_like(x) if id(x) in chosen else None
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for x, gradient in zip(every, gradients, strict=True):
        x.grad = gradient


def _named(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a model and its optimizer by a name, fused projections always as those of a model that is cut."""
    shapes = {name: cut.shape for name, cut in cuts(model.config, {}, model.head).items()}
    found = {f"model.{name}": _apart(x, shapes.get(name)) for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, x in optimizer.state.get(parameter, {}).items():
            if isinstance(x, Tensor):
                is_alike = x.shape == parameter.shape
                found[f"{key}.{name}"] = _apart(x, shapes.get(name)) if is_alike else x
    return found


def _apart(x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    return x if shape is None or x.shape == shape else x.view(shape)


def _kind(x: Any) -> str:
    dtype, size = (x.dtype, x.shape) if isinstance(x, Tensor) else (x.properties.dtype, x.size)
    return f"{str(dtype).removeprefix('torch.')}{list(size)}"


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[-1][:200]
