"""Texts in, texts out: what `generate`, `stream` and `score` of every backend do with strings.

The model sees ids in NumPy, padded on the left under a mask; nobody has to care for a pad token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.stopping import stop_table, until_end
from gpt2_multi.generation.stopping.spelling import Speller, ids_of, text_of
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]


def are_texts(given: Any) -> bool:
    """Whether an input is a text or a list of texts, and not ids, or nothing."""
    return isinstance(given, str) or (isinstance(given, (list, tuple)) and all(isinstance(text, str) for text in given))


def encode(text: str, tokenizer: GPT2Tokenizer, model: GPT2Config, **options: Any) -> list[int]:
    """The ids of a prompt by a call with `options`; an empty one is begun by the model's `bos_token_id`."""
    inputs.check_text("text", text)
    inputs.check_tokenizer(tokenizer)
    if ids := ids_of(tokenizer, text, **options):
        return ids
    inputs.check_start(model.bos_token_id, model.vocab_size)
    return [cast(int, model.bos_token_id)]


def pad(rows: Sequence[Sequence[int] | Array], side: str = "left") -> tuple[Array, Array]:
    """Rows as ids and mask, (B, T) int64; what the mask hides is 0."""
    ids, mask = np.zeros((2, len(rows), max(map(len, rows), default=0)), np.int64)
    width = ids.shape[1]
    for row, given in enumerate(rows):
        place = slice(width - len(given), None) if side == "left" else slice(len(given))
        ids[row, place], mask[row, place] = given, 1
    return ids, mask


def trim(
    rows: Sequence[Sequence[int]], tokenizer: GPT2Tokenizer, config: GenerationConfig, model: GPT2Config
) -> list[list[int]]:
    """New tokens up to the end of each row, without what it is filled with."""
    table = stop_table(config.stops, tokenizer, model.vocab_size)
    return [list(until_end(row, table, config.eos_token_ids)) for row in rows]


def grouped(texts: list[Any], alone: bool, several: int) -> Any:
    """One for each prompt, or a list of `several`; for a prompt alone that, otherwise a list of them."""
    each = [texts[i : i + several] for i in range(0, len(texts), several)] if several > 1 else texts
    return each[0] if alone else each


def decode(
    tokenizer: GPT2Tokenizer, ids: Iterable[int], config: GenerationConfig, before: Iterable[int] = ()
) -> Iterator[str]:
    """The text of each id up to an end token; a character that several ids share waits for its last byte.

    An id that the tokenizer does not know, as of a vocabulary that was filled up, has no text. before: the ids that
    these follow.
    """
    speller = Speller(tokenizer)
    speller.follow(before)
    for token in ids:
        if token in config.eos_token_ids:
            break
        if piece := speller.put([token]):
            yield piece
    if rest := speller.end():
        yield rest


def spelled(
    tokenizer: GPT2Tokenizer, ids: Sequence[int], config: GenerationConfig, before: Sequence[int], **options: Any
) -> str:
    """The text of ids up to an end token, after those before; `options` are of a foreign tokenizer's `decode`."""
    return text_of(tokenizer, before, list(takewhile(lambda token: token not in config.eos_token_ids, ids)), **options)


def before_stops(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first stop string in it; what may begin one waits for what follows."""
    text = ""
    for piece in pieces:
        text += piece
        if found := [at for at in map(text.find, stops) if at >= 0]:
            text = text[: min(found)]
            break
        begun = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        if ready := text[: len(text) - begun]:
            yield ready
            text = text[len(ready) :]
    if text:
        yield text
