"""Results on disk, a line for each document, so that a run that was stopped goes on where it was.

FILE.jsonl has a line for each document, in their order; FILE.json beside it says of what run they are, and has the
figures when it is over. Documents are computed and written in blocks that depend on the documents alone, so that a run
that was stopped and went on reads them in the same batches, and writes the same bytes, as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import SETTINGS, TOKENIZER, WEIGHTS, matches
from gpt2_multi.files.json_files import hold, read_json, sync, write_whole

DOCUMENTS, BYTES = 512, 1 << 18  # of a block, whichever is reached first


class Item(NamedTuple):
    """A document: where it stands, what tells it from others, and what is measured of it."""

    where: str
    digest: str
    value: Any
    size: int  # bytes
    read: int  # bytes of its file that were read for it


class Block(NamedTuple):
    """Documents that are measured together; `start` counts those before."""

    start: int
    items: list[Item]

    @property
    def end(self) -> int:
        """How many documents there are up to its end."""
        return self.start + len(self.items)


def blocks(items: Iterable[Item]) -> Iterator[Block]:
    """Documents in blocks."""
    start, held, size = 0, list[Item](), 0
    for item in items:
        held.append(item)
        size += item.size
        if len(held) == DOCUMENTS or size >= BYTES:
            yield Block(start, held)
            start, held, size = start + len(held), [], 0
    if held:
        yield Block(start, held)


def digest(data: bytes) -> str:
    """What tells a document from others."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def digest_of(folder: Path) -> str:
    """What tells a model from others: its settings, its weights and its tokenizer."""
    patterns = [*SETTINGS, *TOKENIZER, *(pattern for several in WEIGHTS.values() for pattern in several)]
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if path.is_file() and matches(path.name, patterns)):
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return found.hexdigest()


class Records:
    """The results of a run, in a file; `run` is what it depends on, and has to be that of what is there."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.beside, self.run = path, path.with_suffix(".json"), run
        if path.suffix != ".jsonl":
            raise InputError(f"output: expected a name that ends in .jsonl, found {path}; change it")
        if not path.parent.is_dir():
            raise InputError(f"output: there is no folder {path.parent}; make it")
        self._file = path.open("a+b")
        try:
            hold(self._file, f"output: {path}")
            self._check_beside()
        except BaseException:
            self._file.close()
            raise
        self._file.seek(0)
        self.lines = sum(line.endswith(b"\n") for line in self._file)
        self._file.seek(0)
        self._line = 0

    def _check_beside(self) -> None:
        if not self.path.stat().st_size:
            write_whole(self.beside, json.dumps({"run": self.run}, indent=2) + "\n")
            return
        if not self.beside.exists():
            raise InputError(f"output: {self.path} is there, and no {self.beside.name} that says of what run; move it")
        there = read_json(self.beside).get("run")
        there = there if isinstance(there, dict) else {}
        if changed := [name for name in self.run if there.get(name) != self.run[name]]:
            found = ", ".join(f"{name} {there.get(name)!r}, not {self.run[name]!r}" for name in changed)
            raise InputError(f"output: {self.path} is of another run ({found}); name another file")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, block: Block) -> bool:
        """Whether all results of a block, the next one, are there; if not, what is there of it goes."""
        if block.end <= self.lines:
            return True
        self.lines = min(self.lines, block.start)
        self._file.truncate(self._file.tell())
        return False

    def old(self, block: Block) -> Iterator[dict[str, Any]]:
        """The results of a block that are there."""
        for item in block.items:
            self._line += 1
            result = self._parsed(self._file.readline())
            if result.get("digest") != item.digest:
                raise InputError(
                    f"output: line {self._line} of {self.path} is of another document than {item.where}; "
                    "name another file, or give the same data"
                )
            yield result

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"output: line {self._line} of {self.path} is no result; move the file away")
        return found

    def write(self, results: Iterable[dict[str, Any]]) -> None:
        """Add the results of a block, and wait until they are on the disk."""
        self._file.write("".join(json.dumps(result) + "\n" for result in results).encode())
        sync(self._file)

    def finish(self, figures: dict[str, Any], documents: int) -> None:
        """Keep the figures of all documents, of which there have to be as many as lines."""
        if self.lines > documents:
            raise InputError(f"output: {self.path} has {self.lines} results, the data {documents}; give all the data")
        write_whole(self.beside, json.dumps({"run": self.run, "figures": plain(figures)}, indent=2) + os.linesep)


def plain(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures as JSON can have them, which has no number for what is infinite."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in figures.items()}
