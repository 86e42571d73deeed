"""The loop: updates, evaluations and saves, which follow from a plan and the step that it has come to."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

from gpt2_multi.app.train.data.windows import Windows
from gpt2_multi.app.train.engines.engine import Array, Batch, Engine, Team
from gpt2_multi.app.train.plan import Plan
from gpt2_multi.app.train.report.report import Report

IGNORED = -100


@dataclass
class Held:
    """The tokens that were held out, in windows that overlap by one: each but the first is predicted once."""

    ids: Array
    length: int
    rows: int  # of a batch, of all processes together

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one shape; where there are too few tokens, labels do not count."""
        ids = np.asarray(self.ids).astype(np.int32)
        step = self.length - 1
        count = max(-(-(len(ids) - 1) // step), 1)
        whole = -(-count // self.rows) * self.rows
        padded = np.pad(ids, (0, whole * step + 1 - len(ids)))
        counted = np.arange(len(padded)) < len(ids)
        places = np.arange(whole)[:, None] * step + np.arange(self.length)
        given, labels = padded[places], np.where(counted, padded, IGNORED)[places].astype(np.int32)
        for start in range(0, whole, self.rows):
            part = slice(start, start + self.rows)
            yield {"input_ids": given[part], "labels": labels[part]}


@dataclass
class Stop(AbstractContextManager["Stop"]):
    """Whether somebody wants the run to end: the first signal is kept for the loop, the second ends at once."""

    say: Callable[[str], None] = lambda sentence: None
    signal: int = 0
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._caught) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        self.say("saving after this step; a second time ends at once")


@dataclass
class Loop:
    """What a run works with. `save` writes everything of a step, on all processes."""

    plan: Plan
    team: Team
    engine: Engine
    data: Windows
    held: Held | None
    report: Report
    save: Callable[[int], None]
    eval_every: int
    save_every: int

    def run(self, step: int, stop: Stop) -> int:
        """Train from a step to the last one, or to that after which somebody stopped it; returns which it was."""
        while step < self.plan.steps:
            update = self.engine.train(self._part(self.data[step]), step, self.plan.rate(step))
            self.report.note(step, update)
            step += 1
            stopped = self.team.agreed(bool(stop.signal))
            if step % self.eval_every == 0 or step == self.plan.steps:
                self.report.evaluated(step, self.held_out)
            if step % self.save_every == 0 or step == self.plan.steps or stopped:
                self.report.flush()
                self.save(step)
                self.report.restart()
            if stopped:
                break
        return step

    def _part(self, batch: Batch) -> Batch:
        """The rows of this process, one of P shares, in parts: (B, T) -> (A, B / (A P), T)"""
        share, shares = self.team.share(self.plan.mesh)
        shape = self.plan.accumulate, shares, -1, self.plan.length
        return {name: ids.reshape(shape)[:, share] for name, ids in batch.items()}

    def held_out(self) -> float | None:
        """The mean loss of the tokens that were held out, without dropout."""
        if self.held is None:
            return None
        share, shares = self.team.share(self.plan.mesh)
        found = []
        for batch in self.held:
            rows = {name: ids[share::shares] for name, ids in batch.items()}
            found.append(self.engine.evaluate(rows))
        return sum(float(total) for total, _ in found) / max(sum(float(count) for _, count in found), 1.0)
