"""The demo model in the package: its files, its numbers, what it writes; and the script that makes one."""

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gpt2_multi.files.hub import DEMO
from gpt2_multi.model import reference
from gpt2_multi.model.checkpoint import read_weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import parameter_count
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support.shared_data import shared

torch = pytest.importorskip("torch")
pt = pytest.importorskip("gpt2_multi.pt")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "examples" / "train_demo.py"
FILES = {
    "README.md", "config.json", "curve.svg", "generation_config.json", "merges.txt", "model.safetensors",
    "tokenizer_config.json", "training.json", "vocab.json",
}  # fmt: skip
TINY = "--vocab-size 300 --n-positions 32 --n-embd 16 --n-layer 2 --n-head 2 --n-inner 24 --batch-size 2 --steps 6"


@pytest.fixture(scope="module")
def model():
    return pt.GPT2LMHeadModel.from_pretrained("demo")


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(DEMO)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The training script as a module."""
    pytest.importorskip("tokenizers")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import train_demo

    return train_demo


def write(model, tokenizer: GPT2Tokenizer, prompt: str, new: int, **options) -> str:
    """What the model makes of a prompt."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    return tokenizer.decode(model.generate(ids, max_new_tokens=new, **options)[0])


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_is_small_and_every_file_of_it_is_packaged():
    files = list(DEMO.iterdir())
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gpt2_multi"]
    assert {file.name for file in files} == FILES
    assert all(any(fnmatch.fnmatch(f"demo/{file.name}", pattern) for pattern in patterns) for file in files)
    assert sum(file.stat().st_size for file in files) < 4_000_000


def test_the_weights_are_stored_in_float16():
    weights = read_weights(DEMO, GPT2Config.from_json_file(DEMO / "config.json"), "lm")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float16)}


def test_pytorch_agrees_with_the_oracle(model, tokenizer):
    config = GPT2Config.from_pretrained("demo")
    weights = {name: array.astype(np.float64) for name, array in read_weights(DEMO, config, "lm").items()}
    ids = np.array([tokenizer("KING RICHARD III:\nNow is the winter of our discontent").input_ids])
    expected = reference.lm_logits(config, weights, reference.forward(config, weights, ids).last_hidden_state)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits
    assert logits.dtype == torch.float32
    assert np.abs(logits.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_tokenizer_has_gpt2s_order_of_ids(tokenizer):
    config = GPT2Config.from_pretrained("demo")
    assert tokenizer.convert_ids_to_tokens([0, 1, 255, 256]) == ["!", '"', "\u0143", "\u0120t"]
    assert tokenizer.eos_token_id == config.eos_token_id == config.bos_token_id == len(tokenizer) - 1
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.model_max_length == config.n_positions
    assert tokenizer.decode(tokenizer("Thou naïve knave 🎭\n").input_ids) == "Thou naïve knave 🎭\n"


# --- what it says and writes -----------------------------------------------------------------------------------------


def test_the_card_is_what_the_script_makes_of_its_measurements(script):
    import model_card

    facts = json.loads((DEMO / "training.json").read_text())
    assert (DEMO / "README.md").read_text(encoding="utf-8") == model_card.card(facts)
    assert (DEMO / "curve.svg").read_text(encoding="utf-8") == model_card.draw(facts["curve"])


def test_the_card_counts_the_parameters_of_the_table():
    count = parameter_count(GPT2Config.from_pretrained("demo"))
    assert f"\n{count:,} parameters" in (DEMO / "README.md").read_text(encoding="utf-8")


def test_the_card_states_the_loss_of_the_weights(script, model):
    facts = json.loads((DEMO / "training.json").read_text())
    size = facts["model"]
    data = script.prepare(shared("text", "tinyshakespeare.txt"), size["vocab_size"], size["n_positions"])
    assert script.mean_loss(model, data.held_ids) == pytest.approx(facts["loss"]["held_out"], abs=5e-4)
    assert script.describe(data) == facts["text"]


def test_greedy_choice_gives_the_same_text_again(model, tokenizer):
    texts = {write(model, tokenizer, "ROMEO:", 30, do_sample=False) for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_reads_like_a_play(model, tokenizer, seed):
    text = write(
        model, tokenizer, "ROMEO:", 240, do_sample=True, temperature=0.8, top_k=40, seed=seed, eos_token_id=None
    )
    lines = text.splitlines()
    assert len(lines) > 8
    assert re.search(r"^[A-Z][A-Z ]+:$", "\n".join(lines[1:]), re.MULTILINE)
    assert all(len(line) < 80 for line in lines)


def test_most_words_of_a_sample_are_words_of_the_text(model, tokenizer, script):
    text = shared("text", "tinyshakespeare.txt").read_text(encoding="utf-8")
    samples = {
        str(seed): write(model, tokenizer, "KING", 200, do_sample=True, temperature=0.8, top_k=40, seed=seed)
        for seed in range(3)
    }
    assert script.known_words(samples, text) > 0.9


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """Some 20 kB that look like a play."""
    speeches = [
        f"SPEAKER {'ABCDEFG'[i % 7]}:\nLine {i * 7919 % 1000} of the play, and {i * 31 % 17} more." for i in range(400)
    ]
    path = tmp_path / "play.txt"
    path.write_text("\n\n".join(speeches) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, any warning an error."""
    command = [sys.executable, "-W", "error", SCRIPT, *arguments]
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([str(part) for part in command], **options)


def test_the_script_writes_a_folder_that_loads(play, tmp_path):
    pytest.importorskip("tokenizers")
    out = tmp_path / "made"
    done = run("--text", play, "--output", out, "--eval-every", 3, *TINY.split())
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert {file.name for file in out.iterdir()} == FILES
    tokenizer = GPT2Tokenizer.from_pretrained(out)
    made = pt.GPT2LMHeadModel.from_pretrained(out)
    assert len(tokenizer) == made.config.vocab_size == 300
    assert write(made, tokenizer, "SPEAKER A:", 5).startswith("SPEAKER A:")
    assert f"{parameter_count(made.config):,} parameters" in (out / "README.md").read_text(encoding="utf-8")


def test_the_script_keeps_the_weights_with_the_least_loss(script, play, tmp_path, monkeypatch):
    data = script.prepare(play, 300, 32)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24}
    losses, seen = iter([3.0, 1.0, 2.0]), []

    def measured(model, ids: torch.Tensor) -> float:
        seen.append(model.transformer.wte.weight.detach().clone())
        return next(losses)

    monkeypatch.setattr(script, "mean_loss", measured)
    plan = script.Plan(3, batch_size=2, learning_rate=0.01, weight_decay=0.0, warmup=0, eval_every=1, seed=0)
    curve = script.train(pt.GPT2LMHeadModel(script.configure(data.tokenizer, 0.0, sizes)), data, plan, tmp_path)
    assert curve.best.step == 2
    assert not seen[1].equal(seen[2])
    assert pt.GPT2LMHeadModel.from_pretrained(tmp_path).transformer.wte.weight.equal(seen[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: there is no such text; give one with --text"),
        (["--text", "{short}"], "too short for windows of 256 tokens"),
        (["--text", "{play}", "--n-head", "5"], "n_head"),
    ],
)
def test_bad_input_is_a_sentence(script, play, tmp_path, arguments, says):
    from click.testing import CliRunner

    (tmp_path / "short.txt").write_text("To be.\n", encoding="utf-8")
    arguments = [part.format(short=tmp_path / "short.txt", play=play) for part in arguments]
    result = CliRunner().invoke(script.main, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and says in result.output
