"""The command `train`: what it makes, that it goes on bit by bit, and that nothing which is saved is lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gpt2_multi.app import cli
from gpt2_multi.app.train.data.windows import Windows
from gpt2_multi.app.train.loop import Held
from gpt2_multi.app.train.session import sentence_of
from gpt2_multi.files.hub import DEMO
from tests.support.effort import THOROUGH

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

SIZES = "n_layer=2,n_head=2,n_embd=16,n_positions=32,n_inner=24"
TINY = ("--model", SIZES, "--tokenizer", "demo", "--batch-size", 4, "--steps", 20, "--eval-every", 5)
FILES = {
    "README.md", "config.json", "curve.svg", "data", "generation_config.json", "merges.txt",
    "metrics.jsonl", "model.safetensors", "special_tokens_map.json", "state", "tokenizer.json",
    "tokenizer_config.json", "vocab.json",
}  # fmt: skip


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, ["train", *map(str, args)])


def good(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def refusal(*args: object, code: int = 1) -> str:
    """The one sentence of a failure, the last line of standard error."""
    result = run(*args)
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("gpt2-multi: ") and "a bug" not in last
    return last


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def figures(out: Path) -> list[tuple]:
    """What has to be the same of two runs: all but times."""
    return [(row["step"], row["loss"], row["lr"], row["norm"], row.get("val_loss")) for row in rows(out)]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20 kB that look like a play."""
    speeches = [f"SPEAKER {'ABC'[i % 3]}:\nLine {i * 7919 % 1000} of it, and {i * 31 % 17} more." for i in range(500)]
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text("\n\n".join(speeches), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(book: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run, with what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, good(book, "--out", out, *TINY, "--save-every", 7).stdout


# --- what it makes ---------------------------------------------------------------------------------------------------


def test_the_folder_is_a_model_that_transformers_takes_too(made: tuple[Path, str]) -> None:
    transformers = pytest.importorskip("transformers")
    out, said = made
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in (out / "state").iterdir()} == {"00000014", "00000020", "lock", "run.json"}
    from gpt2_multi.pt import GPT2LMHeadModel

    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(out)("SPEAKER A:").input_ids])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert torch.allclose(GPT2LMHeadModel.from_pretrained(out)(ids).logits, theirs, atol=1e-5)
    assert f'generate "Once upon a time" --model {out}' in said and f"evaluate {out}" in said


def test_the_figures_are_those_of_the_run(made: tuple[Path, str]) -> None:
    out, _ = made
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, 21))
    held = {row["step"]: row["val_loss"] for row in found if "val_loss" in row}
    assert list(held) == [5, 10, 15, 20] and held[20] < held[5] < 7
    card, curve = (out / "README.md").read_text(), (out / "curve.svg").read_text()
    assert f"| 20 | {sum(row['loss'] for row in found[15:]) / 5:.4f} | {held[20]:.4f} |" in card
    assert "held out" in curve and "<svg" in curve and "white" not in curve
    assert found[0]["lr"] == found[19]["lr"] * found[0]["lr"] / found[19]["lr"] and found[19]["lr"] < found[5]["lr"]


