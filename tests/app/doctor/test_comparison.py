"""What doctor and verify have in common: what counts as right, and that it is valid JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from gpt2_multi.app.doctor.comparison import Comparison, compare, failure, table

RIGHT = np.array([1.0, -4.0, 2.0])
LABELS = {"backend": "pt", "dtype": "float32"}


def compared(found: np.ndarray, expected: np.ndarray = RIGHT) -> Comparison:
    return compare(LABELS, expected, found, 1e-4, "logits")


def test_an_error_is_relative_to_the_greatest_value() -> None:
    near, far = compared(RIGHT + np.array([0, 0, 2e-4])), compared(RIGHT + np.array([0, 0, 1e-3]))
    assert near.ok and near.error == pytest.approx(2e-4) and near.relative == pytest.approx(5e-5)
    assert not far.ok and far.problem == "the logits are wrong"


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (np.array([1.0, np.nan, 2.0]), "the logits are not finite"),
        (np.array([1.0, -np.inf, 2.0]), "the logits are not finite"),
        (RIGHT[:2], "the logits have another shape"),
        (np.zeros(0), "the logits have another shape"),
    ],
)
def test_what_cannot_be_compared_is_not_right(found: np.ndarray, problem: str) -> None:
    result = compared(found)
    assert (result.ok, result.problem) == (False, problem)
    row = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert row == {**LABELS, "error": None, "relative": None, "bound": 1e-4, "problem": problem, "ok": False}


def test_what_is_equal_is_right_though_it_is_not_finite() -> None:
    odd = np.array([np.nan, np.inf, 0.0])
    assert compared(odd, odd).ok and compared(odd, odd).error == 0
    assert compared(np.zeros(2), np.zeros(2)).ok


def test_the_table_has_a_row_for_each_and_prints_brackets() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table([compared(RIGHT), failure({"backend": "[red]", "dtype": "float16"}, 1e-2, "no [kernel]")]))
    assert all(part in captured.get() for part in ("backend", "ok", "[red]", "no [kernel]", "1e-04", "1e-02"))
