"""The command line: what it prints, what it refuses, and that every failure is one sentence and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_multi import __version__
from gpt2_multi.app import backends, cli
from gpt2_multi.app.doctor import comparison
from tests.app.conftest import copy_of, good, needs_pt, process, refusal, run, sentence

# --- what is refused --------------------------------------------------------------------------------------------------


@needs_pt
def test_a_missing_model(tmp_path: Path) -> None:
    missing = tmp_path / "nope"
    for command in ("generate", "tokenize"):
        assert refusal(command, "Hello", "--model", missing).startswith(f"'{missing}': there is no such folder")


@needs_pt
def test_a_damaged_model(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert refusal("generate", "Hello", "--model", folder).startswith(f"{weights}: not a whole safetensors file")


@needs_pt
@pytest.mark.parametrize("command", ["generate", "tokenize"])
def test_an_unknown_name_offline(command: str, tmp_path: Path) -> None:
    done = process(command, "Hello", "--model", "no/such", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    message = sentence(done.stdout.decode(), done.stderr.decode())
    assert message.startswith("no/such: not (or not whole) in the cache, and the hub may not be asked")


@pytest.mark.parametrize("command", ["generate", "tokenize"])
def test_standard_input_has_to_be_utf_8(command: str, tiny: Path) -> None:
    message = refusal(command, "--model", tiny, stdin=b"ab\xff")
    assert message == "standard input: expected UTF-8, found the byte 0xff at 2; convert it first"


def test_an_argument_has_to_be_utf_8(tiny: Path) -> None:
    name = "TEXT: expected UTF-8, found the byte 0xff at 1; convert it first"
    assert refusal("tokenize", "a\udcff", "--model", tiny) == name


def test_nothing_given_on_a_terminal(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert refusal("tokenize", "--model", tiny, code=2) == "expected TEXT, found none; give it, or pipe it in"


def test_no_framework(tiny: Path, monkeypatch: pytest.MonkeyPatch, demo: None) -> None:
    monkeypatch.setattr(backends, "installed", list)
    expected = 'no framework is installed; to compute with a model: pip install "gpt2-multi[pt]" (PyTorch)'
    assert refusal("generate", "Hello", "--model", tiny).startswith(expected)
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"gpt2-multi: {expected}")
    message = refusal("generate", "Hello", "--model", tiny, "--backend", "pt")
    assert message == 'PyTorch is not installed: pip install "gpt2-multi[pt]"'


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(cli, "tokenizer_of", raising(KeyboardInterrupt()))
    result = run("tokenize", "Hello", "--model", tiny)
    assert (result.exit_code, result.stderr.strip()) == (130, "gpt2-multi: interrupted")


def raising(error: BaseException) -> Any:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def test_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(cli, "tokenizer_of", raising(PermissionError(13, "Permission denied", "/x/vocab.json")))
    assert refusal("tokenize", "Hello", "--model", tiny) == "/x/vocab.json: Permission denied"


def test_a_bug_is_one_sentence_and_a_traceback_where_asked_for(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(cli, "tokenizer_of", raising(ZeroDivisionError("oh\nno")))
    message = refusal("tokenize", "Hello", "--model", tiny)
    assert message == "a bug, ZeroDivisionError: oh no; please report it, with GPT2_MULTI_DEBUG=1 set"
    monkeypatch.setenv("GPT2_MULTI_DEBUG", "1")
    assert "Traceback (most recent call last)" in run("tokenize", "Hello", "--model", tiny).stderr


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert good("--version") == f"gpt2-multi, version {__version__}\n"
    assert good("-h") == good("--help")
    assert "The text is a sample, with seed 0 unless --seed says otherwise" in " ".join(good("generate", "-h").split())


def test_no_arguments_print_the_help() -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stderr.count("\n") > 5 and result.stderr.startswith("Usage:")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(("args", "name"), [("<&-", "standard input"), ("hello >&-", "standard output")])
def test_closed_streams(args: str, name: str) -> None:
    command = f'"{sys.executable}" -m gpt2_multi tokenize {args}'
    result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode in (1, 2) and name in result.stderr
    assert "a bug" not in result.stderr and result.stderr.count("\n") == 1


def test_help_loads_no_framework() -> None:
    code = "from gpt2_multi.app.cli import main\ntry: main(['generate', '-h'])\nexcept SystemExit: pass\n"
    code += "import sys; sys.exit(sorted({'torch', 'tensorflow', 'jax', 'huggingface_hub', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"


def test_tokenize_prints_ids_and_tokens(tiny: Path) -> None:
    assert good("tokenize", "a b", "--model", tiny) == "97\ta\n32\tĠ\n98\tb\n"
    assert good("tokenize", "--model", tiny, stdin="a\n") == "97\ta\n10\tĊ\n"
    assert good("tokenize", "", "--model", tiny) == ""


def test_tokenize_in_json(tiny: Path) -> None:
    keys = json.loads(good("tokenize", "é", "--model", tiny, "--json"))
    assert keys == {"ids": [195, 169], "tokens": ["Ã", "©"]}
    assert json.loads(good("tokenize", "", "--model", tiny, "--json")) == {"ids": [], "tokens": []}


@needs_pt
def test_doctor_finds_that_all_is_well(demo: None) -> None:
    text = good("doctor")
    assert "\x1b" not in text
    report = json.loads(good("doctor", "--json"))
    assert report["ok"]
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["devices"]["pt"][-1] == "cpu"
    found = {(f["backend"], f["device"], f["dtype"]) for f in report["findings"] if f["ok"] and f["error"] > 0}
    assert {("pt", "cpu", dtype) for dtype in comparison.BOUNDS} <= found
    assert all(f"{f['error']:.1e}" in text and f["device"] in text for f in report["findings"])


@needs_pt
def test_doctor_fails_where_one_weight_is_wrong(demo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_multi.pt import loading

    def corrupted(*args: Any, load: Any = loading.load_on, **options: Any) -> Any:
        model = load(*args, **options)
        model.transformer.h[0].ln_1.bias.data[3] += 0.5
        return model

    monkeypatch.setattr(loading, "load_on", corrupted)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith("gpt2-multi: wrong results: pt on cpu in float64, pt on cpu in float32")
    report = json.loads(result.stdout)
    assert not report["ok"]
    found = {f["backend"]: f["problem"] for f in report["findings"] if f["dtype"] == "float32"}
    assert found.pop("pt") == "the logits are wrong" and set(found.values()) <= {None}
    assert "the logits are wrong" in run("doctor").stdout


@needs_pt
@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda tensor: np.full(tuple(tensor.shape), np.nan), "the logits are not finite"),
        (raising(RuntimeError("no kernel\nfor this")), "RuntimeError: no kernel for this"),
    ],
)
def test_doctor_survives_a_broken_device(
    demo: None, monkeypatch: pytest.MonkeyPatch, broken: Any, problem: str
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "pt", replace(backends.BACKENDS["pt"], to_numpy=broken))
    result = run("doctor", "--json")
    assert result.exit_code == 1
    findings = json.loads(result.stdout)["findings"]
    assert {(f["error"], f["problem"]) for f in findings if f["backend"] == "pt"} == {(None, problem)}
    assert all(f["problem"] is None for f in findings if f["backend"] != "pt")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend: expected one of pt, tf, flax, found 'mx'"):
        backends.resolve("mx")
