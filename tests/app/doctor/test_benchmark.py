"""`gpt2-multi benchmark`: what it measures, and that what cannot be measured is a row of its own."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2_multi.app import backends
from gpt2_multi.app.doctor import floor, speed
from gpt2_multi.app.train.engines import engine
from gpt2_multi.model.config import GPT2Config
from tests.app.conftest import good, needs_pt, refusal
from tests.support.effort import THOROUGH

WHAT = ["training", "reading a prompt", "writing, 1 at once", "writing, 8 at once"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PATIENCE", 0)
    monkeypatch.setattr(floor, "bandwidth", lambda real=floor.bandwidth: real(4, 2))


@needs_pt
def test_each_backend_is_measured_beside_its_memory(tiny: Path) -> None:
    report = json.loads(good("benchmark", "--model", tiny, "--backend", "pt", "--json"))
    assert report["model"] == str(tiny) and report["bytes_per_second"] > 1e6
    assert [(row["backend"], row["what"], row["problem"]) for row in report["speeds"]] == [
        ("pt", what, None) for what in WHAT
    ]
    for row in report["speeds"]:
        assert row["tokens_per_second"] > 0 and (row["operations_per_second"] is None) == (row["what"] in WHAT[2:])
        assert row["ratio"] == (row["limit"] and row["tokens_per_second"] / row["limit"])
    one, eight = (row["limit"] for row in report["speeds"][2:])
    assert 0 < one < eight < 8 * one  # the weights are read once, and the keys of each
    text = good("benchmark", "--model", tiny, "--backend", "pt")
    assert all(what in text for what in WHAT) and f"{report['parameters'] / 1e6:,.1f} million parameters" in text


@needs_pt
def test_what_cannot_be_measured_is_said_and_the_rest_is_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise MemoryError("no room\nfor moments")

    monkeypatch.setattr(engine, "build", failing)
    rows = json.loads(good("benchmark", "--model", tiny, "--backend", "pt", "--json"))["speeds"]
    assert rows[0]["problem"] == "MemoryError: no room for moments" and rows[0]["tokens_per_second"] is None
    assert all(row["tokens_per_second"] > 0 for row in rows[1:])
    assert refusal("benchmark", "--model", tiny, "--backend", "pt", "--device", "cuda:9").startswith("device: PyTorch")


if THOROUGH:

    @needs_pt
    def test_each_backend_has_a_process_whose_end_is_said(tiny: Path) -> None:
        bench = speed.Bench(tiny, GPT2Config.from_pretrained(tiny), "pt", "cpu", "float32", 1e9)
        rows = list(speed.measured([bench, bench]))
        assert [row.what for row in rows] == WHAT * 2 and all(row.tokens_per_second for row in rows)
        (lost, *rest) = speed.measured([replace(bench, dtype=Ending()), bench])  # as memory that is short ends it
        assert lost.problem is not None and "ended by the system" in lost.problem and len(rest) == 4


class Ending:
    """What ends the process that it comes to."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


def test_without_a_framework_there_is_nothing_to_measure(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed", list)
    assert refusal("benchmark", "--model", tiny).startswith("no framework is installed; to compute with a model: pip")


def test_the_bytes_of_a_token_are_those_of_its_parameters() -> None:
    config = GPT2Config(vocab_size=5, n_positions=7, n_embd=4, n_layer=2, n_head=2)
    block = (4 * 12 + 12) + (4 * 4 + 4) + (4 * 16 + 16) + (16 * 4 + 4) + 4 * 4  # kernels with biases, two norms
    assert floor.weights(config, 2) == 2 * (5 * 4 + 2 * block + 2 * 4)
    assert floor.cache(config, 10, 2) == 2 * 2 * 2 * 4 * 10
