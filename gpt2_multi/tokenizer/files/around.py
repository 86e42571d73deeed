"""What a tokenizer.json puts around texts after they are read: control tokens, and spans without their spaces."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.files.steps import flat, joined


class Piece(NamedTuple):
    """A piece of a row: a text (0) or its pair (1), or ids that are added (None); and the type of its tokens."""

    of: int | None
    kind: int = 0
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Around:
    """The post-processors of a tokenizer.json, as JSON, so that they can be pickled and written."""

    processors: str = "[]"

    @classmethod
    def of(cls, processor: Any) -> "Around":
        """What tokenizer.json describes.

        Raises:
            TokenizerError: it is not known here.
        """
        around = cls(json.dumps(flat(processor, "processors")))
        around.row(1)
        return around

    def as_flags(self, begin: int | None, end: int | None) -> tuple[bool, bool] | None:
        """Whether texts begin and end with these ids, if that is all that it adds."""
        begins, ends = ([(), *([] if at is None else [(at,)])] for at in (begin, end))
        for first, last in product(begins, ends):
            if all(flagged(first, last, texts) == self.row(texts) for texts in (1, 2)):
                return bool(first), bool(last)
        return None

    def without_tokens(self) -> "Around":
        """The same, but for the tokens."""
        return Around(json.dumps([step for step in json.loads(self.processors) if step["type"] not in TEMPLATES]))

    @property
    def has_tokens(self) -> bool:
        """Whether it says which tokens are added, were it none."""
        return self.processors != "[]" and any(step["type"] in TEMPLATES for step in json.loads(self.processors))

    def row(self, texts: int) -> tuple[Piece, ...]:
        """The pieces of a row of so many texts, 1 or 2."""
        return _rows(self.processors)[texts - 1]

    @property
    def trims(self) -> list[bool]:
        """For each time that spans lose their spaces, whether a space was put before the text."""
        found = [step for step in json.loads(self.processors) if step["type"] in ("ByteLevel", "RobertaProcessing")]
        return [bool(step.get("add_prefix_space", True)) for step in found if step.get("trim_offsets", True)]

    def to_json(self) -> Any:
        """What tokenizer.json says of it; None of nothing."""
        steps = json.loads(self.processors)
        return joined("processors", steps) if steps else None


NOTHING_AROUND = Around()


def flagged(begin: tuple[int, ...], end: tuple[int, ...], texts: int) -> tuple[Piece, ...]:
    """The pieces of a row of so many texts, each of which begins and ends with these ids."""
    rows = [(Piece(None, at, begin), Piece(at, at), Piece(None, at, end)) for at in range(texts)]
    return tuple(piece for row in rows for piece in row if piece.ids or piece.of is not None)


def template(single: Sequence[Piece], pair: Sequence[Piece], names: Mapping[int, str]) -> Mapping[str, Any]:
    """The post-processor that makes rows of these pieces; `names` are those of the tokens."""

    def spelled(piece: Piece) -> Mapping[str, Any]:
        if piece.of is None:
            return {"SpecialToken": {"id": names[piece.ids[0]], "type_id": piece.kind}}
        return {"Sequence": {"id": "AB"[piece.of], "type_id": piece.kind}}

    ids = dict.fromkeys(piece.ids[0] for piece in pair if piece.ids)
    tokens = {names[at]: {"id": names[at], "ids": [at], "tokens": [names[at]]} for at in ids}
    rows = {"single": [*map(spelled, single)], "pair": [*map(spelled, pair)]}
    return {"type": "TemplateProcessing", **rows, "special_tokens": tokens}


@lru_cache(maxsize=16)
def _rows(processors: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """The pieces of a row of one text, and of two."""
    steps = json.loads(processors)
    if unknown := [step["type"] for step in steps if step["type"] not in ("ByteLevel", *TEMPLATES)]:
        raise TokenizerError(f"expected a post_processor that is known here, found {unknown[0]!r}; leave it out")
    found = [TEMPLATES[step["type"]](step) for step in steps if step["type"] in TEMPLATES]
    if len(found) > 1:
        raise TokenizerError("post_processor: expected one that adds tokens, found two; leave one out")
    return found[0] if found else ((Piece(0),), (Piece(0), Piece(1, 1)))


def _of_template(step: Mapping[str, Any]) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    ids = {name: tuple(token["ids"]) for name, token in step["special_tokens"].items()}

    def piece(part: Mapping[str, Any]) -> Piece:
        if "Sequence" in part:
            return Piece("AB".index(part["Sequence"]["id"]), part["Sequence"]["type_id"])
        return Piece(None, part["SpecialToken"]["type_id"], ids[part["SpecialToken"]["id"]])

    rows = [tuple(map(piece, step[name])) for name in ("single", "pair")]
    for row, texts in zip(rows, ([0], [0, 1]), strict=True):
        if sorted(part.of for part in row if part.of is not None) != texts:
            raise TokenizerError("post_processor: expected a template with each text once; mend the file")
    return rows[0], rows[1]


def _of_bert(step: Mapping[str, Any], second: int = 1, between: int = 0) -> Any:
    begin, end = (Piece(None, 0, (step[name][1],)) for name in ("cls", "sep"))
    middle = [end] * between
    return (begin, Piece(0), end), (begin, Piece(0), end, *middle, Piece(1, second), end._replace(kind=second))


def _of_roberta(step: Mapping[str, Any]) -> Any:
    return _of_bert(step, second=0, between=1)


TEMPLATES = {"TemplateProcessing": _of_template, "BertProcessing": _of_bert, "RobertaProcessing": _of_roberta}
