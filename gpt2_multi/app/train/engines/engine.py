"""The protocol of an engine, which all that is no framework's is written against."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpt2_multi.app.train.plan import Plan

Array = np.ndarray[Any, Any]
Batch = Mapping[str, Array]  # input_ids and labels, whose -100 do not count


class Update(NamedTuple):
    """What a step found before it changed the weights: scalars of a framework, for which `float` waits."""

    loss: Any  # the mean over the labels of all processes
    norm: Any  # of all gradients together, before they are clipped


class Engine(Protocol):
    """A model that is trained. Each process has one, and calls the same in the same order.

    A batch has the rows of this process alone, of the one batch that all processes have together. The dropout of a step
    follows from the seed, the step, the process and the part of the batch, so that no generator is saved.
    """

    process: int  # from 0; the first one writes
    processes: int
    device: str  # what it computes on, for people, such as "NVIDIA H100 80GB HBM3" or "cpu"
    devices: int  # how many of these, in all processes together

    def train(self, batch: Batch, step: int, rate: float) -> Update:
        """One update by AdamW from (A, B, T): A parts, one after the other, whose gradients are accumulated."""

    def evaluate(self, batch: Batch) -> tuple[Any, Any]:
        """The sum of -log p(label) over a batch (B, T) of all processes, without dropout, and how many labels count."""

    def save_model(self, folder: Path | None) -> None:
        """Write a model folder, adapters merged into it; all processes call it, and the first alone has a folder."""

    def save_state(self, folder: Path | None) -> None:
        """Write what `load_state` needs into an empty folder; called as `save_model` is."""

    def load_state(self, folder: Path) -> None:
        """Be what was saved, bit by bit; all processes see the folder."""

    def agreed(self, flag: bool) -> bool:
        """Whether any process says yes; all of them wait for each other."""

    def product(self, size: int) -> float:
        """The seconds that one device needs for a product of two (size, size) matrices in the plan's dtype."""

    def close(self) -> None:
        """Let the other processes go."""


def build(plan: Plan, folder: Path) -> Engine:
    """The engine of a plan, whose model is that of a folder, with the dropout of its config.json."""
    engine: Engine = importlib.import_module(f"gpt2_multi.app.train.engines.{plan.backend}").build(plan, folder)
    return engine
