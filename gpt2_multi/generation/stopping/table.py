"""Stop strings as a table: which token ends a row whose text so far has begun one of them.

The strings become an automaton over bytes (Aho and Corasick 1975), and the automaton a table over tokens, so that a
decode loop finds a string that begins or ends within a token by one look-up per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_multi.errors import InputError, described
from gpt2_multi.generation.stopping.spelling import UNKNOWN, Foreign, Key, own, size_of, token_bytes
from gpt2_multi.model import inputs

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]
LONGEST = 1024  # bytes of stop strings; a state for each is a row of the table
FOUND = -1  # instead of a state: a stop string ends within this token


def stop_table(stops: Sequence[str], tokenizer: GPT2Tokenizer | None, vocab_size: int) -> Array:
    """The state after each token from each state, or FOUND: (S, V) int32, S a power of two; a row begins in state 0."""
    if not stops:
        return np.zeros((1, vocab_size), np.int32)
    if tokenizer is None:
        raise InputError("stop_strings: are found in text, which needs a tokenizer; give tokenizer=")
    inputs.check_tokenizer(tokenizer)
    if (size := sum(map(len, spelled(stops)))) > LONGEST:
        raise InputError(f"stop_strings: {size} bytes in all are more than {LONGEST}; give fewer, or shorter ones")
    known = own(tokenizer)
    table = _table(tuple(stops), Key(known), size_of(tokenizer), vocab_size)
    check_parts(stops, known, vocab_size)
    return table


def spelled(stops: Sequence[str]) -> list[bytes]:
    """The bytes of each text; a lone surrogate, which has none, is U+FFFD as in the tokenizer."""
    from gpt2_multi.tokenizer.engine.words import repair  # which few calls need

    return [repair(text).encode() for text in stops]


def check_parts(stops: Sequence[str], tokenizer: Any, vocab_size: int) -> None:
    """InputError where a stop string may be spelled by parts of characters that only another library knows."""
    hidden = [stop for stop in stops if not stop.isascii()]
    if hidden and isinstance(tokenizer, Foreign):
        words = _words(Key(tokenizer), size_of(tokenizer.tokenizer), vocab_size)
        if any(UNKNOWN.encode() in word for word in words):
            raise InputError(
                f"stop_strings: {hidden[0]!r} may be spelled in parts of characters, which this tokenizer, "
                f"{described(tokenizer.tokenizer)}, does not tell; give stop strings of ASCII, or a stopping_criteria"
            )


@lru_cache(maxsize=4)
def _table(stops: tuple[str, ...], tokenizer: Key, known: int | None, vocab_size: int) -> Array:
    steps = automaton(spelled(stops))
    table = np.zeros((1 << (len(steps) - 1).bit_length(), vocab_size), np.int32)
    table[: len(steps)] = np.arange(len(steps))[:, None]
    words = _words(tokenizer, known, vocab_size)
    for place in range(max(map(len, words), default=0)):
        tokens = np.array([token for token, word in enumerate(words) if len(word) > place])
        bytes_here = np.array([words[token][place] for token in tokens])
        states = table[:, tokens]
        table[:, tokens] = np.where(states == FOUND, FOUND, steps[states, bytes_here])
    return table


@lru_cache(maxsize=2)
def _words(tokenizer: Key, known: int | None, vocab_size: int) -> list[bytes]:
    count = vocab_size if known is None else min(known, vocab_size)
    words = [token_bytes(tokenizer.tokenizer, token) for token in range(count)]
    if not any(words):
        raise InputError(f"tokenizer: expected one that decodes ids from 0 to {count - 1}, found none that it knows")
    return words


def until_end(tokens: Iterable[int], table: Array, ends: Sequence[int]) -> Iterator[int]:
    """Tokens up to the first that is an end token, or in which a stop string ends."""
    state = 0
    for token in tokens:
        yield token
        state = table[state, token]
        if state == FOUND or token in ends:
            return


def automaton(words: Sequence[bytes]) -> Array:
    """The state after each byte from each state, or FOUND: (S, 256) int32; a state is what a word may begin with.

    A byte that does not go on leads where it leads from the longest end of the state that is a state too.
    """
    prefixes = sorted({word[:length] for word in words for length in range(len(word))}, key=len)
    number = {prefix: state for state, prefix in enumerate(prefixes)} | dict.fromkeys(words, FOUND)
    steps, ends = np.zeros((len(prefixes), 256), np.int32), [0] * len(prefixes)
    following: dict[bytes, set[bytes]] = {}
    for longer in number:
        following.setdefault(longer[:-1], set()).add(longer)
    for state, prefix in enumerate(prefixes):
        if len(prefix) > 1:
            ends[state] = max(int(steps[ends[number[prefix[:-1]]], prefix[-1]]), 0)
        steps[state] = steps[ends[state]]
        for longer in following.get(prefix, set()) - {b""}:
            if steps[state, longer[-1]] != FOUND:
                steps[state, longer[-1]] = number[longer]
    return steps
