"""What a run says while it trains: to metrics.jsonl, to TensorBoard, to whoever watches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from gpt2_multi.app.train.plan import Plan
from gpt2_multi.app.train.report.events import Events
from gpt2_multi.app.train.report.metrics import Metrics
from gpt2_multi.app.train.report.progress import Progress
from gpt2_multi.errors import InputError

WAITING = 10  # steps whose losses an accelerator is not asked for


class Report:
    """The figures of each step. Losses are read some steps later, so that an accelerator is not waited for.

    Every process has one, since all of them have to find out that a loss is not a number; that without `metrics` says
    nothing. `used` is from tokens per second to the part of the peak that they use.
    """

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        metrics: Metrics | None,
        events: Events | None,
        waits: bool,
        used: Callable[[float], float | None],
    ) -> None:
        self.plan, self.progress, self.metrics, self.events, self.used = plan, progress, metrics, events, used
        self._most = WAITING if waits else 1
        self._waiting: list[tuple[int, Any]] = []
        self._rows: list[dict[str, Any]] = []  # of the last step, until an evaluation had its chance
        self._since = time.perf_counter()
        self.seconds = metrics.seconds if metrics else 0.0

    def note(self, step: int, update: Any) -> None:
        """Take what an update found at a step, from 0."""
        self._waiting.append((step, update))
        if len(self._waiting) >= self._most:
            self._read()

    def _read(self) -> None:
        """Read the losses that wait."""
        if not self._waiting:
            return
        found = [(step, float(update.loss), float(update.norm)) for step, update in self._waiting]
        now = time.perf_counter()
        passed = (now - self._since) / len(found)
        self._since = now
        self._waiting.clear()
        self._write()
        for step, loss, norm in found:
            self._check(step, loss, norm)
            self.seconds += passed
            self._rows.append(self._row(step, loss, norm, passed))
        self.progress.moved(found[-1][0] + 1, self._rows[-1], self.used(self._rows[-1]["tokens_per_second"]))

    def _check(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(step + 1, "the gradients are" if math.isfinite(loss) else "the loss is")

    def _row(self, step: int, loss: float, norm: float, passed: float) -> dict[str, Any]:
        tokens = self.plan.batch_size * self.plan.length
        figures = {"loss": loss, "lr": self.plan.rate(step), "norm": norm}
        return {"step": step + 1, **figures, "tokens_per_second": tokens / passed, "seconds": self.seconds}

    def evaluated(self, step: int, measure: Callable[[], float | None]) -> None:
        """Take the held-out loss after a step."""
        self._read()
        held_out = measure()
        self.restart()
        if held_out is not None and not math.isfinite(held_out):
            raise diverged(step, "the held-out loss is")
        self._rows[-1]["val_loss"] = held_out
        left = (self.plan.steps - step) * self.seconds / step
        self.progress.evaluated(step, held_out, left)

    def _write(self) -> None:
        if self.metrics is not None and self._rows:
            self.metrics.write(self._rows)
            if self.events is not None:
                self.events.write(self._rows)
        self._rows.clear()

    def flush(self) -> None:
        """Read all losses, and wait until their lines are on the disk."""
        self._read()
        self._write()
        if self.metrics is not None:
            self.metrics.sync()

    def restart(self) -> None:
        """Measure the speed from now on: evaluations and saves are no training."""
        self._since = time.perf_counter()


def diverged(step: int, what: str) -> InputError:
    """The error of a run whose figures are no numbers any more."""
    return InputError(
        f"step {step}: {what} no finite number; begin another run with a lower --lr, a longer --warmup, "
        "or --dtype float32"
    )
