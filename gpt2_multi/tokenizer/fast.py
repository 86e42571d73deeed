"""GPT2TokenizerFast: the answers of GPT2Tokenizer from gigatoken, a compiled engine that needs no download.

The engine keeps its own tables of Unicode, of another version than the ids are pinned to. It is asked once which code
points it classes differently, and a text with one of them goes to the Python engine; ASCII never raises the question.
"""

import re
from functools import lru_cache
from importlib.util import find_spec
from os import PathLike
from typing import Any

from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.engine.words import ABOVE_BMP, Ranges, code_point_classes, spell_ranges, windows
from gpt2_multi.tokenizer.files import to_tokenizer_json
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

PLAIN = {"add_prefix_space": False, "add_bos_token": False}
# Ranges of one size in UTF-8 that hold all assigned characters; the last has the tags that emoji flags are made of.
PROBED = ((0x0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x40000), (0xE0000, 0xE1000))
UNPROBED = [(0x40000, 0xDFFFF), (0xE1000, 0x10FFFF)]  # left to Python without asking
WITHIN = 1 << 12  # characters about a differing code point that are left to Python with it
# A character of each class; what follows it belongs to the same word only if it is of that class too.
PROBES = {"letter": "a", "number": "1", "other": "!"}


class GPT2TokenizerFast(GPT2Tokenizer):
    """GPT2Tokenizer with a compiled engine for ordinary text: the same arguments, the same ids, the same errors.

    Offsets, and texts that the engine would class otherwise, come from the Python engine.

    Raises:
        ImportError: gigatoken is not installed.
        TokenizerError: as GPT2Tokenizer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._engine = self._build()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._engine = self._build()

    def _build(self) -> Any:
        """The compiled engine, or None where the vocabulary lacks bytes or words are others: it knows nothing of it."""
        tokenizer = _gigatoken().Tokenizer
        if not self._bpe.complete or self._bpe.ignore_merges or not self._bpe.use_regex:
            return None
        return tokenizer.from_json(to_tokenizer_json(self._vocab, self._bpe.merges, {}, PLAIN))

    def _encode_ordinary(self, text: str) -> list[int]:
        if self._engine is None:
            return self._bpe.encode(text)
        ids: list[int] = []
        if knows(text):
            ids = self._engine.encode(text).tolist()
        else:
            for part in windows(text, WITHIN):
                ids += self._engine.encode(part).tolist() if knows(part) else self._bpe.encode(part)
        return ids


class AutoTokenizer:
    """There is one kind of tokenizer: `from_pretrained` gives the fast one where its engine is installed."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *, use_fast: bool = True, **options: Any
    ) -> GPT2Tokenizer:
        """What `from_pretrained` of GPT2TokenizerFast gives, which see, or of GPT2Tokenizer; their ids are the same."""
        is_there = use_fast and find_spec("gigatoken") is not None
        return (GPT2TokenizerFast if is_there else GPT2Tokenizer).from_pretrained(
            pretrained_model_name_or_path, **options
        )


def knows(text: str) -> bool:
    """Whether the engine classes every code point of `text` as Unicode 16 does."""
    if text.isascii():
        return True
    low, high = differing_code_points()
    return not (low.search(text) or high.search("".join(ABOVE_BMP.findall(text))))


@lru_cache(maxsize=1)
def differing_code_points() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds a code point that the engine may class differently, below and above U+10000.

    They are two because `re` finds the first in a bitmap and tries the ranges of the second one by one.
    """
    points = [point for start, stop in PROBED for point in _differing(start, stop)]
    low = [(point, point) for point in points if point < 0x10000]
    high = [(point, point) for point in points if point >= 0x10000] + UNPROBED
    return _finder(low), _finder(high)


def _finder(ranges: Ranges) -> re.Pattern[str]:
    joined: Ranges = []
    for low, high in ranges:
        if joined and joined[-1][1] == low - 1:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return re.compile(f"[{spell_ranges(joined)}]" if joined else "(?!)")


def _differing(start: int, stop: int) -> list[int]:
    """The code points from `start` to `stop`, all of one size in UTF-8, whose class is another in the engine."""
    import numpy as np

    expected = np.zeros((stop - start, len(PROBES)), bool)
    for column, name in enumerate(PROBES):
        for low, high in code_point_classes()[name]:
            expected[max(low - start, 0) : max(high + 1 - start, 0), column] = True
    found = np.zeros_like(expected)
    chars = np.frombuffer("".join(map(chr, range(start, stop))).encode(), np.uint8).reshape(stop - start, 1, -1)
    size = 2 + chars.shape[-1]
    text = np.full((stop - start, len(PROBES), size), ord("\n"), np.uint8)
    text[..., 1] = [ord(char) for char in PROBES.values()]
    text[..., 2:] = chars
    ids = _probe().encode(text.tobytes())
    joined = ids >= 256
    ends = np.cumsum(np.where(joined, 2, 1))[joined]  # in bytes
    at = (ends - 1) // size  # a joined token lies within the part of its own probe
    found[at // len(PROBES), at % len(PROBES)] = True
    points: list[int] = (np.flatnonzero((expected != found).any(axis=1)) + start).tolist()
    return points


@lru_cache(maxsize=1)
def _probe() -> Any:
    """A tokenizer that shows where the engine splits: it joins a probe with any byte that follows in its word."""
    merges = [(probe, char) for probe in PROBES.values() for char in byte_characters()]
    tokens = [*byte_characters(), *(left + right for left, right in merges)]
    vocab = {token: at for at, token in enumerate(tokens)}
    return _gigatoken().Tokenizer.from_json(to_tokenizer_json(vocab, merges, {}, PLAIN))


def _gigatoken() -> Any:
    try:
        import gigatoken
    except ImportError as error:
        raise ImportError('GPT2TokenizerFast needs gigatoken: pip install "gpt2-multi[fast]"') from error
    return gigatoken
