"""examples/train_pt.py, train_tf.py and train_flax.py: one model learns the same in all; going on; what they refuse.

TensorFlow has a process of its own, whose CPU is two devices. Meshes of four processes, two workers, what is compiled,
and 20 steps are tried where GPT2_MULTI_THOROUGH asks for it.
"""

import importlib.util
import json
import os
import shutil
import socket
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
if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("TensorFlow is not installed", allow_module_level=True)

from click.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
STEPS = some(20, 6)
PLAN = f"--steps {STEPS} --batch-size 8 --micro-batches 2 --length 12 --learning-rate 1e-2 --warmup 2 --max-norm 0.5"
PAIR = ("--mesh", "data=2")
MESHES = ("data=4", "fsdp=4", "tensor=4", "data=2,fsdp=2", "data=2,tensor=2", "fsdp=2,tensor=2")


REFUSED = [  # text, output, more options, and words of the sentence
    ("bytes", "a", (), "not readable as UTF-8"),
    ("short", "a", (), "ids: expected at least"),
    ("short", "old", (), "has the states of a run; add --resume, or take another folder"),
    ("short", "short", (), "expected a folder to write in"),
    ("short", "a", ("--stop-at", "0"), "Invalid value for '--stop-at'"),
    ("short", "a", ("--micro-batches", "3"), "--batch-size 8 is not a multiple of --micro-batches"),
]
# Arguments of runs of train_tf.py are read as JSON; what each gave, and the program's options, are printed so.
PROGRAM = """
import json, sys
import tensorflow as tf
from click.testing import CliRunner
import train_tf
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": sys.argv[1] == "quick"})
runs = [CliRunner().invoke(train_tf.main, given) for given in json.load(sys.stdin)]
options = [(param.name, param.opts, param.default) for param in train_tf.main.params]
given = [(run.exit_code, f"{run.output} {run.exception}") for run in runs]
print(json.dumps({"runs": given, "options": options}, default=str))
"""


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
    (where / "bytes").write_bytes(b"\xff\xfe")
    (where / "short").write_text("To be")
    (where / "old" / "states" / "step-000000003").mkdir(parents=True)  # as PyTorch has it, and TensorFlow
    (where / "old" / "states" / "step-3.index").write_text("damaged")
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
    [*REFUSED, ("text.txt", "a", PAIR, "expected a process group, found none; start the program by torchrun")],
)
def test_what_it_cannot_use_is_one_sentence(text, output, more, words, place, monkeypatch):
    result = example("train_pt", monkeypatch)(*options(place, output, "--text", str(place / text), *more))
    assert result.exit_code and words in result.output, (result.output, result.exception)


# --- TensorFlow

DROPS = PAIR if THOROUGH else ()  # two devices take twice as long to trace
RUNS = {  # output, more options, model
    "two": ("two", PAIR, "model"),
    "whole": ("tf-whole", DROPS, "drops"),
    "part": ("tf-again", (*DROPS, "--stop-at", "4"), "drops"),
    "rest": ("tf-again", (*DROPS, "--resume"), "drops"),
    "other": ("tf-again", (*DROPS, "--resume", "--seed", "1"), "drops"),
    **({"compiled": ("compiled", ("--compile",), "model")} if THOROUGH else {}),
}
TF_REFUSED = [
    *REFUSED,
    ("text.txt", "a", ("--mesh", "data=2,fsdp=2"), "expected data alone, as TensorFlow has the whole model"),
    ("text.txt", "a", (*PAIR, "--batch-size", "6"), "rows that 2 devices share equally, found 3; change the batch or"),
    ("text.txt", "a", (*PAIR, "--compile"), "--compile: XLA compiles a step of one device, found 2; leave it out"),
    ("text.txt", "old", (*PAIR, "--resume"), "the state of step 3 is damaged, or of another model"),
]


@pytest.fixture(scope="module")
def found(place, known):
    """What runs of train_tf.py gave, (exit code, output) by name, those that are refused by number; and its options."""
    shutil.copy(place / "flax" / "losses.json", place / "old")  # of the plan that TensorFlow has, too
    given = {name: options(place, output, *more, model=model) for name, (output, more, model) in RUNS.items()}
    for number, (text, output, more, _) in enumerate(TF_REFUSED):
        given[number] = options(place, output, "--text", str(place / text), *more)
    command = [sys.executable, "-c", PROGRAM, "thorough" if THOROUGH else "quick"]
    pipes = {"input": json.dumps([*given.values()]), "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=EXAMPLES, check=False, timeout=900, env=environment(), **pipes)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    return {**dict(zip(given, answer["runs"], strict=True)), "options": answer["options"]}


def environment(**more):
    """That of a process of TensorFlow, with this copy of the library."""
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3", **more}


@pytest.mark.parametrize("name", ["two", "compiled"] if THOROUGH else ["two"])
def test_tensorflow_has_the_same_losses(name, place, known, found):
    assert f"after {STEPS} updates" in found[name][1], found[name]
    print("farthest", name, np.abs(np.subtract(losses(place, name), known)).max())
    np.testing.assert_allclose(losses(place, name), known, rtol=0, atol=1e-4)
    assert {path.name for path in (place / name).iterdir()} == {path.name for path in (place / "flax").iterdir()}


def test_a_run_of_tensorflow_goes_on_bit_by_bit(place, found):
    assert [found[name][0] for name in ("whole", "part", "rest")] == [0, 0, 0], found
    assert losses(place, "tf-again")[:STEPS] == losses(place, "tf-whole")[:STEPS]
    whole, again = ((place / name / "model.safetensors").read_bytes() for name in ("tf-whole", "tf-again"))
    assert whole == again
    assert found["other"][0] == 1 and "--seed was 0, found 1" in found["other"][1]


def test_what_tensorflow_cannot_use_is_one_sentence(found):
    for number, (*_, words) in enumerate(TF_REFUSED):
        code, printed = found[number]
        assert code and words in printed.replace("\n", " "), (words, printed)


def test_all_have_the_same_options(found, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    pt, flax = (importlib.import_module(name).main.params for name in ("train_pt", "train_flax"))
    own = {
        "is_compiled",
        "scan_layers",
        "coordinator",
        "processes",
        "process_id",
        "output",
    }  # others are told otherwise
    several = [[(param.name, param.opts, param.default) for param in params] for params in (pt, flax)]
    alike = [
        [(opts, str(default)) for name, opts, default in params if name not in own]
        for params in (*several, found["options"])
    ]
    assert alike[0] == alike[1] == alike[2] and len(alike[0]) == 17


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

    def test_two_workers_of_tensorflow_have_the_losses_of_one(place, known):
        with socket.socket() as first, socket.socket() as second:
            for each in (first, second):
                each.bind(("127.0.0.1", 0))
            workers = [f"127.0.0.1:{each.getsockname()[1]}" for each in (first, second)]
        command = [sys.executable, str(EXAMPLES / "train_tf.py"), *options(place, "workers")]
        tasks = [{"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}} for index in range(2)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running = [subprocess.Popen(command, env=environment(TF_CONFIG=json.dumps(task)), **pipes) for task in tasks]
        try:
            answers = [process.communicate(timeout=900) for process in running]
        finally:
            for process in running:
                process.kill()
        assert [process.returncode for process in running] == [0, 0], answers
        assert [f"after {STEPS} updates" in printed for printed, _ in answers] == [True, False]
        print("farthest workers", np.abs(np.subtract(losses(place, "workers"), known)).max())
        np.testing.assert_allclose(losses(place, "workers"), known, rtol=0, atol=1e-4)
