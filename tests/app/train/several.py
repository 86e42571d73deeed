"""What tests/app/train/test_processes.py runs in each of several processes: a few steps, a state, a model; prints JSON.

python -m tests.app.train.several BACKEND MODEL_FOLDER OUTPUT MESH
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.app.train.engines.engine import build, join
from gpt2_multi.app.train.plan import Plan

ROWS, PARTS, LENGTH, WORDS = 8, 2, 12, 40


def plan_of(backend: str, **changes: Any) -> Plan:
    """Without dropout, whose noise depends on which rows a process has; gradients are clipped."""
    options: dict[str, Any] = {
        "dtype": "float64", "data": "random", "steps": 6, "batch_size": ROWS, "accumulate": PARTS, "length": LENGTH,
        "learning_rate": 1e-2, "warmup": 2, "weight_decay": 0.1, "max_norm": 0.5, "lora": 0, "seed": 3, "dropout": 0.0,
        "device": "", **changes,
    }  # fmt: skip
    return Plan(backend=backend, **options)


def batch(step: int, process: int = 0, processes: int = 1) -> dict[str, np.ndarray]:
    """A process's rows of a batch, (PARTS, ROWS / PARTS / processes, LENGTH): each has as many labels that count."""
    ids = np.random.default_rng(step).integers(0, WORDS, (PARTS, ROWS // PARTS, LENGTH)).astype(np.int32)
    labels = ids.copy()
    labels[0, :, 8:] = -100
    own = slice(process * ROWS // PARTS // processes, (process + 1) * ROWS // PARTS // processes)
    return {"input_ids": ids[:, own], "labels": labels[:, own]}


def run(backend: str, folder: Path, output: Path, mesh: str = "") -> dict[str, Any]:
    """Three steps, a state that goes on for three more, once and again, and a model."""
    team = join(backend, "")
    plan = plan_of(backend, mesh=mesh)
    engine, found = build(plan, folder, team), {"processes": team.processes, "process": team.process}

    share = team.share(mesh)

    def steps(engine: Any, numbers: range) -> list[list[float]]:
        rows = {step: batch(step, *share) for step in numbers}
        return [[float(x) for x in engine.train(rows[step], step, plan.rate(step))] for step in numbers]

    found["losses"] = steps(engine, range(3))
    state, model = (output / name if team.process == 0 else None for name in ("state", "model"))
    if state is not None:
        state.mkdir(parents=True)
    engine.save_state(state)
    team.agreed(False)  # the folder is there
    found["losses"] += steps(engine, range(3, 6))
    again = build(plan, folder, team)
    again.load_state(output / "state")
    found["again"] = steps(again, range(3, 6))
    engine.save_model(model)
    held = {name: value[1] for name, value in batch(9, *share).items()}
    found["held"] = [float(x) for x in engine.evaluate(held)]
    found["agreed"] = [team.agreed(team.process == 1), team.agreed(False)]
    found["devices"] = engine.devices
    team.close()
    return found


if __name__ == "__main__":
    backend, folder, output, *mesh = sys.argv[1:]
    print(json.dumps(run(backend, Path(folder), Path(output), *mesh)))
