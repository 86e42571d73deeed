"""What a call of the tokenizer returns: rows of lists, or the arrays of a framework."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.encoding.batching import FILLERS, choose, pad_rows
from gpt2_multi.tokenizer.files import Piece

Span = tuple[int, int]
FRAMEWORKS = {"np": "numpy", "pt": "torch", "tf": "tensorflow", "jax": "jax"}


class CharSpan(NamedTuple):
    """The characters of a text from `start` up to `end`."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """The tokens of a row from `start` up to `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Encoding:
    """One row of a batch, token by token, under the names of the library `tokenizers`.

    What is not there is None: a token that was added or fills up has no word and no text; a character that was cut off
    has no token.
    """

    ids: list[int]
    type_ids: list[int]
    tokens: list[str]
    offsets: list[Span]
    attention_mask: list[int]
    special_tokens_mask: list[int]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    n_sequences: int

    def __len__(self) -> int:
        return len(self.ids)

    def token_to_sequence(self, token_index: int) -> int | None:
        """The text of a token: 0, or 1 for the pair."""
        return self.sequence_ids[token_index] if token_index < len(self) else None

    def token_to_word(self, token_index: int) -> int | None:
        """The number of a token's word in its text."""
        return self.word_ids[token_index] if token_index < len(self) else None

    def token_to_chars(self, token_index: int) -> CharSpan | None:
        """The characters of a token in its text."""
        return None if self.token_to_sequence(token_index) is None else CharSpan(*self.offsets[token_index])

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The first token with a character of a text."""
        rows = enumerate(zip(self.offsets, self.sequence_ids, strict=True))
        return next((at for at, ((a, b), own) in rows if own == sequence_index and a <= char_pos < b), None)

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The number of the word with a character of a text."""
        token = self.char_to_token(char_pos, sequence_index)
        return None if token is None else self.token_to_word(token)

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> TokenSpan | None:
        """The tokens of a word of a text."""
        rows = enumerate(zip(self.word_ids, self.sequence_ids, strict=True))
        found = [at for at, row in rows if row == (word_index, sequence_index)]
        return TokenSpan(found[0], found[-1] + 1) if found else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> CharSpan | None:
        """The characters of a word of a text."""
        tokens = self.word_to_tokens(word_index, sequence_index)
        return tokens and CharSpan(self.offsets[tokens.start][0], self.offsets[tokens.end - 1][1])

    def marks(self, spans: Iterable[Span]) -> list[int]:
        """1 for each token with a character of these spans of the first text, 0 for the others."""
        found = [0] * len(self)
        for start, end in spans:
            first, last = self.char_to_token(start), self.char_to_token(end - 1)
            if end > start and first is not None:
                stop = len(self) if last is None else last + 1
                found[first:stop] = [1] * (stop - first)
        return found


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict whose entries are attributes too.

    `encodings` say of each row where its tokens came from, and so do `tokens`, `word_ids`, `char_to_token` and the
    others: they are made when they are asked for, by reading the texts again. Pickled are those of a call that returns
    offsets or is given words. A number as a key is an encoding, and a slice some of them, or, where they are not known,
    those rows of every entry.

    Args:
        data: the entries.
        encoding: an Encoding, or one for each row.
        tensor_type: "np", "pt", "tf" or "jax", what the entries are made; without it they stay as they are.
        prepend_batch_axis: make rows of one of them.
        n_sequences: 1, or 2 for pairs.
    """

    def __init__(
        self,
        data: Any = (),
        encoding: Any = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ) -> None:
        super().__init__(data or {})
        self._encodings: list[Any] | None = encoding if isinstance(encoding, list | None) else [encoding]
        self._trace: Callable[[], list[Any]] | None = None  # what makes them
        self._n_sequences, self._portable = n_sequences, True
        to_arrays(self, tensor_type, prepend_batch_axis)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) and not self.is_fast:
            return {name: value[key] for name, value in self.items()}
        return self._known()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"{name!r} is not among the entries {list(self)}") from None

    def __getstate__(self) -> dict[str, Any]:
        """The tokenizer and the texts stay behind; what they say of the tokens goes with it where it was asked for."""
        known = self.encodings if self._portable else self._encodings
        return {**self.__dict__, "_encodings": known, "_trace": None}

    def copy(self) -> "BatchEncoding":
        """The same entries in another one."""
        new = BatchEncoding(self)
        new.__dict__.update(self.__dict__)
        return new

    __copy__ = copy

    @property
    def data(self) -> dict[str, Any]:
        """The entries as a plain dict."""
        return dict(self)

    @property
    def encodings(self) -> list[Any] | None:
        """An Encoding for each row, or None where they are not known."""
        if self._encodings is None and self._trace is not None:
            self._encodings = self._trace()
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether it is known where tokens came from."""
        return self._encodings is not None or self._trace is not None

    @property
    def n_sequences(self) -> int | None:
        """How many texts each row has: 1, or 2 for pairs; None where it is not known."""
        return self._n_sequences

    def trace(self, make: Callable[[], list[Any]], n_sequences: int, portable: bool) -> None:
        """Say how the encodings are made when somebody asks, and whether they are pickled with the entries."""
        self._trace, self._n_sequences, self._portable = make, n_sequences, portable

    def _row(self, at: int) -> Encoding:
        found: Encoding = self._known()[at]
        return found

    def _known(self) -> list[Any]:
        if self.encodings is None:
            raise TokenizerError(
                "no record of words and characters is in a copy of an encoding; ask the one that the tokenizer gave, "
                "or call the tokenizer with return_offsets_mapping=True"
            )
        return self.encodings

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as the vocabulary spells them."""
        return list(self._row(batch_index).tokens)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the number of its word; None for tokens that were added."""
        return list(self._row(batch_index).word_ids)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 (the text) or 1 (its pair); None for tokens that were added."""
        return list(self._row(batch_index).sequence_ids)

    # In each of these the first number is that of a row where another follows it; else it is about the first row.

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The text of a token: 0, or 1 for the pair; None for one that was added."""
        row, at = _placed(batch_or_token_index, token_index)
        return self._row(row).token_to_sequence(at)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The number of a token's word; None for one that was added."""
        row, at = _placed(batch_or_token_index, token_index)
        return self._row(row).token_to_word(at)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters of a token, from and to; None for one that was added."""
        row, at = _placed(batch_or_token_index, token_index)
        return self._row(row).token_to_chars(at)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token with a character of a text, or None where there is none."""
        row, at = _placed(batch_or_char_index, char_index)
        return self._row(row).char_to_token(at, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The number of the word with a character of a text, or None where there is none."""
        row, at = _placed(batch_or_char_index, char_index)
        return self._row(row).char_to_word(at, sequence_index)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word, from and to; None where there are none."""
        row, at = _placed(batch_or_word_index, word_index)
        return self._row(row).word_to_tokens(at, sequence_index)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word, from and to; None where there are none."""
        row, at = _placed(batch_or_word_index, word_index)
        return self._row(row).word_to_chars(at, sequence_index)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """Make the entries arrays of a framework, in place; those that are some already stay.

        Raises:
            TokenizerError: the framework is not known, or rows differ in length.
            ImportError: the framework is not installed.
        """
        to_arrays(self, tensor_type, prepend_batch_axis)
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
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
                self[name] = value if keep else value.to(device, non_blocking=non_blocking)
            else:
                raise TokenizerError(f'{name!r} is a {type(value).__name__}; .to() needs return_tensors="pt" or "jax"')
        return self


def _placed(first: int, second: int | None) -> tuple[int, int]:
    return (0, first) if second is None else (first, second)


@dataclass
class Tokens:
    """The tokens of one text; spans and words only where they are asked for."""

    ids: list[int]
    spans: list[Span] | None = None
    words: list[int | None] | None = None


# What the lists of a row say of a token that the tokenizer adds, and of one of a text.
ADDED: dict[str, Any] = {
    "offset_mapping": (0, 0), "words": None, "attention_mask": 1, "special_tokens_mask": 1, "sequences": None,
}  # fmt: skip
OWN = {"attention_mask": 1, "special_tokens_mask": 0}
LISTS = {"input_ids": "ids", "offset_mapping": "spans", "words": "words"}  # of `Tokens`


@dataclass
class Row:
    """One row of a batch: its sequences cut to size, among the tokens that the tokenizer adds."""

    sequences: list[Tokens]
    parts: list[range]
    pieces: tuple[Piece, ...]

    def entry(self, name: str) -> list[Any]:
        """One of the lists that a call may return, or "words" or "sequences"; all are of equal length."""
        out: list[Any] = []
        for of, kind, added in self.pieces:
            if of is None:
                mark = kind if name == "token_type_ids" else ADDED.get(name)
                out += added if name == "input_ids" else [mark] * len(added)
            elif name in LISTS:
                out += (getattr(self.sequences[of], LISTS[name]) or [])[self.parts[of].start : self.parts[of].stop]
            else:
                mark = of if name == "sequences" else OWN.get(name, kind)
                out += [mark] * len(self.parts[of])
        return out


# The entries of a row, and what an Encoding calls them.
ENTRIES = {
    "input_ids": "ids", "token_type_ids": "type_ids", "offset_mapping": "offsets", "words": "word_ids",
    "attention_mask": "attention_mask", "special_tokens_mask": "special_tokens_mask", "sequences": "sequence_ids",
}  # fmt: skip


def encoding_of(row: Row, ids: list[int], side: str, spell: Callable[[list[int]], list[str]]) -> Encoding:
    """What is known of the tokens of a row, filled up as its `ids` are.

    Raises:
        TokenizerError: the ids are others.
    """
    columns = {name: [row.entry(name)] for name in ENTRIES}
    size = len(columns["input_ids"][0])
    if (ids[:size] if side == "right" else ids[len(ids) - size :]) != columns["input_ids"][0]:
        raise TokenizerError("tokens: the tokenizer has changed since it made this encoding; ask before it does")
    pad_rows(columns, len(ids), side, 0, {**FILLERS, "words": None, "sequences": None})
    fields: dict[str, Any] = {ENTRIES[name]: column for name, (column,) in columns.items()}
    return Encoding(tokens=spell(ids), n_sequences=len(row.sequences), **{**fields, "ids": ids})


def to_arrays(encoding: dict[str, Any], framework: str | None, prepend_batch_axis: bool = False) -> None:
    """Turn every list into an array of the framework, in place; only that framework is imported.

    Raises:
        TokenizerError: the framework is not known, or rows differ in length.
        ImportError: the framework is not installed.
    """
    if framework is None:
        return
    own, make = choose("return_tensors", framework, FRAMEWORKS), _maker(framework)
    for name, value in encoding.items():
        value = [value] if prepend_batch_axis else value
        if not type(value).__module__.startswith(own):
            encoding[name] = make(_rectangle(name, value))


def _rectangle(name: str, value: Any) -> Any:
    import numpy as np

    try:
        array = np.asarray(value)
    except ValueError:
        raise TokenizerError(
            f"return_tensors: the rows of {name!r} differ in length; use padding=True, and truncation=True if needed"
        ) from None
    if array.size and array.dtype.kind not in "iubf":
        raise TokenizerError(f"return_tensors: expected numbers in {name!r}, found others; take it out, or leave lists")
    return array if array.size and array.dtype.kind == "f" else array.astype(np.int64)


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
