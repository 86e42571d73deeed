"""What a run says at its end: what it reached, what to do with it, and how to make it better."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_multi.app.train.plan import Plan
from gpt2_multi.app.train.report.metrics import Metrics
from gpt2_multi.app.train.report.progress import duration

SMALLEST = 124_000_000  # parameters of the smallest GPT-2 that was published


def words(path: Path, facts: Mapping[str, Any], plan: Plan, metrics: Metrics) -> str:
    """The last lines of a run, of a whole one or of one that was stopped."""
    place, last = shlex.quote(str(path)), metrics.points[-1] if metrics.points else None
    held = "" if last is None or last.held_out is None else f", held-out loss {last.held_out:.4f}"
    if metrics.steps < plan.steps:
        return (
            f"{path}: saved after step {metrics.steps:,} of {plan.steps:,}{held}\n"
            f"  go on     gpt2-multi train --out {place} --resume"
        )
    unread = shlex.quote(facts["val"] or "other.txt")  # what it has learned by heart would measure nothing
    lines = [
        f"{path}: {metrics.steps:,} steps in {duration(metrics.seconds)}{held}",
        f'  write     gpt2-multi generate "Once upon a time" --model {place}',
        f"  measure   gpt2-multi evaluate {place} {unread}",
        f"  serve     gpt2-multi serve {place}",
        *(f"  better    {advice}" for advice in better(facts, plan, metrics)),
    ]
    return "\n".join(lines)


def better(facts: Mapping[str, Any], plan: Plan, metrics: Metrics) -> Iterator[str]:
    """How a next run may be better, by what this one saw."""
    best, last = metrics.best, metrics.points[-1] if metrics.points else None
    if best is None or last is None:
        yield "hold some of the data out, to see when it has learned enough: --val-fraction 0.1"
    elif best.step < last.step:
        yield (
            f"the held-out loss was least at step {best.step:,}: train on more text, with --dropout 0.2, or with "
            f"--steps {best.step}"
        )
    else:
        yield f"the held-out loss was still falling: --steps {4 * plan.steps}, into another --out"
    if facts["parameters"] < SMALLEST:
        yield "a larger model knows more before it begins: --model gpt2 (best on a GPU, with --dtype bfloat16)"
