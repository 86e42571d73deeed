"""Texts on disk, document by document: .txt, .jsonl and .parquet, folders and patterns of them, and standard input."""

from __future__ import annotations

import codecs
import glob
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gpt2_multi.errors import InputError, described, nearest, shortened

FIELD = "text"
STDIN = "standard input"
LONGEST = 1 << 28  # bytes of a line of JSON: what is read of a file that has no lines stays bounded
KINDS = {".txt": "text", ".jsonl": "lines", ".parquet": "parquet"}  # what is taken of a folder
TOKENS = (".bin", ".npy")  # token ids, which only training reads
Seen = Callable[[int], object]  # is told how many bytes more were read


class File(NamedTuple):
    """A file, or standard input, whose `path` is None; `size` is None where it is not known before it is read."""

    name: str
    path: Path | None
    kind: str  # "text" is one document, a row of "lines" or "parquet" is one; "tokens" has none
    size: int | None

    def open(self) -> BinaryIO:
        """Open it for reading."""
        if self.path is None:
            return sys.stdin.buffer
        with _reading(self.name):
            return self.path.open("rb")


class Found(NamedTuple):
    """The files of some sources in order, and what else lies in the folders among them and is not read."""

    files: list[File]
    others: list[Path]


def find(sources: Iterable[str | os.PathLike[str]], field: str | None = None) -> Found:
    """The files that are named: each by its path, a folder's by its own, all that match a pattern, or "-".

    A folder is searched to its ground, in the order of names, for .txt, .jsonl and .parquet; hidden files are passed
    over. What is named itself is a text, whatever its ending, unless it is one of those, or .bin or .npy. Standard
    input is a text, or lines of JSON where a `field` is asked for. Raises InputError for what is not there or empty.
    """
    files: list[File] = []
    others: list[Path] = []
    names = list(map(str, sources))
    for source in names:
        paths = [] if source == "-" else _matching(source)
        found = [file for path in paths for file in _files(path, others)] if paths else [_stdin(field)]
        if [file.path for file in found if file.size == 0] == [Path(source)]:
            raise InputError(f"{source}: the file is empty; leave it out")
        files += [file for file in found if file.size != 0]
    _check_found(names, files, others, field)
    return Found(files, others)


def _stdin(field: str | None) -> File:
    if sys.stdin is None:
        raise InputError("-: expected standard input, found it closed; name a file")
    return File(STDIN, None, "text" if field is None else "lines", None)


def _matching(source: str) -> list[Path]:
    if Path(source).exists():
        return [Path(source)]
    if found := sorted(glob.glob(source, recursive=True)):  # noqa: PTH207 - it may be absolute
        return list(map(Path, found))
    folder = Path(source).parent
    near = nearest(Path(source).name, [path.name for path in folder.iterdir()] if folder.is_dir() else [])
    raise InputError(f"{source}: no such file or folder, and no file matches it{near or '; check the path'}")


def _files(path: Path, others: list[Path]) -> Iterator[File]:
    """The files of a folder, or the one that is named itself or matches a pattern."""
    if path.is_dir():
        yield from _walk(path, others)
        return
    state, ending = path.stat(), path.suffix.lower()
    if ending == ".json":
        raise InputError(f"{path}: expected one object on each line, as in .jsonl, found .json; rename it if it is so")
    kind = "tokens" if ending in TOKENS else KINDS.get(ending, "text")
    yield File(str(path), path, kind, state.st_size if stat.S_ISREG(state.st_mode) else None)


def _walk(folder: Path, others: list[Path]) -> Iterator[File]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(place, name)
            if path.suffix.lower() in KINDS:
                yield File(str(path), path, KINDS[path.suffix.lower()], path.stat().st_size)
            else:
                others.append(path)


def _check_found(names: Sequence[str], files: Sequence[File], others: Sequence[Path], field: str | None) -> None:
    if not files:
        tokens = [path for path in others if path.suffix in TOKENS]
        advice = f"name files of tokens by themselves, or by a pattern like {tokens[0].parent}/train*" if tokens else ""
        raise InputError(
            f"{shortened(', '.join(names))}: expected .txt, .jsonl or .parquet, found {_count(others)}; "
            f"{advice or 'name the texts themselves'}"
        )
    if field is not None and not any(file.kind in ("lines", "parquet") for file in files):
        raise InputError(f"field: {files[0].name} has no fields, which .jsonl and .parquet have; leave it out")


def _count(others: Sequence[Path]) -> str:
    """Words for the files that are not read, the first of them by its name."""
    if not others:
        return "no files"
    return str(others[0]) if len(others) == 1 else f"{len(others)} other files, such as {others[0]}"


def documents(sources: Iterable[str | os.PathLike[str]], field: str | None = None) -> Iterator[str]:
    """Each document of these sources as one text; see `find` and `read`."""
    for document in read(find(sources, field).files, field):
        yield document if isinstance(document, str) else document.read()