def test_it_learns_a_tokenizer_from_lines_of_json(book: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    lines, out = tmp_path / "rows.jsonl", tmp_path / "out"
    lines.write_text("".join(json.dumps({"body": part}) + "\n" for part in book.read_text().split("\n\n")))
    given = (lines, "--field", "body", "--tokenizer", "train:300", "--model", SIZES, "--steps", 2, "--val", book)
    good(*given, "--out", out, "--log", "tensorboard") if can_log() else good(*given, "--out", out)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 300
    assert not can_log() or len(list((out / "logs").iterdir())) == 1


def can_log() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None


def test_adapters_are_trained_alone_and_the_folder_has_a_whole_model(book: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = shutil.copytree(DEMO, tmp_path / "lr=0.1")  # no sizes, for it is a folder
    out, given = (
        tmp_path / "out",
        ("--model", model, "--length", 16, "--batch-size", 2, "--steps", 4, "--lr", 0.01, "--eval-every", 4),
    )
    good(book, "--out", out, "--lora", 2, "--val-fraction", 0.02, "--save-every", 2, *given)
    state = out / "state" / "00000004"
    assert (state / "state.safetensors").stat().st_size < (out / "model.safetensors").stat().st_size / 10
    from gpt2_multi.pt import GPT2LMHeadModel

    new, old = (GPT2LMHeadModel.from_pretrained(folder) for folder in (out, DEMO))
    assert new.transformer.wte.weight.equal(old.transformer.wte.weight)
    assert not new.transformer.h[0].mlp.c_fc.weight.equal(old.transformer.h[0].mlp.c_fc.weight)
    first = figures(out)
    shutil.rmtree(state)
    good("--out", out, "--resume")
    assert figures(out) == first


def test_held_out_tokens_are_predicted_once() -> None:
    import numpy as np

    batches = list(Held(np.arange(1, 24), 6, 2))
    predicted = np.concatenate([batch["labels"][:, 1:].ravel() for batch in batches])
    assert predicted[predicted != -100].tolist() == list(range(2, 24))
    assert {batch["input_ids"].shape for batch in batches} == {(2, 6)}


# --- going on --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What nothing catches."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, what: BaseException | int) -> None:
    """Let an error, or a signal, come with the batch of a step."""
    batch = Windows.__getitem__

    def get(self: Windows, at: int) -> dict:
        if at == step:
            monkeypatch.setattr(Windows, "__getitem__", batch)
            if isinstance(what, BaseException):
                raise what
            os.kill(os.getpid(), what)
        return batch(self, at)

    monkeypatch.setattr(Windows, "__getitem__", get)


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM, Killed()], ids=["ctrl-c", "term", "killed"])
def test_a_run_that_goes_on_is_one_that_never_stopped(
    what, made: tuple[Path, str], book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_after(monkeypatch, 9, what)
    if isinstance(what, Killed):
        with pytest.raises(Killed):
            run(book, "--out", out, *TINY, "--save-every", 7)
        assert (out / "state" / "00000007").exists()
    else:
        result = run(book, "--out", out, *TINY, "--save-every", 7)
        assert result.exit_code == 128 + what
        assert "saved after step 10 of 20" in result.stdout and "--resume" in result.stdout
        assert len(rows(out)) == 10
    assert "add --resume" in refusal(book, "--out", out, *TINY)
    good("--out", out, "--resume")
    assert figures(out) == figures(made[0])
    for file in ("model.safetensors", "state/00000020/state.safetensors", "config.json"):
        assert (out / file).read_bytes() == (made[0] / file).read_bytes()


def test_a_run_goes_on_as_it_began(made: tuple[Path, str], book: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    said = refusal("--out", out, "--resume", "--steps", 30, "--lr", 0.1, "--model", "demo")
    for name in ("--steps was 20 and is 30", "--lr was", "--model was"):
        assert name in said
    assert good("--out", out, "--resume", book, "--steps", 20, "--eval-every", 1).stdout.startswith(str(out))


@pytest.mark.parametrize("seed", range(20) if THOROUGH else (0, 6))
def test_a_disk_that_is_full_at_any_moment_costs_no_save(
    seed: int, made: tuple[Path, str], book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, at = itertools.count(), random.Random(seed).randrange(90)

    def failing(real):
        def call(*args, **options):
            if next(calls) >= at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return call

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        for place, name in ((os, "fsync"), (Path, "replace"), (Path, "rename")):
            patched.setattr(place, name, failing(getattr(place, name)))
        result = run(book, "--out", out, *TINY, "--save-every", 7)
    assert result.exit_code == 1 and os.strerror(errno.ENOSPC) in result.stderr.splitlines()[-1], result.output
    begun = any(path.name.isdigit() for path in (out / "state").iterdir())
    good(*(("--resume",) if begun else (book, *TINY, "--save-every", 7)), "--out", out)
    assert figures(out) == figures(made[0])
    assert (out / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} == FILES and [path.name for path in tmp_path.iterdir()] == ["out"]


if THOROUGH:

    @pytest.mark.parametrize(("backend_name", "longest"), [("pt", 8), ("tf", 14), ("flax", 8)])
    def test_a_process_that_is_killed_at_any_moment_goes_on(
        backend_name: str, longest: int, book: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip({"pt": "torch", "tf": "tensorflow", "flax": "flax"}[backend_name])
        whole, out, moments = tmp_path / "whole", tmp_path / "out", random.Random(0)
        begin = (str(book), *map(str, TINY), "--save-every", "1", "--backend", backend_name)
        good(*begin, "--out", whole)
        for _ in range(20):
            begun = any(path.name.isdigit() for path in (out / "state").glob("*"))
            options = ("--resume",) if begun else begin
            process = subprocess.Popen([sys.executable, "-m", "gpt2_multi", "train", *options, "--out", str(out)])
            time.sleep(moments.uniform(0, longest))
            process.kill()
            process.wait()
        good(*(("--resume",) if any((out / "state").glob("[0-9]*")) else begin), "--out", out)
        assert figures(out) == figures(whole)
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2
    @pytest.mark.parametrize("options", [(), ("--lora", 2, "--dtype", "bfloat16")], ids=["whole", "adapters"])
    @pytest.mark.parametrize("backend_name", ["tf", "flax"])
    def test_other_frameworks_go_on_as_pytorch_does(
        backend_name: str, options: tuple, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a kill with a save before it, and from Ctrl-C."""
        pytest.importorskip({"tf": "tensorflow", "flax": "flax"}[backend_name])
        small = ("--length", 16, "--batch-size", 2, "--steps", 12, "--val-fraction", 0.02, "--save-every", 4)
        given = (book, *small, "--backend", backend_name, *options)
        good(*given, "--out", tmp_path / "whole")
        out = tmp_path / "out"
        stop_after(monkeypatch, 6, Killed())
        with pytest.raises(Killed):
            run(*given, "--out", out)
        stop_after(monkeypatch, 9, signal.SIGINT)
        assert run("--out", out, "--resume").exit_code == 130
        good("--out", out, "--resume")
        assert figures(out) == figures(tmp_path / "whole")
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_lack_of_memory_is_a_sentence(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    said = refusal(book, "--out", tmp_path / "out", *TINY, "--save-every", 2)
    assert "--accumulate" in said and "the save of step 2 is whole" in said
    others = MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
    assert all("--accumulate" in (sentence_of(error, tmp_path) or "") for error in others)
    assert sentence_of(RuntimeError("a bug"), tmp_path) is None


def test_a_loss_that_is_no_number_is_a_sentence(book: Path, tmp_path: Path) -> None:
    given = (*TINY, "--lr", 1e30, "--warmup", 0, "--max-norm", 0, "--save-every", 1)
    said = refusal(book, "--out", tmp_path / "out", *given)
    assert "no finite number" in said and "lower --lr" in said and "the save of step 1 is whole" in said
    assert len(rows(tmp_path / "out")) < 20
    assert "nothing was saved yet" in refusal(book, "--out", tmp_path / "none", *given, "--save-every", 20)


@pytest.mark.parametrize(
    ("given", "says", "code"),
    [
        ((), "expected DATA", 2),
        (("nowhere.txt",), "nowhere.txt", 1),
        (("{book}", "--dtype", "float16"), "choose bfloat16", 2),
        (("{book}", "--steps", 3, "--epochs", 1), "drop one", 2),
        (("{book}", "--max-norm", "nan"), "'--max-norm': expected a finite number, found nan", 2),
        (("{book}", "--epochs", "inf"), "expected a finite number, found inf", 2),
        (("{book}", "--mesh", "data=2"), "torchrun --nproc-per-node 2, or give --mesh data=1", 1),
        (("{book}", "--device", "cuda:7"), 'expected "auto" or one of', 1),
        (("{book}", "--model", "n_layer=2,n_heads=3", "--tokenizer", "demo"), "n_head", 1),
        (("{book}", "--model", "n_layer=2", "--tokenizer", "train:many"), "train:2000", 1),
        (("{book}", "--tokenizer", "train:300"), "the model knows its own tokens", 1),
        (("{book}", "--model", SIZES, "--tokenizer", "demo", "--lora", 2), "learn nothing", 1),
        (("{book}", "--length", 300), "the model reads 256 tokens", 1),
        (("{book}", "--batch-size", 6, "--accumulate", 4), "a multiple of 4", 1),
        (("{book}", "--batch-size", 9000), "of 8, the shortest there are, and a batch has 9000; give a smaller", 1),
        (("{book}", "--length", 256, "--accumulate", 9000), "of 256, and a batch has 9000; give a shorter --length", 1),
        (("{book}", "--steps", 4, "--warmup", 5), "no more than the 4 steps", 1),
        (("{book}", "--model", "nowhere/at/all"), "nowhere/at/all", 1),
        (("{book}", "--val-fraction", 1e-4), "too few to measure on", 1),
        (("--resume",), "has no run that could go on", 1),
    ],
)
def test_what_cannot_be_is_a_sentence(given, says: str, code: int, book: Path, tmp_path: Path) -> None:
    given = [str(part).format(book=book) for part in given]
    assert says in refusal(*given, "--out", tmp_path / "out", code=code)


def test_a_model_in_int8_does_not_train(book: Path, tmp_path: Path) -> None:
    from gpt2_multi.pt import GPT2LMHeadModel

    GPT2LMHeadModel.from_pretrained("demo", quantization="int8").save_pretrained(tmp_path / "int8")
    given = ("--model", tmp_path / "int8", "--tokenizer", "demo")
    assert "is in int8" in refusal(book, *given, "--out", tmp_path / "out")


def test_a_folder_with_other_things_is_left_alone(book: Path, tmp_path: Path) -> None:
    letter, hidden = tmp_path / "out" / "letter.txt", tmp_path / ".mine.settings" / "letter.txt"
    for file in (letter, hidden):
        file.parent.mkdir()
        file.write_text("Dear")
    assert "found other things in it" in refusal(book, "--out", tmp_path / "out")
    good(book, "--out", tmp_path / "mine", *TINY, "--steps", 1)
    assert [path.name for path in letter.parent.iterdir()] == ["letter.txt"] and hidden.exists()


def test_one_run_at_a_time_writes_to_a_folder(made: tuple[Path, str]) -> None:
    pytest.importorskip("fcntl")
    from gpt2_multi.app.train.folder import Folder

    other = Folder(made[0])
    other.claim(resume=True)
    assert "another process writes there" in refusal("--out", made[0], "--resume")
    other.release()


def test_what_is_damaged_is_named(made: tuple[Path, str], tmp_path: Path) -> None:
    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    for name in ("state/00000020/state.safetensors", "metrics.jsonl", "data/train/tokens-00000.bin", "state/run.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
        assert name in refusal("--out", out, "--resume")
        (out / name).write_bytes(whole)
    whole = (out / "metrics.jsonl").read_bytes()
    for flip in (0x80, 0x04):  # in "step": no UTF-8, and another name
        (out / "metrics.jsonl").write_bytes(whole[:2] + bytes([whole[2] ^ flip]) + whole[3:])
        assert "metrics.jsonl, line 1: is not what" in refusal("--out", out, "--resume")
    (out / "metrics.jsonl").write_bytes(whole)
    state = out / "state" / "00000020" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert "state.safetensors: is damaged" in refusal("--out", out, "--resume")
    state.write_bytes(whole)
    for name in ("config.json", "metrics.jsonl", "data/train/shards.json"):
        (out / name).rename(tmp_path / "kept")
        said = refusal("--out", out, "--resume")
        assert name in said and "start another run" in said and "goes on from it" not in said
        (tmp_path / "kept").rename(out / name)
    shutil.rmtree(out / "state" / "00000020")
    good("--out", out, "--resume")
    assert figures(out) == figures(made[0])
