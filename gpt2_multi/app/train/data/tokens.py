"""Token ids in files, mapped and never copied: nanoGPT's .bin, llm.c's .bin, .npy, and several of them as one array."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import InputError, remedy, shortened
from gpt2_multi.files.arrays import release
from gpt2_multi.files.progress import measured

Array = np.ndarray[Any, Any]
HEADER = 1024  # bytes before the tokens of llm.c: 256 integers, the first of which are magic, version, count
LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # magic and version -> what a token is
NO_TOKENS = {20240326: "a model", 20240328: "a tokenizer", 20240522: "questions to evaluate with"}  # of llm.c
PIECE = 1 << 24  # tokens that are looked at together


@dataclass(frozen=True)
class TokenFile:
    """Where in a file the tokens lie, and what each of them is."""

    path: Path
    dtype: str
    offset: int
    count: int


def open_tokens(path: Path) -> TokenFile:
    """What a file of tokens is: .npy with integers; .bin of llm.c by its header; else .bin of nanoGPT, plain uint16.

    Raises InputError where it is none of them, or not whole.
    """
    try:
        size = path.stat().st_size
        found = _npy(path) if path.suffix.lower() == ".npy" else _bin(path, size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a readable file") from None
    expected = found.offset + found.count * np.dtype(found.dtype).itemsize
    if size != expected:
        raise InputError(f"{path}: expected {expected} bytes, found {size}; {remedy(path)}")
    return found


def _bin(path: Path, size: int) -> TokenFile:
    with path.open("rb") as file:
        head = file.read(HEADER)
    magic, version, count = np.frombuffer(head.ljust(12, b"\0")[:12], "<i4").tolist()
    if (dtype := LLM_C.get((magic, version))) and len(head) == HEADER:
        return TokenFile(path, dtype, HEADER, max(count, 0))
    if magic in dict(LLM_C) or magic in NO_TOKENS or any(magic == known for known, _ in LLM_C):
        what = NO_TOKENS.get(magic, f"version {version}")
        raise InputError(f"{path}: expected tokens of llm.c, found {what}; name a file of tokens")
    if path.with_name("meta.pkl").exists():
        raise InputError(
            f"{path}: meta.pkl beside it says that its tokens are characters of a vocabulary of its own; train on the "
            "text that it was made of"
        )
    return TokenFile(path, "<u2", 0, -(-size // 2))


def _npy(path: Path) -> TokenFile:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole .npy ({shortened(str(error))}); {remedy(path)}") from None
    if not isinstance(found, np.memmap) or found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(f"{path}: expected integers in one row, found {found.dtype} of shape {found.shape}")
    return TokenFile(path, found.dtype.str, found.offset, len(found))


def _mapped(file: TokenFile) -> Array:
    return np.asarray(np.memmap(file.path, file.dtype, "r", file.offset, (file.count,)))


class Tokens:
    """The tokens of several files as one array (N,), of which a slice reads no more than it has."""

    def __init__(self, files: Sequence[TokenFile], start: int = 0, stop: int | None = None) -> None:
        self.files = [file for file in files if file.count]
        self._ends = list(accumulate(file.count for file in self.files))
        self._map = lru_cache(maxsize=64)(_mapped)  # a map keeps its file open, and a process may have a thousand
        self._start = start
        self._stop = (self._ends[-1] if self._ends else 0) if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, at: slice) -> Array:
        """A slice, of one file without a copy."""
        start, stop, step = at.indices(len(self))
        if step != 1:
            raise InputError(f"ids: expected a slice without a step, found one of {step}; slice what this gives")
        parts = list(self._parts(self._start + start, self._start + max(start, stop)))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint16), *parts])

    def part(self, start: int, stop: int) -> Tokens:
        """The tokens from one to another, which are not read."""
        return Tokens(self.files, self._start + start, self._start + stop)

    def pieces(self) -> Iterator[tuple[int, Array]]:
        """All of them, a few at a time, each piece with its place."""
        for start in range(0, len(self), PIECE):
            yield start, self[start : start + PIECE]

    def name(self, place: int) -> str:
        """The file of a token, and its place there, for a sentence about it."""
        number = bisect_right(self._ends, self._start + place)
        file = self.files[number]
        return f"{file.path}, token {self._start + place - self._ends[number] + file.count}"

    def _parts(self, start: int, stop: int) -> Iterator[Array]:
        number = bisect_right(self._ends, start)
        while start < stop:
            file = self.files[number]
            first = self._ends[number] - file.count
            part = self._map(file)[start - first : stop - first]
            yield part
            start, number = start + len(part), number + 1


def check_vocabulary(tokens: Tokens, vocab_size: int) -> None:
    """Look at every token, in pieces; InputError where one is outside a model's vocabulary."""
    size = sum(file.count * np.dtype(file.dtype).itemsize for file in tokens.files)
    with measured("Looking at tokens", size) as seen:
        for start, piece in tokens.pieces():
            wrong = piece >= vocab_size if piece.dtype.kind == "u" else (piece < 0) | (piece >= vocab_size)
            if wrong.any():
                at = int(wrong.argmax())
                raise InputError(
                    f"{tokens.name(start + at)}: {piece[at]} is outside the model's vocabulary (0 to "
                    f"{vocab_size - 1}); give tokens of the model's tokenizer"
                )
            seen(piece.nbytes)
            release(piece)  # of files that may be larger than memory


def divided(tokens: Tokens, fraction: float, end: int | None) -> tuple[Tokens, Tokens]:
    """The tokens without their last `fraction`, and these: cut behind an end token, if there is one near.

    Near is half of what there is on either side, and a million tokens at most. Raises InputError where one is empty.
    """
    cut = len(tokens) - round(len(tokens) * fraction)
    if not 0 < cut < len(tokens):
        raise InputError(
            f"val_fraction: {fraction} of {len(tokens)} tokens leaves a part without any; give a longer text, or "
            "choose another"
        )
    reach = min(cut // 2, (len(tokens) - cut) // 2, 1 << 20)
    ends = cut - reach + 1 + np.flatnonzero(tokens[cut - reach : cut + reach] == end)  # each the place behind one
    if len(ends):
        cut = int(ends[np.abs(ends - cut).argmin()])
    return tokens.part(0, cut), tokens.part(cut, len(tokens))
