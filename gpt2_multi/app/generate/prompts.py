"""Prompts from a file into a file of JSON lines, in order, a batch at a time, going on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import click

from gpt2_multi.app.generate.writer import Writer
from gpt2_multi.app.terminal import files_of
from gpt2_multi.errors import InputError
from gpt2_multi.files.documents import LONGEST, STDIN, File, TextFile, read
from gpt2_multi.files.json_files import hold, sync
from gpt2_multi.files.progress import watched

FIELD = "prompt"


class Stopped(click.ClickException):
    """Ctrl-C, with what to do."""

    exit_code = 130


def continue_all(writer: Writer, source: str, target: Path, field: str | None, batch_size: int, run: str) -> None:
    """Write a line for each text that follows a prompt of the source: `prompt`, `completion`, and `run`.

    source: .txt with a prompt on each line, or .jsonl or .parquet with one in a field. run: says by which model and
    options a line was made; lines that are there are kept where they are of this one and of the same prompts, and what
    is there of a text that was stopped is cut. Raises InputError where another file is there, and for a prompt that is
    too long, before anything is made.
    """
    files = files_of([source], field)
    if any(file.name == STDIN for file in files):
        raise InputError("--prompts: expected a file, found standard input, which is read but once; save it first")
    several = writer.config.num_return_sequences
    total = sum(1 for prompt, name in _prompts(files, field) if writer.count(prompt, name) >= 0)
    with target.open("a+b") as file:
        hold(file, f"--output {target}")
        done = _kept(file, target, _prompts(files, field), several, run)
        rest = (prompt for prompt, _ in islice(_prompts(files, field), done, None))
        try:
            for _ in watched(_written(writer, rest, file, batch_size, run), "Generating", total - done):
                done += 1
        except KeyboardInterrupt:
            raise Stopped(f"interrupted after {done} of {total} prompts; the same command goes on") from None


def run_of(folder: Path, writer: Writer, dtype: str, quantize: str | None) -> str:
    """A few characters that say by which model and options texts are made; the same on every backend."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    said = (str(folder.resolve()), states, sorted(writer.config.to_dict().items(), key=str), writer.new_tokens)
    return hashlib.sha256(repr((said, dtype, quantize)).encode()).hexdigest()[:12]


def _prompts(files: list[File], field: str | None) -> Iterator[tuple[str, str]]:
    """Each prompt, with a name for a sentence about it."""
    for file in files:
        number = 0
        for document in read([file], field or FIELD):
            for prompt in [document] if isinstance(document, str) else _lines(document):
                number += 1
                yield prompt, f"{file.name}, prompt {number}"


def _lines(text: TextFile) -> Iterator[str]:
    """The lines of a text, without their ends."""
    rest = ""
    while piece := text.read(1 << 16):
        *whole, rest = (rest + piece).split("\n")
        if len(rest) > LONGEST:
            raise InputError(f"{text.name}: a line is longer than {LONGEST} characters; is it a text of lines?")
        yield from (line.removesuffix("\r") for line in whole)
    if rest:
        yield rest


def _written(writer: Writer, prompts: Iterator[str], file: BinaryIO, size: int, run: str) -> Iterator[None]:
    """Something for each prompt whose texts are in the file, and on the disk."""
    while batch := list(islice(prompts, size)):
        options = writer.one_text if size == 1 else None
        for prompt, found in zip(batch, writer.write(batch, **(options or {})), strict=True):
            for text in found:
                file.write(_line({"prompt": prompt, "completion": text, "run": run}))
            yield
        sync(file)


def _line(record: dict[str, Any]) -> bytes:
    with suppress(UnicodeEncodeError):  # half of a pair, which JSON can spell, and UTF-8 cannot
        return f"{json.dumps(record, ensure_ascii=False)}\n".encode()
    return f"{json.dumps(record)}\n".encode()


def _kept(file: BinaryIO, target: Path, prompts: Iterator[tuple[str, str]], several: int, run: str) -> int:
    """For how many prompts the file has all texts, after which it is cut."""
    whole = lines = 0
    file.seek(0)
    for prompt, name in prompts:
        for _ in range(several):
            line = file.readline(LONGEST)
            if not line.endswith(b"\n"):
                file.truncate(whole)
                return lines // several
            _check(target, lines + 1, line, prompt, name, run)
            lines += 1
        whole = file.tell()
    if file.read(1):
        raise InputError(f"{target}: has more lines than there are prompts; name another file")
    return lines // several


def _check(target: Path, number: int, line: bytes, prompt: str, name: str, run: str) -> None:
    """InputError where a line of the file is not what this run would have written."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not {"prompt", "completion", "run"} <= record.keys():
        raise InputError(f"{target}, line {number}: is not of this command; name another file")
    if record["run"] != run:
        raise InputError(
            f"{target}, line {number}: was made by another model or other options; take these, or name another file"
        )
    if record["prompt"] != prompt:
        raise InputError(f"{target}, line {number}: is of another prompt than {name}; name another file")
