"""The protocol of an engine, which all that is no framework's is written against."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpt2_multi.app.train.plan import Plan
from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.arrays import Made
from gpt2_multi.files.containers import read_safetensors, write_safetensors

Array = np.ndarray[Any, Any]
Batch = Mapping[str, Array]  # input_ids and labels, whose -100 do not count
STATE = "state.safetensors"


class Update(NamedTuple):
    """What a step found before it changed the weights: scalars of a framework, for which `float` waits."""

    loss: Any  # the mean over the labels of all processes
    norm: Any  # of all gradients together, before they are clipped


class Team(Protocol):
    """The processes that train together: the first one, 0, reads the sources and writes."""

    process: int
    processes: int

    def share(self, mesh: str) -> tuple[int, int]:
        """Which part of the rows of a batch this process has on a mesh, and of how many parts, which are equal."""

    def agreed(self, flag: bool) -> bool:
        """Whether any process says yes; all of them wait for each other."""

    def close(self) -> None:
        """Let the others go."""


class Engine(Protocol):
    """A model that is trained. Each process has one, and calls the same in the same order.

    A batch has the rows of this process alone, `Team.share` of the one batch that all processes have together. The
    dropout of a step follows from the seed, the step, the process and the part of the batch, so that no generator is
    saved.
    """

    device: str  # what it computes on, for people, such as "NVIDIA H100 80GB HBM3" or "cpu"
    devices: int  # how many of these, in all processes together

    def train(self, batch: Batch, step: int, rate: float) -> Update:
        """One update by AdamW from (A, B, T): A parts, one after the other, whose gradients are accumulated."""

    def evaluate(self, batch: Batch) -> tuple[Any, Any]:
        """The sum of -log p(label) over a batch (B, T) of all processes, without dropout, and how many labels count."""

    def save_model(self, folder: Path | None) -> None:
        """Write a model folder, adapters merged into it; all processes call it, and the first alone has a folder."""

    def save_state(self, folder: Path | None) -> None:
        """Write what `load_state` needs into an empty folder, by `write_state`; called as `save_model` is."""

    def load_state(self, folder: Path) -> None:
        """Be what was saved, bit by bit; all processes see the folder."""

    def product(self, size: int) -> float:
        """The seconds that one device needs for a product of two (size, size) matrices in the plan's dtype."""


def join(backend: str, device: str) -> Team:
    """The processes of a run, as the environment says, on a device or the fastest kind; before anything is computed."""
    team: Team = _module(backend).join(device)
    return team


def build(plan: Plan, folder: Path, team: Team) -> Engine:
    """The engine of a plan, whose model is that of a folder, with the plan's settings of the configuration."""
    engine: Engine = _module(plan.backend).build(plan, folder, team)
    return engine


def _module(backend: str) -> Any:
    return importlib.import_module(f"gpt2_multi.app.train.engines.{backend}")


def write_state(folder: Path, tensors: Mapping[str, Made]) -> None:
    """Write a state, one tensor in memory at a time."""
    write_safetensors(folder / STATE, tensors)


def read_state(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """The tensors of a state, mapped; CheckpointError where it is damaged, or has not these names and shapes."""
    path = folder / STATE
    found = read_safetensors(path)
    for name in {**expected, **found}:
        old, new = found[name].shape if name in found else "absent", expected.get(name, "absent")
        if old != new:
            raise CheckpointError(f"{path}: expected {name} to be {new}, found {old}; the state is of another model")
    return found


def first_factor(plan: Plan, name: str, inputs: int) -> Array:
    """The first A of a layer's adapter, (rank, in), as peft's uniform within 1 / sqrt(in); the first B is 0.

    `name` is the layer's in the table of weights, so that every framework begins with the same.
    """
    generator = np.random.default_rng([plan.seed, *name.encode()])
    bound = inputs**-0.5
    return generator.uniform(-bound, bound, (plan.lora, inputs))
