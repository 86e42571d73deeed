"""Each framework's engine: what it goes on from is all that it is, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt2_multi.app.train.engines import engine as engines
from gpt2_multi.app.train.plan import Plan
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files.hub import DEMO

pytest.importorskip("torch")
PLAN = Plan(
    backend="pt", dtype="float32", data="random", steps=6, batch_size=4, accumulate=2, length=16, learning_rate=1e-3,
    warmup=2, weight_decay=0.1, max_norm=1.0, lora=0, seed=3, device="cpu",
)  # fmt: skip


def build(plan: Plan, folder: Path):
    return engines.build(plan, folder, engines.join(plan.backend, plan.device))


def batch(step: int) -> dict[str, np.ndarray]:
    """Two parts of two windows, (2, 2, 16)."""
    ids = np.random.default_rng(step).integers(0, 1000, (2, 2, 16)).astype(np.int32)
    return {"input_ids": ids, "labels": ids}


def losses(engine, steps: range) -> list[float]:
    return [float(engine.train(batch(step), step, PLAN.rate(step)).loss) for step in steps]


@pytest.mark.parametrize(("dtype", "lora"), [("float32", 0), ("bfloat16", 0), ("float32", 2)])
def test_what_goes_on_is_what_did_not_stop(dtype: str, lora: int, tmp_path: Path) -> None:
    if lora:
        pytest.importorskip("peft")
    plan = replace(PLAN, dtype=dtype, lora=lora)
    engine = build(plan, DEMO)
    first = losses(engine, range(3))
    engine.save_state(tmp_path)
    other = build(plan, DEMO)
    other.load_state(tmp_path)
    assert losses(engine, range(3, 6)) == losses(other, range(3, 6))
    assert len(set(first)) == 3


def test_a_saved_model_computes_what_the_engine_does(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    engine = build(replace(PLAN, dtype="float64", lora=2, learning_rate=0.1), DEMO)
    losses(engine, range(3))
    engine.save_model(tmp_path)
    given = {name: value[0] for name, value in batch(9).items()}
    before, (total, count), (saved, _) = (
        build(replace(PLAN, dtype="float64"), folder).evaluate(given) if folder else engine.evaluate(given)
        for folder in (DEMO, None, tmp_path)
    )
    assert float(count) == 2 * 15
    assert float(total) == pytest.approx(float(saved), abs=1e-9)
    assert abs(float(total) - float(before[0])) > 1e-3


def test_a_state_of_another_model_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    build(PLAN, DEMO).save_state(tmp_path)
    (state,) = tmp_path.iterdir()
    adapters = build(replace(PLAN, lora=2), DEMO) if pytest.importorskip("peft") else None
    with pytest.raises(CheckpointError, match="the state is of another model"):
        adapters.load_state(tmp_path)
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        build(PLAN, DEMO).load_state(tmp_path)


def test_what_pytorch_cannot_do_is_a_sentence() -> None:
    with pytest.raises(InputError, match="--mesh data=2: PyTorch has the whole model in each process"):
        build(replace(PLAN, mesh="data=2"), DEMO)


def test_a_plan_of_another_version_is_refused() -> None:
    assert Plan.from_dict(PLAN.to_dict()) == PLAN
    with pytest.raises(CheckpointError, match="found others \\(seed\\)"):
        Plan.from_dict({name: value for name, value in PLAN.to_dict().items() if name != "seed"})


def test_the_rate_is_that_of_the_library() -> None:
    from gpt2_multi.pt.training import cosine_schedule

    expected = [1e-3 * cosine_schedule(step, 6, 2) for step in range(7)]
    assert [PLAN.rate(step) for step in range(7)] == pytest.approx(expected, rel=1e-12)
