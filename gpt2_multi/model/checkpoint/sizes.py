"""The sizes of a model that says nothing of itself but its tensors; and tables cut to fewer rows, on request."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.arrays import Array, Shape, same
from gpt2_multi.model.config import ALIASES, GPT2Config
from gpt2_multi.model.fields import DTYPES
from gpt2_multi.model.formats.format import ARCHITECTURES
from gpt2_multi.model.spelling import Spelling
from gpt2_multi.model.weights import ATTENTION, EMBEDDINGS, HEADS, Weight, table, weight_of

HEAD_DIM = 64  # of every GPT-2 that was published
_ROWS = {"vocab": "vocab_size", "position": "n_positions"}  # an axis whose rows may be cut -> its setting
_ANY = GPT2Config(vocab_size=1, n_positions=1, n_embd=1, n_head=1, n_layer=1, add_cross_attention=True)
_PARAMS = [param for params in HEADS.values() for param in params]
_TABLE = {row.name: row for row in [*table(_ANY, "base"), *(weight_of(param, _ANY, None) for param in _PARAMS)]}


def sized(tensors: Mapping[str, Array], spelling: Spelling, source: str, known: Mapping[str, Any]) -> GPT2Config:
    """The configuration of tensors that no file says anything of: sizes by their shapes, all else as in GPT-2.

    `known` are settings that are known of it otherwise. The number of heads is in no shape: where it is not known,
    there is one for each 64 numbers of a position. Raises CheckpointError where that cannot be, or where a tensor lacks
    that has a size.
    """
    shapes = {name: _shape(tensors, spelling, row) for name, row in _TABLE.items()}
    words, positions = shapes["wte.weight"] or shapes["lm_head.weight"], shapes["wpe.weight"]
    inner = shapes["h.0.mlp.c_fc.weight"]
    if not all(shape and len(shape) == 2 for shape in (words, positions, inner)):
        raise CheckpointError(
            f"{source}: has no config.json, and lacks a whole wte, wpe or h.0.mlp.c_fc, whose shapes would say of what "
            "sizes it is; give config=, or fetch it again"
        )
    n_embd, cross = positions[1], bool(shapes["h.0.crossattention.c_attn.weight"])
    sizes: dict[str, Any] = {"vocab_size": words[0], "n_positions": positions[0], "n_embd": n_embd}
    layers = takewhile(lambda i: _array(tensors, spelling, weight_of(ATTENTION[0], _ANY, i)) is not None, count())
    sizes |= {"n_layer": sum(1 for _ in layers), "n_inner": None if inner[1] == 4 * n_embd else inner[1]}
    sizes["add_cross_attention"] = cross
    sizes |= {"tie_word_embeddings": _is_tied(tensors, spelling), **_head(tensors, spelling, source, shapes), **known}
    return GPT2Config(**{**({} if "n_head" in known else {"n_head": _heads(source, n_embd)}), **sizes})


def guess(source: str, config: GPT2Config) -> str:
    """What has to be said of a configuration that nothing but shapes has said."""
    return (
        f"{source}: has no config.json: its sizes are by the shapes of its tensors, n_head is {config.n_head} by "
        f"{HEAD_DIM} numbers a head, and all else is as in GPT-2; give n_head= (--n-head) or config= where it is not so"
    )


def said(given: Mapping[str, Any], field: str) -> Any:
    """What somebody says that a setting is, by its name or by another; None where nobody does."""
    names = [field, *(name for name, other in ALIASES.items() if other == field)]
    return next((given[name] for name in names if given.get(name) is not None), None)


def cut(
    tensors: Mapping[str, Array],
    spelling: Spelling,
    source: str,
    config: GPT2Config,
    given: Mapping[str, Any],
    may_be_fewer: bool = False,
) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors with as many rows for words and positions as `given` says; and what was cut, by name.

    Raises CheckpointError where there are fewer, unless that may be.
    """
    shorter, done = dict(tensors), dict[str, str]()
    words = _shape(tensors, spelling, _TABLE["wte.weight"])
    for row in (weight_of(param, _ANY, None) for param in (*EMBEDDINGS, *HEADS["lm"])):
        field, shape = _ROWS[row.axes[0][0]], _shape(tensors, spelling, row)
        if not shape or said(given, field) is None or (row.path == "lm_head" and words and shape[0] != words[0]):
            continue
        wanted = getattr(config, field)
        if shape[0] < wanted and not may_be_fewer:
            more = ", and then resize_token_embeddings, which adds rows" if field == "vocab_size" else ""
            raise CheckpointError(
                f"{field}: expected at most {shape[0]}, as {source} has, found {wanted}; load those{more}; or give "
                "ignore_mismatched_sizes=True, which initialises all rows anew"
            )
        if shape[0] > wanted:
            name = _name(tensors, spelling, row)
            shorter[name] = tensors[name][..., :wanted] if row.kind in spelling.transposed else tensors[name][:wanted]
            done[name] = f"{shape[0]} to {wanted} rows"
    return shorter, done


