"""Texts part by part: files read in bounded memory, and cuts only where the ids of the parts are those of the whole."""

import codecs
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.engine.words import cuts, repair

CHUNK = 1 << 20  # bytes of a file that are read at once
SIZE = 1 << 19  # characters of a part: few enough for the memory, and so many that a cut costs nothing
LONGEST = 1 << 20  # characters that may follow them before there is a place to cut at


def read(source: Any, name: str) -> Iterator[str]:
    """The text of a path, or of a file that is open for reading, in chunks; white space and ends of lines as they are.

    Raises:
        TokenizerError: it cannot be read, or its bytes are not UTF-8.
    """
    try:
        if isinstance(source, os.PathLike):
            with Path(source).open("rb") as file:
                yield from _decoded(file, name)
        else:
            yield from _decoded(source, name)
    except OSError as error:
        raise TokenizerError(f"{name}: cannot be read ({error.strerror or error}); name a readable file") from error


def _decoded(file: Any, name: str) -> Iterator[str]:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    while chunk := file.read(CHUNK):
        if isinstance(chunk, str):  # of a file that is open as text
            while "\ud800" <= chunk[-1] <= "\udbff" and (more := file.read(1)):  # the other half of a pair
                chunk += more
            yield repair(chunk)
        else:
            yield _text(decoder, chunk, name, done)
            done += len(chunk)
    _text(decoder, b"", name, done)


def _text(decoder: codecs.IncrementalDecoder, chunk: bytes, name: str, done: int) -> str:
    """What a chunk has after the bytes of a character that stand before it; an empty one is the last."""
    first = done - len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, not chunk)
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{name}: expected UTF-8, found otherwise at byte {first + error.start} ({error.reason}); convert it first"
        ) from error


def parts(chunks: Iterable[str], name: str, tokens: Collection[str] = ()) -> Iterator[str]:
    """A text that comes in chunks as parts of about `SIZE` characters, whose ids are together those of the text.

    They are cut where a word begins in any case, and away from everything that may be one of the added `tokens`.

    Raises:
        TokenizerError: there is no such place for so long that the memory would not be bounded.
    """
    reach, rest, done = max(map(len, tokens), default=0), "", 0
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while (stop := _place(rest, start + SIZE, len(rest) - reach, tokens)) is not None:
            yield rest[start:stop]
            start = stop
        rest, done = rest[start:], done + start
        if len(rest) > SIZE + LONGEST + reach:
            raise TokenizerError(
                f"{name}: expected white space, or a change between letters, numbers and marks, found none in "
                f"{LONGEST} characters from character {done + SIZE} on; break the text there, or take all of it as one "
                "str to `encode` or `train`"
            )
    yield rest


def _place(text: str, start: int, stop: int, tokens: Collection[str]) -> int | None:
    """The first place to cut a text at, beyond which more than the longest token has to be known."""
    for match in cuts().finditer(text, start, max(stop, 0)):
        at = match.end()
        if not any(token in text[max(at - len(token), 0) : at + len(token)] for token in tokens):
            return at
    return None
