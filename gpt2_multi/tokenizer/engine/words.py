"""How GPT-2 cuts a text into words before merging, pinned to Unicode 16.

GPT-2's rule is one regular expression over `\\p{L}`, `\\p{N}` and `\\s`. What these match depends on the engine's
Unicode version, and so would the ids. Here they are spelled out as ranges from `unicode16.json`, so no library's update
can move an id. The standard `re` is used: it looks code points below U+10000 up in a bitmap, which makes explicit
ranges twice as fast as the `regex` module's `\\p{L}`; ranges above are tried one by one, so texts without them, nearly
all, get a pattern of their own.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

Ranges = list[tuple[int, int]]

CONTRACTIONS = "'(?:[sdmt]|ll|ve|re)"
ABOVE_BMP = re.compile("[\U00010000-\U0010ffff]")
WINDOW = 1 << 16  # characters; small enough for the cache, large enough that a cut costs nothing


@lru_cache(maxsize=1)
def code_point_classes() -> dict[str, Ranges]:
    """The inclusive ranges of code points that are a "letter", "number" or "space"; "other" is all the rest."""
    table = json.loads(Path(__file__).with_name("unicode16.json").read_text("ascii"))
    classes = {name: [(low, high) for low, high in table[name]] for name in ("letter", "number", "space")}
    classes["other"] = _complement(sorted(chain.from_iterable(classes.values())))
    return classes


def _complement(ranges: Ranges) -> Ranges:
    starts = [0, *(high + 1 for _, high in ranges)]
    stops = [*(low - 1 for low, _ in ranges), 0x10FFFF]
    return [(low, high) for low, high in zip(starts, stops, strict=True) if low <= high]


def spell_ranges(ranges: Ranges) -> str:
    """Ranges as they stand between the brackets of a regular expression; `re` tries those above U+FFFF in order."""
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)


def _low(name: str) -> str:
    return spell_ranges([(low, min(high, 0xFFFF)) for low, high in code_point_classes()[name] if low <= 0xFFFF])


def _high(name: str) -> str:
    """The part above U+FFFF, the largest ranges first, because `re` tries them in order."""
    ranges = [(max(low, 0x10000), high) for low, high in code_point_classes()[name] if high > 0xFFFF]
    return spell_ranges(sorted(ranges, key=lambda ends: ends[0] - ends[1]))


def _compile(letters: str, numbers: str, others: str) -> re.Pattern[str]:
    space = _low("space")
    return re.compile(f"{CONTRACTIONS}|{letters}|{numbers}|{others}|[{space}]+(?![^{space}])|[{space}]+")


@lru_cache(maxsize=1)
def bmp_pattern() -> re.Pattern[str]:
    """GPT-2's pattern for texts whose code points are all below U+10000."""
    return _compile(*(f" ?[{_low(name)}]++" for name in ("letter", "number", "other")))


@lru_cache(maxsize=1)
def full_pattern() -> re.Pattern[str]:
    """GPT-2's pattern for any text; the lookahead spares code points below U+10000 the search through the ranges."""

    def run(name: str) -> str:
        low, high = _low(name), f"(?=[\U00010000-\U0010ffff])[{_high(name)}]"
        return f" ?(?:[{low}]|{high})[{low}]*+(?:{high}[{low}]*+)*+"

    return _compile(*map(run, ("letter", "number", "other")))


def split_words(text: str) -> list[str]:
    """The words of `text`, in order; joined they are `text` again."""
    if text.isascii() or not ABOVE_BMP.search(text):
        return bmp_pattern().findall(text)
    return full_pattern().findall(text)


@lru_cache(maxsize=1)
def cuts() -> re.Pattern[str]:
    """What finds a character after which a word begins in any case, whatever stands around the two.

    That is white space after something else, and something else after a letter or after a number. All others may go on:
    a mark with a contraction, a space with a word, and white space with more, or without its last character.
    """
    letter, number, space = map(_low, ("letter", "number", "space"))
    unsaid = "\ud800-\udfff\U00010000-\U0010ffff"  # of any class, or halves of such
    return re.compile(f"[^{space}](?=[{space}])|[{letter}](?=[^{letter}{unsaid}])|[{number}](?=[^{number}{unsaid}])")


def windows(text: str, size: int = WINDOW) -> Iterator[str]:
    """`text` in parts of about `size` characters, cut only where a word begins in any case.

    It bounds the memory for the list of words, and confines the slower pattern to the parts that need it.
    """
    start = 0
    while len(text) - start > size and (cut := cuts().search(text, start + size)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:] if start else text


def repair(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has an encoding."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
