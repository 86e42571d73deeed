"""What the files of a tokenizer say, checked: tokens, ids, merges, added tokens and settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.files import json_files
from gpt2_multi.tokenizer.files.parts import GPT2_PARTS, Parts

# What a control token may be for, as files and transformers name it, in the order of `all_special_tokens`.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands outside the merges. A special one is a control token; lstrip and rstrip eat white space.

    Those that are not `normalized` are found in a text first; by default, the control tokens. A `single_word` is found
    where no letter, digit or underscore stands beside it.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    single_word: bool = False

    @property
    def is_normalized(self) -> bool:
        """What `normalized` is, by default too."""
        return not self.special if self.normalized is None else self.normalized

    def to_json(self) -> dict[str, Any]:
        """The fields as transformers writes them."""
        return {
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.is_normalized,
            "special": self.special,
        }


@dataclass
class Vocabulary:
    """What the files of a tokenizer say: `added` maps added tokens to ids, `settings` holds the constructor's names."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[AddedToken, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    parts: Parts = GPT2_PARTS


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which with a large vocabulary is large.

    Raises:
        TokenizerError: the file is missing, cannot be read, or is not such JSON.
    """
    return json_files.read_json(path, damaged=TokenizerError, missing=TokenizerError, largest=1 << 28)


def check_vocab(vocab: Any, path: Path | str) -> dict[str, int]:
    """`vocab` itself, if it maps tokens to distinct ids."""
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{path}: expected an object that maps tokens to ids, found {_shown(vocab)}")
    for token, at in vocab.items():
        if type(at) is not int or at < 0:
            raise TokenizerError(f"{path}: expected a whole number as the id of {token!r}, found {at!r}")
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(f"{path}: expected each id once, found {len(vocab) - len(set(vocab.values()))} repeated")
    return vocab


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def check_merges(merges: Any, path: Path | str) -> list[tuple[str, str]]:
    """`merges` as pairs of tokens; each may be a pair, or a text with a space between."""
    if not isinstance(merges, list):
        raise TokenizerError(f"{path}: expected a list of merges, found {_shown(merges)}")
    pairs = [tuple(merge if isinstance(merge, list | tuple) else str(merge).split(" ")) for merge in merges]
    if not (set(map(len, pairs)) <= {2} and all(map(_are_tokens, pairs))):
        at = next(at for at, pair in enumerate(pairs) if len(pair) != 2 or not _are_tokens(pair))
        raise TokenizerError(
            f"{path}, merge {at}: expected two tokens with a space between, found {str(merges[at])[:60]!r}; "
            "fetch the file again"
        )
    return pairs


def _are_tokens(pair: tuple[Any, ...]) -> bool:
    return type(pair[0]) is type(pair[1]) is str and "" not in pair


def added_token(fields: Mapping[str, Any], path: Path) -> tuple[AddedToken, int]:
    """An added token and its id, from an entry of a file. Raises TokenizerError where it has no text or no id."""
    content, at = fields.get("content"), fields.get("id")
    if not isinstance(content, str) or type(at) is not int or not content:
        raise TokenizerError(f"{path}: expected an added token with content and id, found {_shown(dict(fields))}")
    flags = {name: bool(fields.get(name)) for name in ("special", "lstrip", "rstrip", "single_word")}
    return AddedToken(content, **flags, normalized=fields.get("normalized")), at
