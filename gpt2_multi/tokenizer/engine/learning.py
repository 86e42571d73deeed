"""Merges that are learned from texts, by the compiled engine of the library `tokenizers`."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gpt2_multi.errors import TokenizerError, described
from gpt2_multi.files.progress import busy, watched
from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.engine.texts import parts, read
from gpt2_multi.tokenizer.engine.words import repair

Learned = tuple[dict[str, int], list[tuple[str, str]]]


def learn(
    texts: Any, vocab_size: int, first: Sequence[str], prefix_space: bool, length: int | None, **options: Any
) -> Learned:
    """A vocabulary and its merges: the tokens of `first`, the 256 bytes, and what is merged of them most often.

    texts: an iterable of texts, of lists of texts, or of paths of files. length: how many there are, for the progress
    bar. `options` are those of the trainer of `tokenizers`, such as min_frequency.

    Raises:
        ImportError: `tokenizers` is not installed.
        TokenizerError: the size leaves no room for the bytes, or something is not a text.
    """
    check_room(vocab_size, len(first))
    with ExitStack() as stack:
        found = _trained(_fed(texts, prefix_space, length, stack), vocab_size, first, options)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in found["merges"]]
    return dict(sorted(found["vocab"].items(), key=lambda item: item[1])), merges


def check_room(vocab_size: Any, tokens: int) -> None:
    """Refuse a size without room for the bytes and so many control tokens."""
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 256 + tokens:
        raise TokenizerError(
            f"vocab_size: expected at least {256 + tokens}, for the bytes and the control tokens, found {vocab_size!r}"
        )


def _trained(texts: Iterator[str], size: int, first: Sequence[str], options: dict[str, Any]) -> Any:
    try:
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError('learning a vocabulary needs tokenizers: pip install "gpt2-multi[train]"') from error
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    given = {"initial_alphabet": list(byte_characters()), "show_progress": False, **options}
    tokens = [AddedToken(token, special=True) for token in first]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, **given))
    return json.loads(bpe.to_str())["model"]


def _fed(texts: Any, prefix_space: bool, length: int | None, stack: ExitStack) -> Iterator[str]:
    """Parts of texts, with a bar while they are read, and a sign of the work that follows."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TokenizerError(f"texts: expected several, found {described(texts)}; put it in a list")
    for item in watched(texts, "Reading texts", length):
        yield from _parts(item, prefix_space)
    stack.enter_context(busy("Learning the merges"))


def _parts(item: Any, prefix_space: bool) -> Iterator[str]:
    if isinstance(item, os.PathLike):
        yield from _parts_of_file(Path(item), prefix_space)
    elif isinstance(item, str):
        text = repair(item)
        yield " " + text if prefix_space and text[:1] != " " else text
    elif isinstance(item, Iterable):
        for text in item:
            yield from _parts(text, prefix_space)
    else:
        raise TokenizerError(f"texts: expected texts, lists of them or paths of files, found {described(item)}")


def _parts_of_file(path: Path, prefix_space: bool) -> Iterator[str]:
    """The text of a file in parts that are cut where a word begins in any case."""
    for number, part in enumerate(parts(read(path, str(path)), str(path))):
        yield " " + part if prefix_space and not number and part[:1] != " " else part
