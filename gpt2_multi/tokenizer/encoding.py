"""What a call of the tokenizer returns: rows of lists, or the arrays of a framework."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.batching import choose, merge_encodings

Span = tuple[int, int]
FRAMEWORKS = {"np": "numpy", "pt": "torch", "tf": "tensorflow", "jax": "jax"}


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict whose entries are attributes too.

    `word_ids`, `sequence_ids`, `char_to_token` and `token_to_chars` say where each token came from, for a call with
    `return_offsets_mapping` or `is_split_into_words`.
    """

    spell: Callable[[list[int]], list[str]] | None = None  # the tokenizer's, which is not pickled with a batch
    _spans: Sequence[Sequence[Any]] | None = None
    _words: Sequence[Sequence[int | None]] | None = None
    _sequences: Sequence[Sequence[int | None]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name!r} is not among the entries {list(self)}") from None

    @property
    def data(self) -> dict[str, Any]:
        """The entries as a plain dict."""
        return dict(self)

    def to(self, device: Any) -> "BatchEncoding":
        """Move PyTorch or JAX arrays to a device, in place; whole numbers stay so where a dtype is given.

        Raises:
            TokenizerError: an entry is something else; ask for return_tensors="pt" or "jax".
        """
        for name, value in self.items():
            if type(value).__module__.partition(".")[0] == "jaxlib":
                import jax

                self[name] = jax.device_put(value, device)
            elif hasattr(value, "to"):
                keep = type(device).__name__ == "dtype" and not value.is_floating_point()
                self[name] = value if keep else value.to(device)
            else:
                raise TokenizerError(f'{name!r} is a {type(value).__name__}; .to() needs return_tensors="pt" or "jax"')
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "spell"}

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as the vocabulary spells them.

        Raises:
            TokenizerError: it is not what a call of the tokenizer gave, but a copy of it.
        """
        if self.spell is None:
            raise TokenizerError("tokens: are known where the tokenizer was called; use convert_ids_to_tokens")
        return self.spell(merge_encodings({"input_ids": self["input_ids"]})[0]["input_ids"][batch_index])

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token with a character of a text (with two numbers: of that row), or None where there is none.

        Raises:
            TokenizerError: the call kept no record of characters.
        """
        row, at = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        spans = zip(self._recorded(self._spans, row), self.sequence_ids(row), strict=True)
        found = (i for i, (span, own) in enumerate(spans) if own == sequence_index and span[0] <= at < span[1])
        return next(found, None)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> Span | None:
        """The characters of a token (with two numbers: of that row), from and to; None for one that was added.

        Raises:
            TokenizerError: the call kept no record of characters.
        """
        row, at = (0, batch_or_token_index) if token_index is None else (batch_or_token_index, token_index)
        span: Span = self._recorded(self._spans, row)[at]
        return None if self.sequence_ids(row)[at] is None else span

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the index of its word; None for tokens that were added.

        Raises:
            TokenizerError: the call kept no record of words.
        """
        return self._recorded(self._words, batch_index)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 (the text) or 1 (its pair); None for tokens that were added.

        Raises:
            TokenizerError: the call kept no record of sequences.
        """
        return self._recorded(self._sequences, batch_index)

    def record(self, rows: "Sequence[Row]", side: str) -> None:
        """Keep where the tokens of each row came from, padded as its `input_ids` are."""

        def column(name: str) -> list[list[Any]]:
            lists = [row.entry(name) for row in rows]
            pad = [[None] * (len(ids) - len(row)) for ids, row in zip(self["input_ids"], lists, strict=True)]
            return [row + fill if side == "right" else fill + row for row, fill in zip(lists, pad, strict=True)]

        self._words, self._sequences = column("words"), column("sequences")
        self._spans = column("offset_mapping")

    def _recorded(self, rows: Sequence[Sequence[Any]] | None, at: int) -> list[Any]:
        if rows is None:
            raise TokenizerError("no record of words and characters was kept; call with return_offsets_mapping=True")
        return list(rows[at])


@dataclass
class Tokens:
    """The tokens of one text; spans and words only where they are asked for."""

    ids: list[int]
    spans: list[Span] | None = None
    words: list[int | None] | None = None


@dataclass
class Row:
    """One row of a batch: its sequences cut to size, with the tokens that the tokenizer adds."""

    sequences: list[Tokens]
    parts: list[range]
    prefix: list[int]

    def entry(self, name: str) -> list[Any]:
        """One of the lists that a call may return, or "words" or "sequences"; all are of equal length."""
        out: list[Any] = []
        for at, (tokens, part) in enumerate(zip(self.sequences, self.parts, strict=True)):
            extra, cut, size = len(self.prefix), slice(part.start, part.stop), len(part)
            if name == "input_ids":
                out += self.prefix + tokens.ids[cut]
            elif name == "offset_mapping":
                out += [(0, 0)] * extra + (tokens.spans or [])[cut]
            elif name == "words":
                out += [None] * extra + (tokens.words or [])[cut]
            else:
                first, rest = {
                    "attention_mask": (1, 1),
                    "token_type_ids": (at, at),
                    "special_tokens_mask": (1, 0),
                    "sequences": (None, at),
                }[name]
                out += [first] * extra + [rest] * size
        return out


def to_arrays(encoding: dict[str, Any], framework: str | None) -> None:
    """Turn every list into an array of the framework, in place; only that framework is imported.

    Raises:
        TokenizerError: the framework is not known, or rows differ in length.
        ImportError: the framework is not installed.
    """
    if framework is None:
        return
    choose("return_tensors", framework, FRAMEWORKS)
    make = _maker(framework)
    for name, value in encoding.items():
        encoding[name] = make(_rectangle(name, value))


def _rectangle(name: str, value: Any) -> Any:
    import numpy as np

    try:
        array = np.asarray(value)
    except ValueError:
        raise TokenizerError(
            f"return_tensors: the rows of {name!r} differ in length; use padding=True, and truncation=True if needed"
        ) from None
    return array.astype(np.int64) if array.dtype.kind in "iub" or not array.size else array


def _maker(framework: str) -> Any:
    """What makes the framework's array; whole numbers are int64 in NumPy and PyTorch, int32 in TensorFlow and JAX."""
    if framework == "pt":
        import torch

        return torch.from_numpy
    if framework == "tf":
        import tensorflow as tf

        return lambda array: tf.constant(_narrow(array))
    if framework == "jax":
        import jax.numpy as jnp

        return lambda array: jnp.asarray(_narrow(array))
    return lambda array: array


def _narrow(array: Any) -> Any:
    return array.astype("int32" if array.dtype.kind == "i" else "float32")


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