def read(files: Iterable[File], field: str | None = None, seen: Seen = int) -> Iterator[str | TextFile]:
    """The documents of files: a row as it is; a text, which may be of any size, as a file that is open until the next.

    field: which one of a row is its text, by default "text". seen: is called with the number of bytes, as they are
    read. Raises InputError where a row has no such text, or a file is not what its ending says.
    """
    for file in files:
        if file.kind == "text":
            with closing(TextFile(file, seen)) as text:
                yield text
        elif file.kind == "lines":
            yield from _lines(file, field or FIELD, seen)
        elif file.kind == "parquet":
            yield from _parquet(file, field or FIELD, seen)
        else:
            raise InputError(f"{file.name}: holds token ids, and texts are wanted; name the texts that they are of")


class TextFile:
    """A text in UTF-8, read part by part; a byte order mark before it is no part of it."""

    def __init__(self, file: File, seen: Seen = int) -> None:
        self.name, self._file, self._seen = file.name, file, seen
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._open: BinaryIO | None = None
        self._line, self._ended = 1, False

    def read(self, size: int = -1) -> str:
        """The next characters of about `size` bytes, "" at the end; all that are left without a size."""
        if size < 0:
            return "".join(iter(lambda: self.read(1 << 24), ""))
        text = ""
        while not text and not self._ended:
            text = self._decoded(self._bytes(size))
        return text

    def _bytes(self, size: int) -> bytes:
        self._open = self._open or self._file.open()
        with _reading(self.name):
            found = self._open.read(size)
        self._seen(len(found))
        self._ended = not found
        return found

    def close(self) -> None:
        """Close the file, unless it is standard input."""
        if self._open is not None and self._file.path is not None:
            self._open.close()

    def _decoded(self, found: bytes) -> str:
        before = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(found, not found)
        except UnicodeDecodeError as error:
            whole = before + found
            line = self._line + whole[: error.start].count(b"\n")
            raise InputError(_not_utf8(self.name, line, whole, error)) from None
        self._line += text.count("\n")
        return text


def _not_utf8(name: str, line: int, data: bytes, error: UnicodeDecodeError) -> str:
    byte = f"the byte 0x{data[error.start]:02x}" if error.start < len(data) else "its end"
    return f"{name}, line {line}: expected UTF-8, found {byte} ({error.reason}); convert it first"


def _lines(file: File, field: str, seen: Seen) -> Iterator[str]:
    for where, row in objects(file, seen):
        yield _text_of(row, field, where)


def objects(file: File, seen: Seen = int) -> Iterator[tuple[str, Any]]:
    """The value on each line of a .jsonl, and the words for where it stands."""
    opened = file.open()
    try:
        number = 0
        while line := _line(opened, file.name):
            number += 1
            seen(len(line))
            if len(line) == LONGEST:
                raise InputError(f"{file.name}, line {number}: is longer than {LONGEST} bytes; is it a .jsonl?")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.isspace():
                yield f"{file.name}, line {number}", _object(line, file.name, number)
    finally:
        if file.path is not None:
            opened.close()


def _line(opened: BinaryIO, name: str) -> bytes:
    with _reading(name):
        return opened.readline(LONGEST)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error}); name a readable file") from None


def _object(line: bytes, name: str, number: int) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(name, number, line, error)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}, line {number}: not valid JSON ({shortened(str(error))}); mend the line") from None


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with the field {field!r}, found {described(row)}; mend the line")
    if field not in row:
        known = ", ".join(map(repr, list(row)[:9])) or "none"
        raise InputError(f"{where}: expected the field {field!r}, found {shortened(known)}; name the text by --field")
    if not isinstance(row[field], str):
        raise InputError(f"{where}: expected a text in {field!r}, found {described(row[field])}; leave the row out")
    text: str = row[field]
    return text


def _parquet(file: File, field: str, seen: Seen) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f'{file.name}: reading .parquet needs pyarrow: pip install "gpt2-multi[train]"') from None
    try:
        with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as opened:
            names = opened.schema_arrow.names
            if field not in names:
                _text_of(dict.fromkeys(names), field, file.name)
            yield from _rows(opened, file, field, seen)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        why = shortened(" ".join(str(error).split()))
        raise InputError(f"{file.name}: not a whole .parquet ({why}); fetch or save it again") from None


def _rows(opened: Any, file: File, field: str, seen: Seen) -> Iterator[str]:
    """The texts of the rows, a few at a time; a group of rows counts as its part of the file's bytes."""
    number, told, groups = 0, 0, opened.num_row_groups
    for group in range(groups):
        for batch in opened.iter_batches(256, [group], [field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _text_of({field: text}, field, f"{file.name}, row {number}")
        now = (file.size or 0) * (group + 1) // groups
        seen(now - told)
        told = now
