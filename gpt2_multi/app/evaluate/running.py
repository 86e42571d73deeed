"""A run: documents of files in, blocks of them measured one after the other, results out in order and once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar, Protocol

from gpt2_multi.app.backends import lacks_memory
from gpt2_multi.app.evaluate.records import Block, Item, Records, blocks, digest
from gpt2_multi.app.evaluate.scorer import Done, Scorer, Source
from gpt2_multi.errors import InputError
from gpt2_multi.files.documents import File, objects, read
from gpt2_multi.model.config import GPT2Config

Result = dict[str, Any]
Seen = Callable[[int], object]
# From blocks each with its results, in order.
Compute = Callable[[Iterable[Block]], Iterator[tuple[Block, list[Result]]]]


class Measure(Protocol):
    """What is measured of documents: perplexity, or a task."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Its name."""

    def settled(self, config: GPT2Config) -> Measure:
        """The same with every choice made, as a model allows."""

    def parse(self, document: Any) -> Any:
        """What is measured of a document; InputError where it is none."""

    def measure(self, values: Sequence[Any], scorer: Scorer, done: Done = float) -> list[Result]:
        """The result of each."""

    def summary(self, results: Iterable[Result]) -> Result:
        """The figures of all results."""


def described(measure: Measure) -> dict[str, Any]:
    """What is measured, with every choice."""
    return {"measure": measure.name} | {name: value for name, value in asdict(measure).items() if name != "name"}


def texts(files: Iterable[File], field: str | None) -> Iterator[Item]:
    """The texts of files."""
    for file in files:
        counted = Counter()
        for number, document in enumerate(read([file], field, counted), 1):
            text = document if isinstance(document, str) else document.read()
            where = file.name if file.kind == "text" else f"{file.name}, document {number}"
            data = text.encode("utf-8", "surrogatepass")
            yield Item(where, digest(data), text, len(data), counted.taken())


def questions(files: Iterable[File], measure: Measure) -> Iterator[Item]:
    """The questions of .jsonl files, and of standard input."""
    for file in files:
        if file.kind != "lines" and file.path is not None:
            raise InputError(f"{file.name}: a task needs a .jsonl, with a question on each line; save it as one")
        counted = Counter()
        for where, row in objects(file, counted):
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected an object, found {type(row).__name__}; mend the line")
            try:
                value = measure.parse(row)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            data = json.dumps(row, sort_keys=True).encode()
            yield Item(where, digest(data), value, len(data), counted.taken())


class Counter:
    """Counts bytes that are read."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, count: int) -> None:
        self.count += count

    def taken(self) -> int:
        """How many there were since it was asked before."""
        count, self.count = self.count, 0
        return count


def results(items: Iterable[Item], limit: int | None, compute: Compute, records: Records | None) -> Iterator[Result]:
    """The result of each document, in order: those that are recorded, and then the others, which are recorded too."""
    waiting, rest = blocks(islice(items, limit)), list[Block]()
    for block in waiting:
        if records is None or not records.has(block):
            rest.append(block)
            break
        yield from records.old(block)
    for block, found in compute(chain(rest, waiting)):
        each = [
            {"document": block.start + i, "source": item.where, "digest": item.digest} | result
            for i, (item, result) in enumerate(zip(block.items, found, strict=True))
        ]
        if records is not None:
            records.write(each)
        yield from each


def in_process(source: Source, measure: Measure, advance: Seen) -> Compute:
    """Blocks measured in this process; the model is loaded for the first. `advance` is told of bytes that are done."""

    def compute(waiting: Iterable[Block]) -> Iterator[tuple[Block, list[Result]]]:
        scorer: Scorer | None = None
        for block in waiting:
            scorer = scorer or source.load()
            done = partial(_advance, advance, sum(item.read for item in block.items))
            try:
                found = measure.measure([item.value for item in block.items], scorer, done)
            except Exception as error:
                raise explained(block, error) from None
            yield block, found

    return compute


def explained(block: Block, error: Exception) -> Exception:
    """An error of one of these documents that says where it is, and what to do."""
    if lacks_memory(error):
        return located(
            block, "the memory does not suffice; give a smaller --batch-size, a shorter --length, or --dtype"
        )
    return located(block, error) if isinstance(error, InputError) else error


def located(block: Block, error: Exception | str) -> InputError:
    """An error of one of these documents."""
    others = len(block.items) - 1
    where = f"{block.items[0].where}, or one of {others} after it" if others else block.items[0].where
    return InputError(f"{where}: {error}")


def _advance(advance: Seen, size: int, part: float) -> None:
    advance(round(part * size))
