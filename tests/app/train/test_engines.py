"""Each framework's engine: the losses are those of the others, and what it goes on from is all that it is."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_multi.app.train.engines import engine as engines
from gpt2_multi.app.train.plan import Plan
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.model.config import GPT2Config
from tests.support.effort import THOROUGH
from tests.support.fixtures import write_model

NEEDED = {"pt": "torch", "tf": "tensorflow", "flax": "flax"}
CONFIG = GPT2Config(
    vocab_size=40, n_positions=12, n_embd=16, n_layer=1, n_head=2, eos_token_id=None, bos_token_id=None
)  # whose dropout is 0.1
PLAN = Plan(
    backend="pt", dtype="float32", data="random", steps=50, batch_size=4, accumulate=2, length=12, learning_rate=1e-2,
    warmup=5, weight_decay=0.1, max_norm=1.0, lora=0, seed=3, device="cpu",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "model"
    write_model(folder, CONFIG, "lm", dtype=np.float64)
    return folder


@pytest.fixture(scope="module")
def build(model: Path) -> Callable[..., Any]:
    """An engine of a plan with these changes."""

    def made(framework: str, folder: Path = model, **changes: Any) -> Any:
        pytest.importorskip(NEEDED[framework])
        if framework == "pt" and changes.get("lora"):
            pytest.importorskip("peft")
        if framework == "tf" and not THOROUGH:  # XLA compiles for longer than a tiny model computes
            importlib.import_module("gpt2_multi.app.train.engines.tf").is_compiled = lambda strategy: False
        plan = replace(PLAN, backend=framework, **changes)
        return engines.build(plan, folder, engines.join(plan.backend, plan.device))

    return made


def batch(step: int) -> dict[str, np.ndarray]:
    """Two parts of two windows, (2, 2, 12), which differ in how many labels count."""
    ids = np.random.default_rng(step).integers(0, CONFIG.vocab_size, (2, 2, 12)).astype(np.int32)
    labels = ids.copy()
    labels[0, 1, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def losses(engine: Any, steps: range) -> list[list[float]]:
    """The loss and the norm of the gradients of each step."""
    return [[float(x) for x in engine.train(batch(step), step, PLAN.rate(step))] for step in steps]


@pytest.mark.parametrize(("dtype", "lora", "bound"), [("float32", 0, 1e-4), ("float64", 0, 1e-9), ("float64", 2, 1e-9)])
def test_the_frameworks_agree(build: Callable[..., Any], dtype: str, lora: int, bound: float, capsys: Any) -> None:
    """Over a whole run without dropout; gradients are clipped in some of its steps, and not in others."""
    found = {}
    for framework in NEEDED:
        engine = build(framework, dtype=dtype, lora=lora, dropout=0.0)
        found[framework] = np.array(losses(engine, range(PLAN.steps)))
    (name, one), *others = found.items()
    assert one[-5:, 0].mean() < one[:5, 0].mean() and (one[:, 1] > 1).any() and (one[:, 1] < 1).any()
    for other, each in others:
        difference = np.abs(each - one).max(0)[0]
        with capsys.disabled():
            print(
                f"\n{PLAN.steps} steps in {dtype}{' with LoRA' * bool(lora)}, {name} and {other}: {difference:.1e}",
                end="",
            )
        assert difference <= bound


@pytest.mark.parametrize(("dtype", "lora"), [("float32", 0), ("bfloat16", 2)])
@pytest.mark.parametrize("framework", NEEDED)
def test_what_goes_on_is_what_did_not_stop(
    build: Callable[..., Any], framework: str, dtype: str, lora: int, tmp_path: Path
) -> None:
    """Bit by bit, with dropout, whose noise differs from step to step."""
    engine = build(framework, dtype=dtype, lora=lora)
    first = losses(engine, range(3))
    engine.save_state(tmp_path)
    other = build(framework, dtype=dtype, lora=lora)
    other.load_state(tmp_path)
    assert losses(engine, range(3, 6)) == losses(other, range(3, 6))
    assert len({loss for loss, _ in first}) == 3
    same = [float(other.train(batch(9), step, 0.0).loss) for step in (7, 8)]
    assert same[0] != same[1] and all(map(math.isfinite, same))


@pytest.mark.parametrize("framework", NEEDED)
def test_a_saved_model_computes_what_the_engine_does(build: Callable[..., Any], framework: str, tmp_path: Path) -> None:
    engine = build(framework, dtype="float64", lora=2)
    losses(engine, range(3))
    engine.save_model(tmp_path)
    given = {name: value[0] for name, value in batch(9).items()}
    (total, count), (saved, _) = (
        each.evaluate(given) for each in (engine, build(framework, tmp_path, dtype="float64"))
    )
    before = build(framework, dtype="float64").evaluate(given)[0]
    assert float(count) == 11 + 3
    assert float(total) == pytest.approx(float(saved), abs=1e-9)
    assert abs(float(total) - float(before)) > 1e-3


@pytest.mark.parametrize("framework", NEEDED)
def test_a_state_of_another_model_and_a_damaged_one_are_refused(
    build: Callable[..., Any], framework: str, tmp_path: Path
) -> None:
    engine = build(framework)
    engine.save_state(tmp_path)
    (state,) = tmp_path.iterdir()
    with pytest.raises(CheckpointError, match="the state is of another model"):
        build(framework, lora=2).load_state(tmp_path)
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        engine.load_state(tmp_path)


@pytest.mark.parametrize(
    ("framework", "changes", "sentence"),
    [
        (
            "pt",
            {"mesh": "data=2,tensor=2"},
            "data=2,tensor=2: expected 4 processes, found one; start it by torch",
        ),
        ("pt", {"mesh": "data=1", "lora": 2}, "--lora: PEFT's adapters want a whole model, which --mesh data=1 cuts"),
        ("pt", {"mesh": "rows=1"}, "expected the axes data, fsdp, tensor"),
        ("tf", {"mesh": "data=2"}, "--mesh data=2: TensorFlow has the whole model on each device"),
        ("tf", {"device": "gpu:9"}, "--device: expected one of cpu, found 'gpu:9'"),
        ("flax", {"device": "gpu:9"}, "--device: expected one of cpu, or with a number such as cpu:0, found 'gpu:9'"),
        ("flax", {"device": "cpu:7"}, "found 'cpu:7'"),
        ("flax", {"mesh": "data=3"}, "sizes whose product is the number of devices"),
        ("flax", {"mesh": "rows=1"}, "expected the axes data, fsdp, tensor"),
    ],
)
def test_what_an_engine_cannot_do_is_a_sentence(
    build: Callable[..., Any], framework: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        build(framework, **changes)


def test_a_plan_of_another_version_is_refused() -> None:
    assert Plan.from_dict(PLAN.to_dict()) == PLAN
    with pytest.raises(CheckpointError, match="found others \\(seed\\)"):
        Plan.from_dict({name: value for name, value in PLAN.to_dict().items() if name != "seed"})


def test_the_rate_is_that_of_the_library() -> None:
    pytest.importorskip("torch")
    from gpt2_multi.pt.training import cosine_schedule

    expected = [1e-2 * cosine_schedule(step, 50, 5) for step in range(51)]
    assert [PLAN.rate(step) for step in range(51)] == pytest.approx(expected, rel=1e-12)


def test_a_team_that_ends_lets_go_of_what_it_wrapped() -> None:
    """Else the last to hold the group would be C++ that holds Python, for which threads of the group may wait."""
    torch = pytest.importorskip("torch")
    import torch.distributed as dist

    from gpt2_multi.app.train.engines.pt import PTTeam

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    team = PTTeam("cpu")
    wrapper = team.wrapped(torch.nn.Linear(2, 1))
    wrapper(torch.ones(1, 2)).sum().backward()
    team.close()
    assert not dist.is_initialized() and not {"reducer", "logger"} & vars(wrapper).keys()


if THOROUGH:
    DEVICES = """
