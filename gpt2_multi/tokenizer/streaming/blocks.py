"""What comes of files and of texts: blocks of segments, and of a block its ids."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt2_multi.errors import TokenizerError, described
from gpt2_multi.tokenizer.encoding.reading import Reader
from gpt2_multi.tokenizer.engine.texts import SIZE, parts, read
from gpt2_multi.tokenizer.engine.words import repair
from gpt2_multi.tokenizer.files import Piece
from gpt2_multi.tokenizer.special import GuardedText


class Segment(NamedTuple):
    """A text, or a part of one, and whether it begins and ends there."""

    text: str
    begins: bool
    ends: bool


Block = list[Segment]


def blocks(sources: Iterable[Any], reader: Reader) -> Iterator[Block]:
    """The texts of the sources in blocks of about `SIZE` characters: parts of a long one, or many short ones.

    Raises:
        TokenizerError: a source is no text, or cannot be read.
    """
    block, size = [], 0
    for number, source in enumerate(sources):
        for segment in _segments(source, number, reader):
            block.append(segment)
            size += len(segment.text) + 1
            if size >= SIZE:
                yield block
                block, size = [], 0
    if block:
        yield block


def _segments(source: Any, number: int, reader: Reader) -> Iterator[Segment]:
    begins, found = True, _parts(source, number, reader)
    text = next(found, "")
    for following in found:
        yield Segment(text, begins, False)
        text, begins = following, False
    yield Segment(text, begins, True)


def _parts(source: Any, number: int, reader: Reader) -> Iterator[str]:
    """A text in parts, or whole where what is done to it before it is cut into words depends on all of it."""
    if isinstance(source, GuardedText):
        return iter([source])
    if isinstance(source, str):
        name, chunks = f"the text at {number}", iter([repair(source)])
    elif isinstance(source, os.PathLike) or hasattr(source, "read"):
        name = str(source if isinstance(source, os.PathLike) else getattr(source, "name", described(source)))
        chunks = read(source, name)
    else:
        raise TokenizerError(
            f"texts: expected texts, paths (pathlib.Path) or open files, found {described(source)} at {number}"
        )
    return parts(chunks, name, reader.control.tokens) if reader.parts.steps.are_gpt2 else iter(["".join(chunks)])


@dataclass
class BlockEncoder:
    """What gives the ids of a block.

    reader: of which `encode` gives ids in a list or an array. pieces: what is put around a text. dtype: of the array.
    """

    reader: Reader
    pieces: tuple[Piece, ...]
    dtype: str

    def __call__(self, block: Block) -> Any:
        import numpy as np

        at = next(at for at, piece in enumerate(self.pieces) if piece.of is not None)
        found: list[Any] = [[]]
        for text, begins, ends in block:
            found += [piece.ids for piece in self.pieces[:at] if begins]
            found += self.reader.pieces(text, not begins)
            found += [piece.ids for piece in self.pieces[at + 1 :] if ends]
        return np.concatenate([np.asarray(ids, self.dtype) for ids in found])
