"""Which characters of a text a token stands for, and lone surrogates."""

import re
from collections.abc import Iterable
from itertools import accumulate

Span = tuple[int, int]
_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]")


def repair(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has an encoding."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


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
