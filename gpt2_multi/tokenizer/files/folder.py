"""The files of a tokenizer: vocab.json with merges.txt, encoder.json with vocab.bpe, or tokenizer.json."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2_multi.errors import LFS, TokenizerError, remedy
from gpt2_multi.files.hub import CHAT, CHATS, RENAMED
from gpt2_multi.files.json_files import write_whole
from gpt2_multi.tokenizer.files.tokenizer_json import read_tokenizer_json, to_tokenizer_json
from gpt2_multi.tokenizer.files.vocabulary import (
    ROLES,
    AddedToken,
    Vocabulary,
    added_token,
    check_merges,
    check_vocab,
    read_json,
)

IDS = ("bos_token_id", "eos_token_id")  # of the roles, which tokenizer.json has


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
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


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read merges.txt (or vocab.bpe): a line per merge, two tokens with a space between, the most frequent first.

    The first line may say the version. Editors may have changed white space: no token of bytes has any.

    Raises:
        TokenizerError: the file is missing, or a line is not two tokens.
    """
    text = _read_text(path)
    if text.startswith(LFS.decode()):  # which has two words a line, as merges have
        raise TokenizerError(f"{path}: expected merges; {remedy(path)}")
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    first = 1 if lines and lines[0].startswith("#version") else 0
    return check_merges(lines[first:], path)


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
    named = {path.stem: _read_text(path) for path in sorted(folder.glob(CHATS))}
    if (path := folder / CHAT).exists():
        found.settings["chat_template"] = {"default": _read_text(path), **named} if named else _read_text(path)
    elif named:
        found.settings["chat_template"] = named
    return found


def _read_core(folder: Path) -> Vocabulary:
    if (path := folder / "tokenizer.json").exists():
        return read_tokenizer_json(path)
    for vocab, merges in (tuple(RENAMED), tuple(RENAMED.values())):
        if (folder / vocab).exists() or (folder / merges).exists():
            found = Vocabulary(read_vocab(folder / vocab), read_merges(folder / merges))
            _check_merged(found, folder / merges)
            return found
    raise TokenizerError(
        f"{folder}: expected tokenizer.json, or vocab.json with merges.txt, or encoder.json with vocab.bpe, "
        "found none of them; name the folder of a GPT-2 tokenizer, or load one of another kind with transformers' "
        "AutoTokenizer, which generate, score and pipeline take too"
    )


def _check_merged(found: Vocabulary, path: Path) -> None:
    """Without merges no token of several bytes would ever be found; a few may be control tokens."""
    longer = sum(len(token) > 1 for token in found.vocab)
    if not found.merges and longer > 256:
        raise TokenizerError(f"{path}: has no merges, although {longer} tokens are longer than a byte; fetch it again")


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
        return dict(added_token({**fields, "id": int(at)}, path) for at, fields in decoder.items())
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: expected added_tokens_decoder to map ids to tokens, found otherwise") from error


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
    """Write every file of a tokenizer; all of them say the same, so that it does not matter which one is read.

    What only tokenizer.json can say is there alone, under the class of transformers that reads all of it.
    """
    settings, added, alone = tokenizer.settings, tokenizer.added, not tokenizer.parts.are_gpt2
    unsaid = [name for name in ("add_eos_token", *(["add_bos_token"] if alone else [])) if not settings[name]]
    config = {name: value for name, value in settings.items() if name not in (*IDS, *unsaid)}
    if alone:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    decoder = {str(at): token.to_json() for token, at in sorted(added.items(), key=lambda item: item[1])}
    outside = {token.content: at for token, at in added.items() if token.content not in tokenizer.vocab}
    names = (*ROLES, "additional_special_tokens")
    files: dict[str, Any] = {
        "tokenizer_config.json": config | {"added_tokens_decoder": decoder},
        "special_tokens_map.json": {name: settings[name] for name in names if settings.get(name)},
        "added_tokens.json": outside,
    }
    whole = to_tokenizer_json(tokenizer.vocab, tokenizer.merges, added, settings, tokenizer.parts)
    paths = [_write(folder / "tokenizer.json", whole)]
    if alone:
        for name in (*RENAMED, *RENAMED.values()):
            (folder / name).unlink(missing_ok=True)  # older ones would say something else
    else:
        paths = [*write_vocabulary(folder, tokenizer.vocab, tokenizer.merges), *paths]
    for name, content in files.items():
        if content:
            paths.append(_write(folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n"))
        else:
            (folder / name).unlink(missing_ok=True)  # an older one would add tokens that are gone
    for path in (folder / CHAT, *folder.glob(CHATS)):  # which would win over tokenizer_config.json
        path.unlink(missing_ok=True)
    return tuple(paths)


def _write(path: Path, text: str) -> str:
    """Write a file whole, in a folder that is made where it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be written ({error.strerror}); name a folder that can be") from error
    return str(path)
