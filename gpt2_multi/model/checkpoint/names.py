"""From the names of a file to those of the table: what stands before them is found out and taken off, here alone.

A program puts a model into others (`module.`, `_orig_mod.`, `policy.`, `state_dict.` for a key), and these put their
names before its names. Whichever they are, what comes after them is a row of the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from gpt2_multi.errors import CheckpointError, InputError, described, shortened
from gpt2_multi.files.arrays import Array
from gpt2_multi.files.hub import matches
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import WRAPPERS, Spelling
from gpt2_multi.model.weights import EMBEDDINGS, HEADS, table, weight_of

OUTDATED = {  # the heads of pytorch-pretrained-bert, 2019
    "lm_head.decoder.": "lm_head.",
    "multiple_choice_head.linear.": "multiple_choice_head.summary.",
}
_ANY = GPT2Config(vocab_size=1, n_positions=1, n_embd=1, n_head=1, n_layer=2, add_cross_attention=True)


class Names(NamedTuple):
    """The tensors of a file by the names that the table's spelling has for them, or by their own where it has none.

    `prefix` is what stood before the names; None where no tensor is named as one of a GPT-2. `originals` are the names
    in the file, and `dropped` those that were left out because somebody wanted it.
    """

    tensors: dict[str, Array]
    prefix: str | None
    originals: dict[str, str]
    dropped: list[str]


class _Row(NamedTuple):
    """The name of a tensor of the body, in parts: what stands before it, the root if it has one, and the rest."""

    before: str
    root: str
    row: str


def named(
    found: Mapping[str, Array],
    spelling: Spelling,
    source: str,
    prefix: str | None = None,
    drop: str | Iterable[str] = (),
    key_mapping: Mapping[str, str] | None = None,
) -> Names:
    """Take what stands before the names of a GPT-2 off them.

    `prefix` chooses among several GPT-2s, by what stands before their names or by how that begins, and leaves out what
    is not under it; "" is the one before whose names nothing stands. What is under one model is part of it, another
    model too; heads may stand above it. `drop` are patterns of names to leave out, and `key_mapping` regular
    expressions, the first of which that is found in a name is replaced before all else. Raises CheckpointError where
    there are several GPT-2s and nobody has chosen, InputError for a prefix or a pattern that fits nothing.
    """
    patterns = _patterns(drop)
    plain = {name: _plain(name, key_mapping or {}) for name in found if not matches(name, patterns)}
    parted = _parted(spelling)
    rows = {name: _Row(*parts.groups()) for name, text in plain.items() if (parts := parted.fullmatch(text))}
    before = _chosen(rows.values(), spelling, source, prefix)
    heads, above = _heads(spelling), _above(before or "")
    new = {name: _cleaned(text, rows.get(name), above, heads, spelling) for name, text in plain.items()}
    if prefix is None:  # nobody has chosen: what is beside the model is not left out in silence
        new = {name: name if text is None else text for name, text in new.items()}
    _check_patterns(patterns, [*found, *(text for text in new.values() if text is not None)], source)
    originals: dict[str, str] = {}
    for name, text in new.items():
        if text is not None and not matches(text, patterns) and originals.setdefault(text, name) != name:
            raise CheckpointError(
                f"{source}: {originals[text]} and {name} are both {text}; leave one out: drop={name!r} (--drop)"
            )
    stayed = set(originals.values())
    whole = None if before is None else next(_whole(name, row) for name, row in rows.items() if row.before == before)
    dropped = [name for name in found if name not in stayed]
    return Names({text: found[name] for text, name in originals.items()}, whole, originals, dropped)


def _plain(name: str, key_mapping: Mapping[str, str]) -> str:
    """A name as the caller maps it, without what wraps parts of a model."""
    for pattern, replacement in key_mapping.items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return WRAPPERS.sub("", name)


def _patterns(drop: str | Iterable[str]) -> list[str]:
    patterns = [drop] if isinstance(drop, str) or not isinstance(drop, Iterable) else list(drop)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InputError(f'drop: expected patterns of names such as "v_head.*", found {described(pattern)}')
    return patterns


def _check_patterns(patterns: Iterable[str], names: list[str], source: str) -> None:
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            some = ", ".join(shortened(name) for name in names[:3])
            raise InputError(f"drop: {source} has no tensor named {pattern!r}; its names are such as {some}")


def _parted(spelling: Spelling) -> re.Pattern[str]:
    """A pattern of the names of a body, with anything before them, in three groups."""
    names = {name.removeprefix(spelling.root) for row in table(_ANY, "base") for name in spelling.spellings(row)}
    block, number = (re.escape(spelling.block.format(text)) for text in ("1", "{}"))
    rows = "|".join(re.escape(name).replace(block, number.replace(r"\{\}", r"\d+"), 1) for name in sorted(names))
    return re.compile(rf"((?:.*?[./])??)((?:{re.escape(spelling.root)})?)({rows})")


def _chosen(rows: Collection[_Row], spelling: Spelling, source: str, prefix: str | None) -> str | None:
    """What stands before the names of the model that is wanted: before its position table, of which it has one."""
    (positions,) = spelling.spellings(weight_of(EMBEDDINGS[1], _ANY, None), False)
    each = Counter(row.before for row in rows)
    there = [row for row in rows if row.row == positions.removeprefix(spelling.root)]
    there = there or [row for row in rows if row.before == max(each, key=lambda before: each[before])][:1]
    found = sorted({row.before for row in (there if prefix is None else _below(there, source, prefix))}, key=len)
    if not all(before.startswith(found[0]) for before in found):  # else the others are parts of the first
        names = " and ".join(repr(shortened(before)) for before in found[:4])
        raise CheckpointError(
            f"{source}: holds {len(found)} GPT-2s, their names after {names}; choose one of them with "
            f"prefix={found[0]!r} (--prefix {found[0]})"
        )
    return found[0] if found else None


def _below(rows: list[_Row], source: str, prefix: str) -> list[_Row]:
    """Those of the rows that are under a prefix, which has to be some."""
    if not isinstance(prefix, str):
        raise InputError(f'prefix: expected what stands before names, such as "policy.", found {described(prefix)}')
    fitting = [row for row in rows if f"{row.before}{row.root}".startswith(WRAPPERS.sub("", prefix))]
    fitting = fitting if prefix else [row for row in rows if not row.before]
    if not fitting:
        names = ", ".join(repr(shortened(row.before)) for row in rows[:4]) or "none"
        raise InputError(f"prefix: {source} has no GPT-2 below {prefix!r}; what stands before the names is {names}")
    return fitting


def _above(before: str) -> list[str]:
    """What stands before the body's names, and what that begins with: there may be heads."""
    ends = [0, *(place + 1 for place, sign in enumerate(before) if sign in "./")]
    return [before[:end] for end in reversed(ends)]


def _cleaned(name: str, row: _Row | None, above: list[str], heads: set[str], spelling: Spelling) -> str | None:
    """The name of a tensor in the table's spelling, or what is left of it; None where it is not under the prefix."""
    if row is not None and row.before == above[0]:
        return (spelling.root if spelling.always_rooted else row.root) + row.row
    for before in above:
        if name.startswith(before) and (head := _current(name.removeprefix(before))) in heads:
            return head
    return name.removeprefix(above[0]) if name.startswith(above[0]) else None


def _heads(spelling: Spelling) -> set[str]:
    rows = [weight_of(param, _ANY, None) for params in HEADS.values() for param in params]
    return {name for row in rows for name in spelling.spellings(row)}


def _current(name: str) -> str:
    """The name that a tensor of a head has today."""
    for old, new in OUTDATED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _whole(name: str, row: _Row) -> str:
    """What stands before the name of a tensor in its file, with all that wraps the model."""
    end = f"{row.root}{row.row}"
    return name.removesuffix(end) if name.endswith(end) else row.before
