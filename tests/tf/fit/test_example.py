"""examples/finetune_keras.py as its users run it: files, resumption, samples, and one sentence for bad input."""

import csv
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "examples" / "finetune_keras.py"
SMALL = ["--length", "16", "--batch-size", "4", "--sample-tokens", "4"]
FILES = {
    "config.json", "generation_config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json",
    "checkpoint.keras", "best.weights.h5", "history.csv", "loss.svg",
}  # fmt: skip


def started(*options):
    """The program on these options as a process, with this copy of the library."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, SCRIPT, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run(monkeypatch, *options):
    """The program on these options in this process, which has TensorFlow already."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    where = tmp_path_factory.mktemp("text") / "a.txt"
    where.write_text("What say you, my lord?\nI say nothing, my good friend.\n" * 40, encoding="utf-8")
    return where


@pytest.fixture(scope="module")
def first(text, tmp_path_factory):
    """One epoch."""
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    done = started(text, "--out", out, "--epochs", 1, *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def losses(out):
    with (out / "history.csv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file)]


def test_one_epoch_writes_the_model_and_its_records(first):
    from gpt2_multi import GPT2Tokenizer
    from gpt2_multi.tf import TFGPT2LMHeadModel

    out, printed = first
    assert {file.name for file in out.iterdir()} >= FILES
    assert re.search(r"before: .+\n.*after: .+", printed, re.DOTALL) and "val_loss: " in printed
    model, tokenizer = TFGPT2LMHeadModel.from_pretrained(out), GPT2Tokenizer.from_pretrained(out)
    ids = np.array([tokenizer("What say you, my lord?\nI say nothing, my good friend.\n").input_ids])
    before = TFGPT2LMHeadModel.from_pretrained("demo")
    assert float(model(ids, labels=ids).loss) < float(before(ids, labels=ids).loss) - 0.5


def test_the_plot_can_be_read(first):
    picture = (first[0] / "loss.svg").read_text()
    for words in ("epoch", "loss (nats per token)", "training text", "held-out text"):
        assert f"<!-- {words} -->" in picture


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2
def test_it_resumes(first, text, monkeypatch, capsys):
    out, before = first[0], losses(first[0])
    run(monkeypatch, text, "--out", out, "--epochs", 2, *SMALL)
    after, printed = losses(out), capsys.readouterr().out
    assert after[:1] == before and len(after) == 2 and after[1] < after[0]
    assert "Epoch 2/2" in printed and "Epoch 1/2" not in printed


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"no\.txt: No such file or directory; give a UTF-8 text file"),
        (b"too short", r"no\.txt: its \d tokens make 0 blocks of 16, but one is needed to learn and one to hold out"),
        (b"\xff\xfe", r"no\.txt: not UTF-8 \(invalid start byte at byte 0\); convert it first"),
    ],
)
def test_unusable_texts_are_one_sentence(content, sentence, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "no.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=sentence) as left:  # whose text is what Python prints, without a traceback
        run(monkeypatch, tmp_path / "no.txt", "--out", tmp_path / "out", *SMALL)
    assert "\n" not in str(left.value)
    assert not (tmp_path / "out").exists()
