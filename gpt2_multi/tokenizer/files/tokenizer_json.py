"""tokenizer.json: read where it describes a tokenization of GPT-2's kind, and written."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.files.vocabulary import (
    AddedToken,
    Vocabulary,
    added_token,
    check_merges,
    check_vocab,
    read_json,
)


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
        tokens = dict(added_token(fields, path) for fields in added)
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
