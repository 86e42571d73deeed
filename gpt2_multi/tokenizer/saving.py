"""Writing the files of a tokenizer, as transformers and tokenizers read them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.files.folders import write_whole
from gpt2_multi.tokenizer.files import AddedToken, Vocabulary


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
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
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
