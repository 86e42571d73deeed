"""How far is what was computed from what it should be? What `doctor` and `verify` find, in numbers and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

Array = np.ndarray[Any, Any]
# How far values may be from the oracle's, relative to the greatest of them. A wrong kernel is off by far more.
BOUNDS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-2}


@dataclass(frozen=True)
class Comparison:
    """One array beside another: the greatest difference, and the same relative to the greatest value expected.

    `labels` say of what, such as {"backend": "pt", "device": "cpu"}. The errors are infinite where there was nothing to
    compare; `problem` is None where the values are right.
    """

    labels: dict[str, str]
    error: float
    relative: float
    bound: float
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether it is within the bound."""
        return self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, which has no infinity."""
        error, relative = (x if math.isfinite(x) else None for x in (self.error, self.relative))
        rest = {"error": error, "relative": relative, "bound": self.bound, "problem": self.problem, "ok": self.ok}
        return {**self.labels, **rest}


def failure(labels: dict[str, str], bound: float, problem: str) -> Comparison:
    """A comparison to which it did not come."""
    return Comparison(labels, math.inf, math.inf, bound, problem)


def compare(labels: dict[str, str], expected: Array, found: Array, bound: float, what: str = "values") -> Comparison:
    """Compare two arrays. What is no number is right only where the two are equal to the last one."""
    if np.array_equal(expected, found, equal_nan=True):
        return Comparison(labels, 0.0, 0.0, bound, None)
    if expected.shape != found.shape:
        return failure(labels, bound, f"the {what} have another shape")
    with np.errstate(all="ignore"):
        error = float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max())
        relative = error / float(np.abs(expected).max() or 1)
    if not math.isfinite(relative):
        return failure(labels, bound, f"the {what} are not finite")
    return Comparison(labels, error, relative, bound, None if relative <= bound else f"the {what} are wrong")


def table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each, with its labels and its errors."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = list(comparisons[0].labels) if comparisons else []
    rows = Table(*names, "greatest error", "relative", "allowed", "result", box=box.SIMPLE)
    for each in comparisons:
        errors = (f"{x:.1e}" if math.isfinite(x) else "-" for x in (each.error, each.relative))
        result = Text("ok", "green") if each.ok else Text(each.problem or "", "red")
        rows.add_row(*map(Text, each.labels.values()), *errors, f"{each.bound:.0e}", result)
    return rows
