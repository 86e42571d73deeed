"""tokenizer.json: read where it describes a tokenization of GPT-2's kind, and written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.files.around import flagged, template
from gpt2_multi.tokenizer.files.parts import GPT2_PARTS, Parts
from gpt2_multi.tokenizer.files.steps import ELSEWHERE, flat, joined
from gpt2_multi.tokenizer.files.vocabulary import (
    AddedToken,
    Vocabulary,
    added_token,
    check_merges,
    check_vocab,
    read_json,
)


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Read tokenizer.json, if what it describes is byte-level BPE with parts that are known here.

    Raises:
        TokenizerError: the file is damaged, or describes another kind of tokenizer.
    """
    data = read_json(path)
    try:
        _check_kind(data, path)
        model, added = data["model"], data.get("added_tokens") or []
        merges, vocab = check_merges(model["merges"], path), check_vocab(model["vocab"], path)
        tokens = dict(added_token(fields, path) for fields in added)
        parts, prefix = _parts(data, path)
        if all(char in vocab for char in byte_characters()):
            parts = replace(parts, unk_token=None)  # of which there is no need
        elif asked := [name for name in ("byte_fallback", "fuse_unk") if model.get(name)]:
            raise TokenizerError(
                f"{path}: expected a vocabulary of all 256 bytes, or no model.{asked[0]}, found neither; {ELSEWHERE}"
            )
        _check_added(parts, {*vocab.values(), *tokens.values()}, path)
        return Vocabulary(vocab, merges, tokens, {"add_prefix_space": prefix, **_settings(data, parts)}, parts)
    except TokenizerError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise TokenizerError(f"{path}: expected a tokenizer.json of a GPT-2 tokenizer, found no {error}") from error


def _check_kind(data: Any, path: Path) -> None:
    model = data["model"]
    decoders = {step["type"] for step in flat(data.get("decoder"), "decoders")} - {"Fuse"}
    facts = {
        "model.type": (model.get("type", "BPE"), "BPE"),
        "decoder.type": (", ".join(decoders) or "ByteLevel", "ByteLevel"),
        "model.dropout": (model.get("dropout") or None, None),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or None, None),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix") or None, None),
    }
    for name, (value, wanted) in facts.items():
        if value != wanted:
            raise TokenizerError(f"{path}: expected {name} to be {wanted!r}, found {str(value)[:60]!r}; {ELSEWHERE}")


def _parts(data: Any, path: Path) -> tuple[Parts, bool]:
    try:
        return Parts.of(data)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def _check_added(parts: Parts, known: set[int], path: Path) -> None:
    added = [at for piece in parts.around.row(2) for at in piece.ids]
    if unknown := [at for at in added if at not in known]:
        raise TokenizerError(
            f"{path}: expected the post_processor to add tokens of the vocabulary, found the id {unknown[0]}; "
            "take the file from one tokenizer"
        )


def _settings(data: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The settings that tokenizer.json holds: sides and a pad token, as transformers takes them, and the bos token."""
    settings: dict[str, Any] = {}
    if truncation := data.get("truncation"):
        settings["truncation_side"] = truncation["direction"].lower()
    if padding := data.get("padding"):
        settings |= {"padding_side": padding["direction"].lower(), "pad_token": padding["pad_token"]}
    steps = flat(data.get("post_processor"), "processors")
    names = [part["SpecialToken"]["id"] for step in steps for part in step.get("single", []) if "SpecialToken" in part]
    if len(names) == 1 and parts.around.row(1)[0].of is None:
        settings["bos_token"] = names[0]
    return settings


def to_tokenizer_json(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    added: Mapping[AddedToken, int],
    settings: Mapping[str, Any],
    parts: Parts = GPT2_PARTS,
) -> str:
    """What tokenizer.json says of this tokenizer; of `settings` it says the space before a text, and what is added."""
    own = parts.to_json(settings["add_prefix_space"])
    level = {
        "type": "ByteLevel",
        "add_prefix_space": settings["add_prefix_space"],
        "trim_offsets": False,
        "use_regex": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        **own["model"],
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
        "normalizer": own["normalizer"],
        "pre_tokenizer": own["pre_tokenizer"],
        "post_processor": _template(settings, own["post_processor"]) or own["post_processor"] or level,
        "decoder": level,
        "model": model,
    }
    return json.dumps(data, ensure_ascii=False)


def _template(settings: Mapping[str, Any], trims: Any) -> Any:
    """The post-processor for what settings add, after others; None where they add nothing."""
    roles = [role for role in ("bos_token", "eos_token") if settings.get(f"add_{role}")]
    ids = {role: (settings[f"{role}_id"],) for role in roles}
    rows = [flagged(ids.get("bos_token", ()), ids.get("eos_token", ()), texts) for texts in (1, 2)]
    made = template(rows[0], rows[1], {settings[f"{role}_id"]: settings[role] for role in roles})
    return joined("processors", [*flat(trims, "processors"), made]) if roles else None