def _name(tensors: Mapping[str, Array], spelling: Spelling, row: Weight) -> str:
    """The name that a row of the table has among tensors, with the root or without; the empty one where it has none."""
    names = (spelling.spell(row, rooted) for rooted in (True, False))
    return next((name for name in names if name in tensors), "")


def _array(tensors: Mapping[str, Array], spelling: Spelling, row: Weight) -> Array | None:
    return tensors.get(_name(tensors, spelling, row))


def _shape(tensors: Mapping[str, Array], spelling: Spelling, row: Weight) -> Shape:
    """The shape of a row as the table has it, an empty one where it is not there."""
    array = _array(tensors, spelling, row)
    shape = () if array is None else array.shape
    leads = row.in_body and not spelling.leading_one.isdisjoint((row.kind, row.name))
    shape = shape[1:] if leads else shape
    return shape[::-1] if row.kind in spelling.transposed else shape


def _heads(source: str, n_embd: int) -> int:
    if n_embd % HEAD_DIM:
        raise CheckpointError(
            f"{source}: has no config.json, and its n_embd {n_embd} is no multiple of {HEAD_DIM}, the width of a head "
            "in every GPT-2; say how many heads it has with n_head= (--n-head), or give config="
        )
    return n_embd // HEAD_DIM


def _head(tensors: Mapping[str, Array], spelling: Spelling, source: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The settings of the head that is there, and of the numbers that it is stored in."""
    if spelling.spell(_TABLE["score.weight"]) == spelling.spell(_TABLE["lm_head.weight"]) and shapes["score.weight"]:
        raise CheckpointError(
            f"{source}: has no config.json, and its names do not say what its head is for; give config="
        )
    labels = {"score.weight": "sequence_classification", "classifier.weight": "token_classification"}
    others = {"qa_outputs.weight": "question_answering", "multiple_choice_head.summary.weight": "double_heads"}
    found = next((name for name in (*labels, *others) if shapes[name]), None)
    words = _array(tensors, spelling, _TABLE["wpe.weight"])
    settings: dict[str, Any] = {"dtype": words.dtype.name} if words is not None and words.dtype.name in DTYPES else {}
    if found is None:
        return settings
    settings["architectures"] = [ARCHITECTURES[{**labels, **others}[found]]]
    if found in labels:
        settings["num_labels"] = shapes[found][0]
    if found in others and found.startswith("multiple"):
        settings["summary_proj_to_labels"] = shapes[found][0] == 1
    return settings


def _is_tied(tensors: Mapping[str, Array], spelling: Spelling) -> bool:
    """Whether a head is not there, or is the embedding."""
    head, words = (_array(tensors, spelling, _TABLE[name]) for name in ("lm_head.weight", "wte.weight"))
    if head is None or words is None:
        return True
    head = spelling.layout(_TABLE["lm_head.weight"], head)
    return head.dtype == words.dtype and same(head, words, "lm_head.weight")
