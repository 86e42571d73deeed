"""The command line: what it prints, what it refuses, and that every failure is one sentence and an exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from gpt2_multi import __version__
from gpt2_multi.app import backends, cli
from gpt2_multi.app.doctor import comparison
from gpt2_multi.files import hub
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support.fixtures import write_model

needs_pt = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
END = 256
CHARACTERS = "aé日😀"


def byte_vocabulary() -> dict[str, int]:
    """GPT-2's 256 byte tokens, and the end token: byte b is the id b."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    spelled = {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}
    return {**{spelled[byte]: byte for byte in range(256)}, "<|endoftext|>": END}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=END, eos_token_id=END
    )
    write_model(folder, config, "lm", dtype=np.float32)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture
def demo(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small model be the one that doctor computes."""
    monkeypatch.setattr(hub, "DEMO", tiny)


def run(*args: str | Path, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], input=stdin)


def good(*args: str | Path, stdin: bytes | str | None = None) -> str:
    result = run(*args, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refusal(*args: str | Path, stdin: bytes | str | None = None, code: int = 1) -> str:
    """The one sentence of a failure, after which nothing may have been printed."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == code, result.output
    return sentence(result.stdout, result.stderr)


def sentence(stdout: str, stderr: str) -> str:
    assert stdout == ""
    assert stderr.startswith("gpt2-multi: ")
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("gpt2-multi: ").rstrip("\n")


def process(*args: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-W", "error", "-m", "gpt2_multi", *map(str, args)]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


# --- generate ---------------------------------------------------------------------------------------------------------


@needs_pt
def test_generate_continues_the_prompt(tiny: Path) -> None:
    text = good("generate", "Hello", "--model", tiny, "--max-new-tokens", "5")
    assert text.startswith("Hello")
    assert text.endswith("\n")
    assert len(text) > len("Hello\n")


@needs_pt
def test_the_text_is_that_of_the_model_s_own_generate(tiny: Path) -> None:
    torch, pt = pytest.importorskip("torch"), pytest.importorskip("gpt2_multi.pt")
    tokenizer, model = GPT2Tokenizer.from_pretrained(tiny), pt.GPT2LMHeadModel.from_pretrained(tiny)
    ids = torch.tensor([tokenizer("Hello").input_ids])
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 9, "seed": 3, "top_k": 9, "temperature": 0.5}
    expected = tokenizer.decode(model.generate(ids, **options)[0].tolist()).removesuffix("<|endoftext|>")
    given = ("--max-new-tokens", "9", "--seed", "3", "--top-k", "9", "--temperature", "0.5")
    assert good("generate", "Hello", "--model", tiny, *given) == expected + "\n"


@needs_pt
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_streamed_text_is_the_same_text(tiny: Path, seed: str) -> None:
    args = ("generate", "Hello", "--model", tiny, "--seed", seed)
    assert good(*args, "--stream") == good(*args)


@needs_pt
def test_what_is_typed_in_is_no_control_token(tiny: Path) -> None:
    text = "<|endoftext|>" * 5  # five of them would have room
    assert GPT2Tokenizer.from_pretrained(tiny)(text).input_ids == [END] * 5
    assert "65 tokens leave no room" in refusal("generate", text, "--model", tiny)


@needs_pt
def test_the_seed_decides_the_text(tiny: Path) -> None:
    args = ("generate", "Hello", "--model", tiny)
    assert good(*args, "--seed", "7") == good(*args, "--seed", "7")
    assert good(*args, "--seed", "7") != good(*args, "--seed", "8")
    assert good(*args) == good(*args, "--seed", "0")
    assert good(*args, "--greedy") != good(*args)


@needs_pt
@pytest.mark.parametrize("how", [("--greedy",), ("--seed", "3"), ("--seed", "3", "--stream", "--top-p", "0.8")])
@pytest.mark.parametrize("other", ["tf", "flax"])
def test_every_backend_writes_the_same_text(tiny: Path, other: str, how: tuple[str, ...]) -> None:
    pytest.importorskip(backends.BACKENDS[other].framework)
    args = ("generate", "Hello", "--model", tiny, "--max-new-tokens", "12", *how)
    assert good(*args, "--backend", other) == good(*args, "--backend", "pt")


@needs_pt
def test_several_texts_are_told_apart(tiny: Path) -> None:
    args = ("generate", "Hi", "--model", tiny, "--max-new-tokens", "4", "--top-k", "3")
    text = good(*args, "--num-return-sequences", "2", "--seed", "5")
    first, second = (good(*args, "--seed", seed) for seed in ("5", "6"))
    assert text == f"======== 1 of 2 ========\n{first}======== 2 of 2 ========\n{second}"


@needs_pt
@pytest.mark.parametrize("args", [(), ("-",)])
def test_the_prompt_comes_from_standard_input(tiny: Path, args: tuple[str, ...]) -> None:
    expected = good("generate", "Hé\n", "--model", tiny)
    assert good("generate", *args, "--model", tiny, stdin="Hé\n\n") == expected
    assert good("generate", *args, "--model", tiny, stdin="Hé\n\r\n") == expected


@needs_pt
def test_an_empty_prompt_starts_a_new_text(tiny: Path, tmp_path: Path) -> None:
    text = good("generate", "", "--model", tiny)
    assert "<|endoftext|>" not in text
    assert text == good("generate", "--model", tiny, stdin="")
    bare = copy_of(tiny, tmp_path, bos_token_id=None)
    assert refusal("generate", "", "--model", bare).startswith("the prompt is empty, and bos_token_id None of")


def copy_of(folder: Path, target: Path, **changes: Any) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    GPT2Config.from_pretrained(folder, **changes).save_pretrained(target)
    return target


@needs_pt
def test_the_text_ends_at_the_end_token_which_is_not_shown(tiny: Path, tmp_path: Path) -> None:
    model = backends.resolve("pt").load(tiny, "cpu")
    prompt = GPT2Tokenizer.from_pretrained(tiny)("Hello", return_tensors="pt").input_ids
    first = next(model.stream_tokens(prompt, max_new_tokens=1))
    ending = copy_of(tiny, tmp_path, eos_token_id=int(first[0]))
    assert good("generate", "Hello", "--model", ending, "--greedy") == "Hello\n"
    assert good("generate", "Hello", "--model", ending, "--greedy", "--stream") == "Hello\n"


@needs_pt
def test_the_context_bounds_the_text(tiny: Path) -> None:
    assert good("generate", "x" * 63, "--model", tiny, "--max-new-tokens", "0") == "x" * 63 + "\n"
    good("generate", "x" * 63, "--model", tiny)
    message = refusal("generate", "x" * 64, "--model", tiny)
    assert message == "PROMPT: 64 tokens leave no room, for the model can read 64; shorten it"
    message = refusal("generate", "x" * 60, "--model", tiny, "--max-new-tokens", "5")
    assert "60 prompt tokens and 5 new ones are more than n_positions 64" in message


@needs_pt
def test_a_process_pipes_clean_text(tiny: Path) -> None:
    done = process("generate", "--model", tiny, stdin=b"Hello\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == good("generate", "Hello", "--model", tiny)


@needs_pt
def test_an_output_that_lacks_a_character_gets_a_mark(tiny: Path) -> None:
    done = process("generate", "日", "--model", tiny, "--max-new-tokens", "0", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?\n", b"")


@needs_pt
def test_a_closed_pipe_is_quiet(tiny: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gpt2_multi", "generate", "Hello", "--stream", "--model", str(tiny)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1


@needs_pt
def test_progress_is_for_a_terminal_and_on_standard_error(tiny: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gpt2_multi", "generate", "Hello", "--model", str(tiny)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs) as child:
        text = child.communicate()[0]
    os.close(theirs)
    assert b"Generating" in os.read(ours, 10_000)
    os.close(ours)
    assert text.decode() == good("generate", "Hello", "--model", tiny)


def test_no_piece_splits_a_character(tiny: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(tiny)
    ids = tokenizer(CHARACTERS).input_ids
    assert len(ids) == 1 + 2 + 3 + 4
    config = GenerationConfig(eos_token_id=ids[-1])
    assert list(texts.decode(tokenizer, ids, GenerationConfig())) == list(CHARACTERS)
    assert "".join(texts.decode(tokenizer, ids[:-1], GenerationConfig())) == tokenizer.decode(ids[:-1])
    assert list(texts.decode(tokenizer, [ids[0], ids[-1], ids[0]], config)) == [CHARACTERS[0]]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--top-p", "2"), "top_p: expected a number above 0, up to 1, found 2.0"),
        (
            ("--temperature", "0"),
            "temperature: expected a number from 1e-9 (for greedy choice: do_sample=False), found 0.0",
        ),
        (("--max-new-tokens", "-1"), "max_new_tokens: expected a whole number from 0"),
        (("--num-return-sequences", "0"), "num_return_sequences: expected a whole number from 1"),
    ],
)
def test_wrong_options(args: tuple[str, ...], message: str) -> None:
    assert refusal("generate", "Hello", *args).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--greedy", "--seed", "1"), "--greedy does not sample, so that --seed would change nothing; drop one"),
        (("--greedy", "--top-k", "1", "--top-p", "1"), "--greedy does not sample, so that --top-k, --top-p would"),
        (("--stream", "--num-return-sequences", "2"), "--stream prints one text; leave out --num-return-sequences"),
        (("--backend", "mx"), "Invalid value for '--backend': 'mx' is not"),
        (("--seed", "x"), "Invalid value for '--seed': 'x' is not a valid integer"),
        (("--tempature", "1"), "No such option '--tempature'"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], message: str) -> None:
    assert refusal("generate", "Hello", *args, code=2).startswith(message)


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
