"""The files of a tokenizer: vocab.json with merges.txt, encoder.json with vocab.bpe, or tokenizer.json."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.files import json_files
from gpt2_multi.files.hub import RENAMED
from gpt2_multi.files.json_files import write_whole

# What a control token may be for, as files and transformers name it, in the order of `all_special_tokens`.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that stands outside the merges. A special one is a control token; lstrip and rstrip eat white space.

    Those that are not `normalized` are found in a text first; by default, the control tokens.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None

    @property
    def is_normalized(self) -> bool:
        """What `normalized` is, by default too."""
        return not self.special if self.normalized is None else self.normalized

    def to_json(self) -> dict[str, Any]:
        """The fields as transformers writes them."""
        return {
            "content": self.content,
            "single_word": False,
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which with a large vocabulary is large.

    Raises:
        TokenizerError: the file is missing, cannot be read, or is not such JSON.
    """
    return json_files.read_json(path, damaged=TokenizerError, missing=TokenizerError, largest=1 << 28)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise TokenizerError(f"{path}: there is no such file; name the tokenizer's own files or folder") from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror}); name a readable file") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path}: expected UTF-8, found byte {error.start} to be otherwise; fetch it again"
        ) from error


def read_vocab(path: Path) -> dict[str, int]:
    """Read vocab.json (or encoder.json): one object, token -> id.

    Raises:
        TokenizerError: the file is missing or is not such an object.
    """
    return check_vocab(read_json(path), path)


def check_vocab(vocab: Any, path: Path | str) -> dict[str, int]:
    """`vocab` itself, if it maps tokens to distinct ids."""
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{path}: expected an object that maps tokens to ids, found {_describe(vocab)}")
    for token, at in vocab.items():
        if type(at) is not int or at < 0:
            raise TokenizerError(f"{path}: expected a whole number as the id of {token!r}, found {at!r}")
    if len(set(vocab.values())) < len(vocab):
        raise TokenizerError(f"{path}: expected each id once, found {len(vocab) - len(set(vocab.values()))} repeated")
    return vocab


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read merges.txt (or vocab.bpe): a line per merge, two tokens with a space between, the most frequent first.

    Raises:
        TokenizerError: the file is missing, or a line is not two tokens.
    """
    lines = _read_text(path).replace("\r\n", "\n").split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    return check_merges([line for line in lines[first:] if line], path)


def check_merges(merges: Any, path: Path | str) -> list[tuple[str, str]]:
    """`merges` as pairs of tokens; each may be a pair, or a text with a space between."""
    if not isinstance(merges, list):
        raise TokenizerError(f"{path}: expected a list of merges, found {_describe(merges)}")
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


def read_folder(folder: Path) -> Vocabulary:
    """Read the tokenizer in a folder.

    The order: tokenizer.json; vocab.json with merges.txt; encoder.json with vocab.bpe. The first that is there is
    taken. Settings in tokenizer_config.json win over those in special_tokens_map.json, and these over those in
    tokenizer.json. Added tokens come from tokenizer_config.json, tokenizer.json and added_tokens.json, in this order.

    Raises:
        TokenizerError: there is none of these, or one is damaged, or asks for something that GPT-2 does not do.
    """
    found = _read_core(folder)
    if (path := folder / "added_tokens.json").exists():
        known = {token.content for token in found.added}  # of these more is known than this file says
        added = check_vocab(read_json(path), path).items()
        found.added |= {AddedToken(token): at for token, at in added if token not in known}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := folder / name).exists():
            settings = read_json(path)
            _merge_added(found, _decoder_tokens(settings.pop("added_tokens_decoder", {}), path))
            found.settings |= {key: _plain(value) for key, value in settings.items()}
    if (path := folder / "chat_template.jinja").exists():
        found.settings["chat_template"] = _read_text(path)
    return found


def _read_core(folder: Path) -> Vocabulary:
    if (path := folder / "tokenizer.json").exists():
        return read_tokenizer_json(path)
    for vocab, merges in (tuple(RENAMED), tuple(RENAMED.values())):
        if (folder / vocab).exists() or (folder / merges).exists():
            return Vocabulary(read_vocab(folder / vocab), read_merges(folder / merges))
    raise TokenizerError(
        f"{folder}: expected tokenizer.json, or vocab.json with merges.txt, or encoder.json with vocab.bpe, "
        "found none of them; name the folder of a GPT-2 tokenizer"
    )


def _merge_added(found: Vocabulary, added: Mapping[AddedToken, int]) -> None:
    """Add tokens; one of the same text replaces what was known of it."""
    texts = {token.content for token in added}
    found.added = {token: at for token, at in found.added.items() if token.content not in texts} | dict(added)


def _plain(value: Any) -> Any:
    """A token that is written as an object, as its text; also within lists."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _decoder_tokens(decoder: Any, path: Path) -> dict[AddedToken, int]:
    try:
        return dict(_added_token({**fields, "id": int(at)}, path) for at, fields in decoder.items())
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: expected added_tokens_decoder to map ids to tokens, found otherwise") from error


