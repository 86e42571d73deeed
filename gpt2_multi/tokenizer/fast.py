"""GPT2TokenizerFast: the answers of GPT2Tokenizer from gigatoken, a compiled engine that needs no download.

The engine keeps its own tables of Unicode, of another version than the ids are pinned to. It is asked once which code
points it classes differently, and a text with one of them goes to the Python engine; ASCII never raises the question.
"""

from functools import lru_cache
from importlib.util import find_spec
from os import PathLike
from threading import Lock
from time import thread_time
from typing import Any

from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.engine.words import code_point_classes, windows
from gpt2_multi.tokenizer.files import to_tokenizer_json
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

PLAIN = {"add_prefix_space": False, "add_bos_token": False}
# Ranges of one size in UTF-8 that hold all assigned characters; the last has the tags that emoji flags are made of.
PROBED = ((0x0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x40000), (0xE0000, 0xE1000))
PROBED_AT_ONCE = 1 << 14
UNPROBED = [(0x40000, 0xDFFFF), (0xE1000, 0x10FFFF)]  # left to Python without asking
WITHIN = 1 << 12  # characters about a differing code point that are left to Python with it
# A character of each class; what follows it belongs to the same word only if it is of that class too.
PROBES = {"letter": "a", "number": "1", "other": "!"}
MOST_SPENT = 1.5  # seconds of the engine, in which new words fill some 100 MB
MEASURED = 4096  # characters that it takes so long to encode that asking the clock is nothing
SPENT_ON_NEW = 1e-7  # seconds for a character of new words


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

    def _build(self) -> "Engine | None":
        """The compiled engine, or None where the vocabulary lacks bytes or words are others: it knows nothing of it."""
        _gigatoken()
        if not self._bpe.complete or self._bpe.ignore_merges or not self._bpe.use_regex:
            return None
        return Engine(to_tokenizer_json(self._vocab, self._bpe.merges, {}, PLAIN))

    @property
    def _is_compiled(self) -> bool:
        return self._engine is not None

    def _encode_ordinary(self, text: str) -> list[int]:
        if self._engine is None:
            return self._bpe.encode(text)
        ids: list[int] = self._encode_to_array(text).tolist()
        return ids

    def _encode_to_array(self, text: str) -> Any:
        if self._engine is None:
            return self._bpe.encode(text)
        if knows(text):
            return self._engine.encode(text)
        import numpy as np

        parts = windows(text, WITHIN)
        return np.concatenate([self._engine.encode(part) if knows(part) else self._bpe.encode(part) for part in parts])


class Engine:
    """gigatoken with a vocabulary, made anew before the words that it remembers, each of them for ever, are too many.

    They are not counted there, but new words take nearly all of the time where there are many.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._json, self._lock = tokenizer_json, Lock()  # gigatoken's own lock keeps a core busy that waits
        self._tokenizer: Any = None
        self._renew()

    def _renew(self) -> None:
        self._tokenizer = None  # before there is another, or both would fill the memory
        self._tokenizer, self._spent = _gigatoken().Tokenizer.from_json(self._json), 0.0

    def encode(self, text: str) -> Any:
        """The ids of a text as an array."""
        with self._lock:
            if self._spent > MOST_SPENT:
                self._renew()
            if len(text) < MEASURED:
                self._spent += len(text) * SPENT_ON_NEW
                return self._tokenizer.encode(text)
            start = thread_time()
            ids = self._tokenizer.encode(text)
            self._spent += thread_time() - start
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
    import numpy as np

    return not differing_code_points().take(np.frombuffer(text.encode("utf-32-le"), np.uint32)).any()


@lru_cache(maxsize=1)
def differing_code_points() -> Any:
    """For each code point, whether the engine may class it differently."""
    import numpy as np

    differ, probe = np.zeros(0x110000, bool), _probe()
    for start, stop in PROBED:
        for at in range(start, stop, PROBED_AT_ONCE):
            end = min(at + PROBED_AT_ONCE, stop)
            differ[at:end] = _differing(probe, at, end)
    for low, high in UNPROBED:
        differ[low : high + 1] = True
    return differ


def _differing(probe: Any, start: int, stop: int) -> Any:
    """Whether the engine classes the code points from `start` to `stop`, all of one size in UTF-8, otherwise."""
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
    ids = probe.encode(text.tobytes())
    joined = ids >= 256
    ends = np.cumsum(np.where(joined, 2, 1))[joined]  # in bytes
    at = (ends - 1) // size  # a joined token lies within the part of its own probe
    found[at // len(PROBES), at % len(PROBES)] = True
    return (expected != found).any(axis=1)


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
