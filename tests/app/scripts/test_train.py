"""examples/train_pt.py beside train_flax.py: one model learns the same in both, in 3 s; going on; what it refuses.

On meshes of four processes, with compiled blocks, and over 20 steps where GPT2_MULTI_THOROUGH asks for it.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_multi.model.config import GPT2Config
from tests.support.effort import THOROUGH, some
from tests.support.fixtures import write_model

torch = pytest.importorskip("torch")
for name in ("flax", "matplotlib"):
    pytest.importorskip(name)

from click.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
STEPS = some(20, 6)
PLAN = f"--steps {STEPS} --batch-size 8 --micro-batches 2 --length 12 --learning-rate 1e-2 --warmup 2 --max-norm 0.5"
MESHES = ("data=4", "fsdp=4", "tensor=4", "data=2,fsdp=2", "data=2,tensor=2", "fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, and models without and with dropout."""
    where = tmp_path_factory.mktemp("examples")
    for name, rate in (("model", 0.0), ("drops", 0.2)):
        config = GPT2Config(
            vocab_size=1024, n_positions=16, n_embd=16, n_layer=1, n_head=4, resid_pdrop=rate, embd_pdrop=rate,
            attn_pdrop=rate, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        write_model(where / name, config, "lm", dtype=np.float32)
    (where / "text.txt").write_text("To be, or not to be: that is the question.\n" * 120, encoding="utf-8")
    return where


def options(place, output, *more, model="model"):
    files = {"--text": place / "text.txt", "--model": place / model, "--output": place / output}
    often = ("--eval-every", "2", "--save-every", "3")
    return [*(str(x) for pair in files.items() for x in pair), *PLAN.split(), *often, *more]


def example(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda *given: CliRunner().invoke(importlib.import_module(name).main, given)


def losses(place, output):
    found = json.loads((place / output / "losses.json").read_text())
    return [*found["train"], *(loss for _, loss in found["held_out"])]


@pytest.fixture(scope="module")
def known(place):
    """The losses of train_flax.py."""
    with pytest.MonkeyPatch.context() as patch:
        result = example("train_flax", patch)(*options(place, "flax"))
    assert f"after {STEPS} updates" in result.output, result.output
    return losses(place, "flax")


def test_both_examples_have_the_same_losses(place, known, monkeypatch):
    result = example("train_pt", monkeypatch)(*options(place, "pt"))
    assert f"after {STEPS} updates" in result.output, (result.output, result.exception)
    found = losses(place, "pt")
    print("farthest", np.abs(np.subtract(found, known)).max())
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-4)
    assert found[STEPS - 1] < found[0] - 1
    assert {path.name for path in (place / "pt").iterdir()} == {path.name for path in (place / "flax").iterdir()}


def test_a_run_goes_on_bit_by_bit(place, monkeypatch):
    run = example("train_pt", monkeypatch)
    for output, more in (("whole", ()), ("again", ("--stop-at", "4")), ("again", ("--resume",))):
        result = run(*options(place, output, *more, model="drops"))
        assert result.exit_code == 0, (result.output, result.exception)
    assert losses(place, "again")[:STEPS] == losses(place, "whole")[:STEPS]
    whole, again = ((place / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert whole == again
    result = run(*options(place, "again", "--resume", "--seed", "1", model="drops"))
    assert "--seed was 0, found 1" in result.output and result.exit_code == 1


@pytest.mark.parametrize(
    ("text", "output", "more", "words"),
    [
        ("bytes", "a", (), "not readable as UTF-8"),
        ("short", "a", (), "ids: expected at least"),
        ("short", "old", (), "has the states of a run; add --resume, or take another folder"),
        ("short", "short", (), "expected a folder to write in"),
        ("short", "a", ("--stop-at", "0"), "Invalid value for '--stop-at'"),
        ("short", "a", ("--micro-batches", "3"), "--batch-size 8 is not a multiple of --micro-batches"),
        ("text.txt", "a", ("--mesh", "data=2"), "expected a process group, found none; start the program by torchrun"),
    ],
)
def test_what_it_cannot_use_is_one_sentence(text, output, more, words, place, monkeypatch):
    (place / "bytes").write_bytes(b"\xff\xfe")
    (place / "short").write_text("To be")
    (place / "old" / "states" / "step-000000003").mkdir(parents=True, exist_ok=True)
    result = example("train_pt", monkeypatch)(*options(place, output, "--text", str(place / text), *more))
    assert result.exit_code and words in result.output, (result.output, result.exception)


def test_both_have_the_same_options(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    pt, flax = (importlib.import_module(name).main for name in ("train_pt", "train_flax"))
    own = {"is_compiled", "scan_layers", "coordinator", "processes", "process_id", "output"}  # torchrun says the rest
    alike = [[(param.opts, param.default) for param in main.params if param.name not in own] for main in (pt, flax)]
    assert alike[0] == alike[1] and len(alike[0]) == 17


if THOROUGH:

    @pytest.mark.parametrize(
        "more", [*(("--mesh", mesh) for mesh in MESHES), ("--compile", "--mesh", "fsdp=2,tensor=2")]
    )
    def test_four_processes_have_the_losses_of_one(more, place, known):
        output = "".join(more)
        start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
        given = options(place, output, *more)
        subprocess.run([*start, str(EXAMPLES / "train_pt.py"), *given], check=True, timeout=900)
        np.testing.assert_allclose(losses(place, output), known, rtol=0, atol=1e-4)
