"""One text to tokens: what stands outside the merges is found first, and the rest is cut into words and merged."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.encoding.batching import truncate
from gpt2_multi.tokenizer.encoding.results import Encoding, Row, Span, Tokens, encoding_of
from gpt2_multi.tokenizer.engine.bpe import BPE
from gpt2_multi.tokenizer.engine.words import repair
from gpt2_multi.tokenizer.files import Parts, Piece
from gpt2_multi.tokenizer.special import ControlTokens


@dataclass  # a frozen one takes a microsecond more, of each call
class Reader:
    """How a call reads texts.

    encode: ordinary text without lone surrogates to a list of ids, or an array where `pieces` are asked for. raw: the
    bytes of each id.
    allowed: the control tokens that are found in texts. refused: those that a text may not contain. prefix_space: put
    a space before text that follows none, but another token or nothing.
    """

    control: ControlTokens
    engine: BPE
    encode: Callable[[str], Any]
    raw: Mapping[int, bytes]
    allowed: frozenset[str]
    refused: frozenset[str]
    prefix_space: bool
    parts: Parts

    def read(self, text: str, detailed: bool) -> Tokens:
        """The tokens of a text; detailed: with the span in it and the number of the word of each."""
        self.control.refuse(text, self.refused)
        return self._detailed(text) if detailed else self._plain(text)

    def read_words(self, words: Sequence[str], detailed: bool) -> Tokens:
        """A text that is already split: each word gets a space before it; spans count from the word's beginning."""
        ids: list[int] = []
        spans: list[Span] = []
        numbers: list[int | None] = []
        for at, word in enumerate(words):
            tokens = self.read(word, detailed)
            ids += tokens.ids
            spans += tokens.spans or []
            numbers += [at] * len(tokens.ids)
        return Tokens(ids, spans, numbers) if detailed else Tokens(ids)

    def pieces(self, text: str, goes_on: bool = False) -> Iterator[Any]:
        """The ids of a text, which may go on from another, piece by piece as `encode` gives them."""
        for part in self.control.split(repair(text), self.allowed, goes_on=goes_on):
            if part.id is not None:
                yield [part.id]
            else:
                for at, piece in self.parts.steps.parts(part.text):
                    yield self.encode(self._prefix(piece, part.goes_on and not at) + piece)

    def _plain(self, text: str) -> Tokens:
        return Tokens(list(chain.from_iterable(self.pieces(text))))

    def _detailed(self, text: str) -> Tokens:
        ids: list[int] = []
        words: list[int | None] = []
        spans: list[Span] = []
        for number, (found, places) in enumerate(self._words(repair(text))):
            ids += found
            spans += places
            words += [number] * len(found)
        for is_prefixed in self.parts.around.trims:
            spans = [self._trimmed(at, span, is_prefixed and not span[0]) for at, span in zip(ids, spans, strict=True)]
        return Tokens(ids, unrepaired(text, spans), words)

    def _words(self, text: str) -> Iterator[tuple[Sequence[int], Iterable[Span]]]:
        """The ids and the spans of each word, and of each token that stands outside the merges."""
        for part in self.control.split(text, self.allowed, in_place=True):
            if part.id is not None:
                yield [part.id], [(part.start, part.start + len(part.text))]
            else:
                for more, piece in self.parts.steps.parts(part.text):
                    yield from self._pieced(piece, part.start + more, part.goes_on and not more)

    def _pieced(self, piece: str, position: int, goes_on: bool) -> Iterator[tuple[Sequence[int], Iterable[Span]]]:
        prefix = self._prefix(piece, goes_on)
        place = position - len(prefix)
        for word, ids in self.engine.words(prefix + piece):
            yield ids, self._spans(word, ids, place, position)
            place += len(word)

    def _spans(self, word: str, ids: Sequence[int], start: int, least: int) -> Iterable[Span]:
        """The spans of a word's tokens; a space that was put before `least` has those of what follows it."""
        sizes = [len(self.raw[at]) for at in ids]
        if len(ids) == 1 or sum(sizes) != len(word.encode()):  # an unknown byte has the unknown token's size
            spans = [(start, start + len(word))] * len(ids)
        else:
            spans = char_spans(word, sizes, start)
        return spans if start >= least else [(max(first, least), max(last, least + 1)) for first, last in spans]

    def _trimmed(self, at: int, span: Span, keeps: bool) -> Span:
        """A span without the spaces that its token begins and ends with; one that was put before a text `keeps` it."""
        text = self.raw[at]
        left, right = (len(text) - len(rest) for rest in (text.lstrip(b" "), text.rstrip(b" ")))
        first = span[0] if keeps else min(span[0] + left, span[1])
        return first, max(span[1] - right, first) if span[1] >= right else span[1]

    def _prefix(self, text: str, goes_on: bool) -> str:
        return " " if self.prefix_space and text[0] != " " and not goes_on else ""


@dataclass
class Texts:
    """The texts of a call, or also their pairs, and how they become rows of tokens.

    split: they are lists of words. pieces: what a row is put together of. limit, strategy, stride, side: how rows are
    cut; see `batching.truncate`.
    """

    columns: list[list[Any]]
    reader: Reader
    split: bool
    pieces: tuple[Piece, ...]
    limit: int
    strategy: str
    stride: int | None
    side: str

    def rows(self, detailed: bool) -> tuple[list[Row], list[int]]:
        """The rows, and for each the number of the text that it comes from.

        Raises:
            TokenizerError: a text holds a token that is refused, or there is no room for what is added.
        """
        read: Any = self.reader.read_words if self.split else self.reader.read
        rows: list[Row] = []
        owners: list[int] = []
        for owner, given in enumerate(zip(*self.columns, strict=True)):
            sequences = [read(text, detailed) for text in given]
            room = self.limit - sum(len(piece.ids) for piece in self.pieces)
            if self.strategy and room < 0:
                added = self.limit - room
                raise TokenizerError(f"max_length: expected room for {added} added tokens, found {self.limit}")
            sizes = [len(tokens.ids) for tokens in sequences]
            for parts in truncate(sizes, room, self.strategy, self.stride, self.side):
                rows.append(Row(sequences, parts, self.pieces))
                owners.append(owner)
        return rows, owners

    def encodings(self, ids: list[list[int]], side: str, spell: Callable[[list[int]], list[str]]) -> list[Encoding]:
        """What is known of the tokens of each row, whose ids were these when they were padded on that side."""
        rows, _ = self.rows(True)
        return [encoding_of(row, own, side, spell) for row, own in zip(rows, ids, strict=True)]


_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]")


def unrepaired(text: str, spans: list[Span]) -> list[Span]:
    """Spans in `repair(text)` as spans in `text`, where a surrogate pair is two characters."""
    pairs = [match.start() for match in _SURROGATES.finditer(text) if len(match[0]) == 2]
    if not pairs:
        return spans
    joined, start = [0], 0
    paired = set(pairs)
    while start < len(text):
        start += 2 if start in paired else 1
        joined.append(start)
    return [(joined[first], joined[last]) for first, last in spans]


def char_spans(word: str, sizes: Iterable[int], start: int) -> list[Span]:
    """The characters that tokens of the given sizes in bytes stand for, in a word that begins at `start`.

    A token that holds a part of a character has the whole character's span.
    """
    ends = list(accumulate(sizes))
    starts = [0, *ends[:-1]]
    if not word.isascii():
        owner = [at for at, char in enumerate(word) for _ in char.encode()]  # byte -> character
        starts = [owner[first] for first in starts]
        ends = [owner[last - 1] + 1 for last in ends]
    return [(start + first, start + last) for first, last in zip(starts, ends, strict=True)]