import sys
import numpy as np
import tensorflow as tf
from dataclasses import replace
from pathlib import Path
from gpt2_multi.app.train.engines import tf as engine
from tests.app.train.test_engines import PLAN, batch

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
row = {name: x[:1, :1] for name, x in batch(0).items()}
engine.is_compiled = lambda strategy: False  # XLA, which would compile the step of one device, draws otherwise
for devices, process in ((["cpu:0"], 0), (["cpu:0"], 1), (["cpu:0", "cpu:1"], 0)):
    engine.strategy_of = lambda *_: tf.distribute.MirroredStrategy(devices)
    team = engine.TFTeam("cpu")
    team.process = process
    made = engine.TFEngine(replace(PLAN, backend="tf", dtype="float64"), Path(sys.argv[1]), team)
    rows = {name: np.concatenate([x] * len(devices), 1) for name, x in row.items()}
    print(float(made.train(rows, 3, 1e-3)[0]))
"""

    def test_each_device_of_tensorflow_drops_by_itself(model: Path) -> None:
        """Two devices that are given one row have the mean of the losses that two processes have of it."""
        pytest.importorskip("tensorflow")
        done = subprocess.run([sys.executable, "-c", DEVICES, str(model)], check=True, capture_output=True, text=True)
        first, second, both = map(float, done.stdout.split()[-3:])
        assert abs(first - second) > 1e-3 and both == pytest.approx((first + second) / 2, abs=1e-12)
