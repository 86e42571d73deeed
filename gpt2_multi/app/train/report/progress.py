"""What one sees of a run while it trains: a bar on a terminal, a line at each evaluation elsewhere."""

from __future__ import annotations

import math
import sys
from typing import Any

from gpt2_multi.app.train.plan import Plan
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table

PEAKS = {  # floating-point operations in a second of dense products in bfloat16, as their makers say
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


class Progress:
    """A bar with the loss, the speed and the time that is left; with `shown` False nothing."""

    def __init__(self, plan: Plan, step: int, shown: bool) -> None:
        self.plan, self.shown, self._bar, self._said = plan, shown, None, ""
        self._sentences: set[str] = set()
        if shown and sys.stderr.isatty():
            self._bar, self._task = _bar(plan.steps, step)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def moved(self, step: int, row: dict[str, Any], used: float | None) -> None:
        """Show where the run is, by a row of metrics.jsonl, and which part of the peak it uses."""
        if self.shown:
            part = "" if used is None else f", {used:.0%} of peak"
            self._said = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s{part}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=self._said)

    def evaluated(self, step: int, held_out: float | None, seconds_left: float) -> None:
        """Say what an evaluation saw."""
        if self.shown:
            held = "" if held_out is None else f", held-out loss {held_out:.4f}"
            left = "" if self._bar is not None else f", {duration(seconds_left)} left"
            self.say(f"step {step:,} of {self.plan.steps:,}: {self._said}{held}{left}")

    def once(self, sentence: str) -> None:
        """Print a line, if it was not printed before."""
        if sentence not in self._sentences:
            self._sentences.add(sentence)
            self.say(sentence)

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        if not self.shown:
            return
        if self._bar is None:
            print(sentence, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(sentence, highlight=False, markup=False)


def _bar(steps: int, step: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    bar = Bar("Training", *columns, console=Console(stderr=True))
    return bar, bar.add_task("Training", total=steps, completed=step, note="")


def duration(seconds: float) -> str:
    """A time for people."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def operations(config: GPT2Config, plan: Plan) -> float:
    """The floating-point operations of a token in training, forward and backward, without recomputation.

    Six for each parameter that multiplies (Kaplan et al. 2020), four where only adapters have gradients; and those of
    scores and their use, as if no position were masked (Chowdhery et al. 2022).
    """
    idle = ("wpe",) if config.tie_word_embeddings else ("wpe", "wte")
    parameters = sum(math.prod(row.shape) for row in table(config) if row.path not in idle)
    attention = 2 * 2 * config.n_layer * config.n_embd * plan.length
    factor = 4 if plan.lora else 6
    return factor * parameters + 3 * attention


def peak(device: str, dtype: str, seconds: float, size: int) -> float:
    """The operations in a second that a device can do: what is known of a card, or what a product took."""
    known = next((speed for name, speed in PEAKS.items() if name in device), None) if dtype == "bfloat16" else None
    return 2 * size**3 / seconds if known is None else known
