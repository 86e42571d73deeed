"""Prompts from a file into a file: in order, as each would be alone, and going on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpt2_multi.app.generate import prompts as module
from gpt2_multi.files.json_files import hold
from tests.app.conftest import copy_of, good, needs_pt, refusal, run

pytestmark = needs_pt
PROMPTS = ["Hello", "", "a" * 40, "x" * 63, "tale: 日", "\ud83dx", "b"]
NEW = ("--max-new-tokens", "9", "--seed", "3")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return tmp_path / "prompts.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def alone(tiny: Path, prompt: str, *how: str) -> str:
    text = good("generate", "--model", tiny, *how, stdin=prompt.encode() + b"\n")
    return text.removeprefix(prompt).removesuffix("\n")


def make(tiny: Path, source: Path, target: Path, *how: str) -> list[dict[str, Any]]:
    good("generate", "--model", tiny, "--prompts", source, "--output", target, *how)
    return records(target)


@pytest.mark.parametrize("size", ["1", "3", "8"])
def test_each_prompt_gets_what_it_gets_alone(tiny: Path, lines: Path, tmp_path: Path, size: str) -> None:
    found = make(tiny, lines, tmp_path / "out.jsonl", "--seed", "3", "--batch-size", size)
    assert [record["prompt"] for record in found] == PROMPTS
    told = [(record["prompt"], record["completion"]) for record in found if record["prompt"].isprintable()]
    assert told == [(prompt, alone(tiny, prompt, "--seed", "3")) for prompt, _ in told] and len(told) == 6


def test_several_texts_and_beams_of_each_prompt(tiny: Path, lines: Path, tmp_path: Path) -> None:
    lines.write_text('{"prompt": "Hello"}\n{"prompt": "b"}\n')
    found = make(tiny, lines, tmp_path / "out.jsonl", *NEW, "--num-return-sequences", "2", "--top-k", "5")
    assert [record["prompt"] for record in found] == ["Hello", "Hello", "b", "b"]
    assert [record["completion"] for record in found] == [
        alone(tiny, prompt, "--max-new-tokens", "9", "--top-k", "5", "--seed", seed)
        for prompt in ("Hello", "b")
        for seed in ("3", "4")
    ]
    beams = ("--num-beams", "2", "--greedy", "--max-new-tokens", "5")
    found = make(tiny, lines, tmp_path / "beams.jsonl", *beams)
    assert [record["completion"] for record in found] == [alone(tiny, prompt, *beams) for prompt in ("Hello", "b")]


def test_lines_of_a_text_and_rows_of_parquet(tiny: Path, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("Hello\r\n\nb b\né".encode())
    found = make(tiny, tmp_path / "prompts.txt", tmp_path / "out.jsonl", *NEW)
    assert [record["prompt"] for record in found] == ["Hello", "", "b b", "é"]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"ask": ["Hello", "", "b b", "é"]}), tmp_path / "prompts.parquet")
    assert make(tiny, tmp_path / "prompts.parquet", tmp_path / "2.jsonl", *NEW, "--field", "ask") == found


def test_one_process_at_a_time_writes_to_a_file(tiny: Path, lines: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (tmp_path / "out.jsonl").open("ab") as file:
        hold(file, "this test")
        said = refusal("generate", "--model", tiny, "--prompts", lines, "--output", file.name)
    assert "out.jsonl: another process writes there" in said and not (tmp_path / "out.jsonl").read_bytes()


def test_what_is_there_is_not_made_again(tiny: Path, lines: Path, tmp_path: Path, monkeypatch: Any) -> None:
    target, how = tmp_path / "out.jsonl", (*NEW, "--batch-size", "2")
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcdefg"))
    whole = make(tiny, lines, target, *how) and target.read_bytes()
    made: list[str] = []
    write = module.Writer.write
    monkeypatch.setattr(module.Writer, "write", lambda self, given, **_: made.extend(given) or write(self, given))
    assert make(tiny, lines, target, *how) and made == [] and target.read_bytes() == whole
    first = whole.index(b"\n") + 1
    for length, rest in ((0, "abcdefg"), (first - 1, "abcdefg"), (first, "bcdefg"), (first + 9, "bcdefg")):
        made.clear()
        target.write_bytes(whole[:length])
        assert make(tiny, lines, target, *how) and target.read_bytes() == whole and made == list(rest)
    two = ("--num-return-sequences", "2", *how)
    pairs = make(tiny, lines, tmp_path / "two.jsonl", *two) and (tmp_path / "two.jsonl").read_bytes()
    made.clear()
    (tmp_path / "two.jsonl").write_bytes(b"".join(pairs.splitlines(True)[:3]))  # of the second one of two
    assert make(tiny, lines, tmp_path / "two.jsonl", *two) and (tmp_path / "two.jsonl").read_bytes() == pairs
    assert made == list("bcdefg")


def test_an_interrupt_says_how_to_go_on(tiny: Path, lines: Path, tmp_path: Path, monkeypatch: Any) -> None:
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcdefg"))
    args = ("generate", "--model", tiny, "--prompts", lines, "--output", tmp_path / "out.jsonl", *NEW)
    expected = make(tiny, lines, tmp_path / "whole.jsonl", *NEW)
    write, calls = module.Writer.write, []

    def stopped(self: Any, given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.Writer, "write", stopped)
        message = refusal(*args, "--batch-size", "2", code=130)
    assert message == "interrupted after 4 of 7 prompts; the same command goes on"
    assert records(tmp_path / "out.jsonl") == expected[:4]
    assert good(*args) == "" and records(tmp_path / "out.jsonl") == expected


def test_another_file_is_not_written_to(tiny: Path, lines: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    args = ("generate", "--model", tiny, "--prompts", lines, "--output", target)
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hello", "b")))
    make(tiny, lines, target, *NEW)
    other = copy_of(tiny, (tmp_path / "other").mkdir() or tmp_path / "other")
    for how in (("--max-new-tokens", "8", "--seed", "3"), (*NEW, "--stop", "x"), (*NEW, "--model", other)):
        message = refusal(*args, *how)
        assert message.startswith(f"{target}, line 1: was made by another model or other options; take these")
    assert good(*args, *NEW, "--batch-size", "1") == ""
    lines.write_text(lines.read_text().replace("Hello", "Hallo"))
    assert refusal(*args, *NEW).startswith(f"{target}, line 1: is of another prompt than {lines}, prompt 1; name")
    lines.write_text(json.dumps({"prompt": "Hello"}))
    assert refusal(*args, *NEW) == f"{target}: has more lines than there are prompts; name another file"
    for text in ("my notes\n", '{"prompt": "Hello"}\n', "[" * 10**5 + "\n"):
        target.write_text(text)
        assert refusal(*args, *NEW) == f"{target}, line 1: is not of this command; name another file"
        assert target.read_text() == text


def test_a_prompt_that_is_too_long_is_named_before_anything_is_made(tiny: Path, lines: Path, tmp_path: Path) -> None:
    lines.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "x" * 64}))
    args = ("generate", "--model", tiny, "--prompts", lines, "--output", tmp_path / "out.jsonl")
    assert refusal(*args).startswith(f"{lines}, prompt 2: 64 tokens leave no room, for the model can read 64")
    assert not (tmp_path / "out.jsonl").exists()
    assert refusal(*args[:3], "--prompts", "-", *args[5:]).startswith("--prompts: expected a file, found standard inp")
    result = run(*args[:3], "--prompts", tmp_path / "no.jsonl", *args[5:])
    assert result.exit_code == 1 and "no.jsonl: no such file or folder" in result.stderr
