"""What tokens spell: by their bytes, with a tokenizer of GPT-2's kind, or else by what a tokenizer decodes.

Of a tokenizer of another kind, such as one of WordPiece or SentencePiece, nothing is asked but to be called with a
text, and to decode ids. What a token of it spells depends on those before it, which are decoded with it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_multi.errors import InputError, TokenizerError, described

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

UNKNOWN = "\ufffd"  # what stands for the part of a character, where it is decoded alone
CONTEXT = 8  # tokens that are decoded with those that follow them
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how a byte is spelled that is a token of SentencePiece


def ids_of(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The ids of a text, as a call of any tokenizer gives them.

    Raises:
        InputError: the call gives something else.
    """
    found = tokenizer(text, **options)
    found = found["input_ids"] if isinstance(found, Mapping) else getattr(found, "input_ids", found)
    ids = np.asarray(found)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(
            f"tokenizer: expected a call that gives the input_ids of a text, whole numbers, found {described(found)}"
        )
    given: list[int] = ids.tolist()
    return given


def own(tokenizer: Any) -> GPT2Tokenizer | Foreign:
    """A tokenizer whose tokens' bytes are known: itself, a copy of one of transformers, or what decodes as it does."""
    return tokenizer if hasattr(tokenizer, "decode_bytes") else _copied(Key(tokenizer), size_of(tokenizer))


def size_of(tokenizer: Any) -> int | None:
    """How many tokens there are, where it is known: others may be added later."""
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None


class Key:
    """A tokenizer as a key of what is known of it, even where it has no hash."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.tokenizer is other.tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)


@lru_cache(maxsize=4)
def _copied(key: Key, _: int | None) -> GPT2Tokenizer | Foreign:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer  # which few calls need

    if not hasattr(key.tokenizer, "save_pretrained"):
        return Foreign(key.tokenizer)
    try:
        return GPT2Tokenizer.from_tokenizer(key.tokenizer)
    except TokenizerError:
        return Foreign(key.tokenizer)


class Foreign:
    """A tokenizer of another kind, by what it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def control_ids(self) -> list[int]:
        """The ids of its control tokens, where it tells them."""
        return list(getattr(self.tokenizer, "all_special_ids", ()))

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """The text of ids."""
        text: str = self.tokenizer.decode(list(ids), **options)
        return text

    def after(self, before: Sequence[int], ids: Sequence[int], **options: Any) -> str:
        """What ids add to the text of those before them."""
        return self.decode([*before, *ids], **options)[len(self.decode(before, **options)) if before else 0 :]

    @cached_property
    def anchor(self) -> tuple[list[int], str]:
        """A token that others may follow, as in the middle of a text, and its text."""
        ids = [[at] for at in ids_of(self.tokenizer, "a")]  # of which some may be control tokens
        texts = [(self.decode(row), row) for row in ids]
        text, row = min(texts, key=lambda pair: ("a" not in pair[0], len(pair[0])), default=("", []))
        return row, text

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that an id adds to a text; none for one that the tokenizer does not know."""
        (before, text), spell = self.anchor, getattr(self.tokenizer, "convert_ids_to_tokens", None)
        try:
            token = spell(list(ids))[0] if spell else None
            found = BYTE.fullmatch(token) if isinstance(token, str) else None
            return bytes.fromhex(found[1]) if found else self.decode([*before, *ids])[len(text) :].encode()
        except Exception:  # of whatever class this tokenizer has for an id that it does not know
            return b""


def token_bytes(tokenizer: GPT2Tokenizer | Foreign, token: int) -> bytes:
    """The bytes of an id; none for one that the tokenizer does not know."""
    try:
        return own(tokenizer).decode_bytes([token])
    except TokenizerError:
        return b""


def text_of(tokenizer: Any, before: Sequence[int], ids: Sequence[int], **options: Any) -> str:
    """The text that ids add to the text of those before them; `options` are those of a foreign tokenizer's `decode`."""
    known = own(tokenizer)
    if isinstance(known, Foreign):
        return known.after(before, ids, **options)
    return b"".join(token_bytes(known, token) for token in ids).decode("utf-8", "replace")


class Speller:
    """The text of tokens that come one by one, in whole characters.

    skipped: ids that have no text. `options` are those of a foreign tokenizer's `decode`.
    """

    def __init__(self, tokenizer: Any, skipped: Iterable[int] = (), **options: Any) -> None:
        self.known = own(tokenizer)
        self.skipped, self.options = frozenset(skipped), options
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # the last ones of a foreign tokenizer, and what was given of their text
        self._given = ""

    def follow(self, ids: Iterable[int]) -> None:
        """Take ids that stand before those whose text is wanted."""
        if isinstance(self.known, Foreign):
            self._ids = [*self._ids, *ids][-CONTEXT:]
            self._given = self.known.decode(self._ids, **self.options) if self._ids else ""

    def put(self, ids: Iterable[int]) -> str:
        """Take ids, and give what is known of their text."""
        if isinstance(self.known, Foreign):
            return self._decoded(self.known, [*self._ids, *ids])
        return self._decoder.decode(b"".join(token_bytes(self.known, i) for i in ids if i not in self.skipped))

    def _decoded(self, known: Foreign, ids: list[int], is_end: bool = False) -> str:
        text = known.decode(ids, **self.options) if ids else ""
        self._ids = ids
        if text.endswith(UNKNOWN) and not is_end:
            return ""  # a part of a character, which waits for the rest
        piece = text[len(self._given) :]
        self._ids = ids[-CONTEXT:]
        self._given = known.decode(self._ids, **self.options) if len(ids) > CONTEXT else text
        return piece

    def end(self) -> str:
        """What is left of the text."""
        if isinstance(self.known, Foreign):
            return self._decoded(self.known, self._ids, is_end=True)
        return self._decoder.decode(b"", final=True)