def _added_token(fields: Mapping[str, Any], path: Path) -> tuple[AddedToken, int]:
    content, at = fields.get("content"), fields.get("id")
    if not isinstance(content, str) or type(at) is not int or not content:
        raise TokenizerError(f"{path}: expected an added token with content and id, found {_describe(dict(fields))}")
    if fields.get("single_word"):
        raise TokenizerError(
            f"{path}: the added token {content!r} has single_word set, which is not supported; unset it"
        )
    flags = {name: bool(fields.get(name)) for name in ("special", "lstrip", "rstrip")}
    return AddedToken(content, **flags, normalized=fields.get("normalized")), at


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Read tokenizer.json, if what it describes is GPT-2's tokenization: anything else would give other ids.

    Raises:
        TokenizerError: the file is damaged, or describes another kind of tokenizer.
    """
    data = read_json(path)
    try:
        _check_kind(data, path)
        model, added = data["model"], data.get("added_tokens") or []
        merges = check_merges(model["merges"], path)
        tokens = dict(_added_token(fields, path) for fields in added)
        return Vocabulary(check_vocab(model["vocab"], path), merges, tokens, _json_settings(data, path))
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path}: expected a tokenizer.json of a GPT-2 tokenizer, found no {error}") from error


def _check_kind(data: Any, path: Path) -> None:
    model, split = data["model"], data.get("pre_tokenizer") or {}
    facts = {
        "model.type": (model.get("type", "BPE"), "BPE"),
        "normalizer": (data.get("normalizer"), None),
        "pre_tokenizer.type": (split.get("type"), "ByteLevel"),
        "pre_tokenizer.use_regex": (split.get("use_regex", True), True),
        **{f"model.{name}": (model.get(name) or None, None) for name in ("dropout", "byte_fallback", "ignore_merges")},
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or None, None),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix") or None, None),
    }
    for name, (value, wanted) in facts.items():
        if value != wanted:
            raise TokenizerError(
                f"{path}: expected {name} to be {wanted!r}, found {str(value)[:60]!r}; not GPT-2's kind"
            )


def _json_settings(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings that tokenizer.json holds: the space before a text, and a token before each sequence."""
    settings: dict[str, Any] = {"add_prefix_space": bool(data["pre_tokenizer"].get("add_prefix_space"))}
    post = data.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing":
            names = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
            if names and (len(names) > 1 or "SpecialToken" not in step["single"][0]):
                raise TokenizerError(f"{path}: expected at most a token before each text, found the template {names}")
            settings |= {"add_bos_token": True, "bos_token": names[0]} if names else {"add_bos_token": False}
    return settings


def to_tokenizer_json(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    added: Mapping[AddedToken, int],
    settings: Mapping[str, Any],
) -> str:
    """What tokenizer.json says of this tokenizer; reads `add_prefix_space`, `add_bos_token`, `bos_token` and its id."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": settings["add_prefix_space"],
        "trim_offsets": False,
        "use_regex": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocab),
        "merges": [list(pair) for pair in merges],
    }
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": at, **token.to_json()} for token, at in sorted(added.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": _template(settings) if settings["add_bos_token"] else level,
        "decoder": level,
        "model": model,
    }
    return json.dumps(data, ensure_ascii=False)


def _template(settings: Mapping[str, Any]) -> dict[str, Any]:
    bos = settings["bos_token"]
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": k}}, {"Sequence": {"id": "AB"[k], "type_id": k}}] for k in (0, 1)
    )
    tokens = {bos: {"id": bos, "ids": [settings["bos_token_id"]], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": tokens}


def write_vocabulary(
    folder: Path, vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], prefix: str = ""
) -> tuple[str, str]:
    """Write vocab.json and merges.txt; returns their paths.

    Raises:
        TokenizerError: the folder cannot be written to.
    """
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    return (
        _write(folder / f"{prefix}vocab.json", json.dumps(dict(vocab), ensure_ascii=False)),
        _write(folder / f"{prefix}merges.txt", "#version: 0.2\n" + lines),
    )


def write_folder(folder: Path, tokenizer: Vocabulary) -> tuple[str, ...]:
    """Write every file of a tokenizer; all of them say the same, so that it does not matter which one is read."""
    settings, added = tokenizer.settings, tokenizer.added
    decoder = {str(at): token.to_json() for token, at in sorted(added.items(), key=lambda item: item[1])}
    outside = {token.content: at for token, at in added.items() if token.content not in tokenizer.vocab}
    names = (*ROLES, "additional_special_tokens")
    files: dict[str, Any] = {
        "tokenizer_config.json": {name: value for name, value in settings.items() if name != "bos_token_id"}
        | {"added_tokens_decoder": decoder},
        "special_tokens_map.json": {name: settings[name] for name in names if settings.get(name)},
        "added_tokens.json": outside,
    }
    whole = to_tokenizer_json(tokenizer.vocab, tokenizer.merges, added, settings)
    paths = [*write_vocabulary(folder, tokenizer.vocab, tokenizer.merges), _write(folder / "tokenizer.json", whole)]
    for name, content in files.items():
        if content:
            paths.append(_write(folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n"))
        else:
            (folder / name).unlink(missing_ok=True)  # an older one would add tokens that are gone
    return tuple(paths)


def _write(path: Path, text: str) -> str:
    """Write a file whole, in a folder that is made where it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be written ({error.strerror}); name a folder that can be") from error
    return str(path)
