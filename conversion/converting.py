"""From any format to any other: `convert`, which writes the new checkpoint whole or not at all, and its report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files.arrays import Array, Made
from gpt2_multi.files.containers.safetensors import DTYPES
from gpt2_multi.files.folders import PathLike, replaced
from gpt2_multi.files.hub import CHATS, FOREIGN, RENAMED, SETTINGS, TOKENIZER, matches
from gpt2_multi.files.json_files import write_json
from gpt2_multi.model import fields
from gpt2_multi.model.checkpoint import Checkpoint, open
from gpt2_multi.model.checkpoint.quantized import (
    DTYPE,
    Quantized,
    check_method,
    in_int8,
    with_method,
)
from gpt2_multi.model.checkpoint.quantized import (
    quantize as quantized_row,
)
from gpt2_multi.model.checkpoint.saving import spelled
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import ARCHITECTURES, Format
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.spelling import parts_of
from gpt2_multi.model.weights import Weight, table

REPORT = "conversion.json"
FLOATS = {dtype.name: dtype for dtype in DTYPES.values() if dtype.name in fields.DTYPES}
COMPANIONS = (SETTINGS[1], *(name for name in TOKENIZER if name not in RENAMED), *FOREIGN)  # go as they are


@dataclass
class ConversionReport:
    """What a conversion did. A tensor is renamed, cast, dropped, or missing and filled in."""

    source: str
    target: str
    from_format: str
    to_format: str
    head: str
    prefix: str = ""  # what stood before the names
    tensors: int = 0
    parameters: int = 0
    renamed: dict[str, list[str]] = field(default_factory=dict)  # the names that it had -> that it has
    cast: dict[str, str] = field(default_factory=dict)  # canonical name -> "float32 to bfloat16"
    cut: dict[str, str] = field(default_factory=dict)  # the name that it had -> "50304 to 50257 rows"
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # that went along
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def convert(
    source: PathLike,
    target: PathLike,
    to: str = "safetensors",
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    max_shard_size: int | str = "5GB",
    untie: bool = False,
    force: bool = False,
    prefix: str | None = None,
    drop: str | Iterable[str] = (),
    n_head: int | None = None,
    vocab_size: int | None = None,
    n_positions: int | None = None,
    check: Callable[[Checkpoint, Checkpoint], None] | None = None,
    watch: Callable[[str, int, int], None] | None = None,
) -> ConversionReport:
    """Write the checkpoint `source` to the folder `target` in the format `to`, a key of `formats.table`.

    dtype: what the tensors are cast to, by default what they are; those in int8 become floats where it is given, and
    in formats that have no room for them. quantize: "int8" for the products and the embedding of tokens.
    max_shard_size: of safetensors and pytorch_model.bin.
    untie: store the head of a tied model as a tensor of its own. force: replace a model that is there, and go on where
    the target's program would compute with another activation or epsilon. prefix: which of several models in the source
    is meant, by what stands before its names. drop: patterns of names of tensors to leave out. n_head: how many heads
    there are, where no config.json says. vocab_size, n_positions: keep only so many rows. check: is given the old and
    the new one before the new one takes its place, and may raise. watch: is told each tensor, its bytes and those of
    all. Memory is a few megabytes, or the largest tensor where a layout changes.

    Configuration, generation settings and tokenizer go along; `conversion.json` says what was done. `target` is the old
    folder or the new one at any moment; where other files are in it, they stay: see `files.folders.replaced`. Raises
    CheckpointError, and changes nothing, where something is damaged, would be lost, or is there already.
    """
    sizes = {"n_head": n_head, "vocab_size": vocab_size, "n_positions": n_positions}
    settings: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    old, place = open(source, prefix=prefix, drop=drop, **settings), Path(target)
    kind = _kind(to)
    report = ConversionReport(str(source), str(target), old.format, to, old.head, old.names.prefix or "")
    report.cut = {old.original(name): how for name, how in old.cut.items()}
    report.dropped, report.warnings = old.dropped, [old.guessed] if old.guessed else []
    config = with_method(_configuration(old, dtype, untie), _method(old, to, dtype, quantize))
    _check_room(kind, to, config, old.head, force, report)
    _check_place(old, place, force)
    made = _made(old, config, kind, dtype, report, watch)
    with replaced(place, _is_ours) as stage:
        kind.write(stage, made, config, max_shard_size)
        _carry(old, stage, to, report)
        write_json(stage / REPORT, report.to_dict())
        if check is not None:
            check(old, open(stage))
    return report


def _kind(to: str) -> Format:
    if to not in FORMATS:
        raise InputError(f"to: expected one of {', '.join(FORMATS)}, found {to!r}")
    return FORMATS[to]


def _method(old: Checkpoint, to: str, dtype: str | None, quantize: str | None) -> str | None:
    """What the new one is quantized to: what somebody wants, or what the old one is, where there is room for it."""
    check_method(quantize)
    if quantize is not None and to != "safetensors":
        raise InputError(f'quantize: expected to="safetensors", which has room for int8, found {to!r}')
    return old.config.quantization if quantize is None and dtype is None and to == "safetensors" else quantize


def _configuration(old: Checkpoint, dtype: str | None, untie: bool) -> GPT2Config:
    if dtype is not None and dtype not in FLOATS:
        raise InputError(f"dtype: expected one of {', '.join(FLOATS)}, found {dtype!r}")
    if untie and old.head not in ("lm", "double_heads"):
        raise InputError(f"untie: expected a language model, found the head {old.head}, which has nothing to untie")
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untie else {}
    stored = dtype or old.dtype_of("wte.weight").name
    return old.config.replace(architectures=[ARCHITECTURES[old.head]], dtype=stored, **changes)


def _check_room(kind: Format, to: str, config: GPT2Config, head: str, force: bool, report: ConversionReport) -> None:
    """Whether the target can hold the model, and its program compute the same with it."""
    if head not in kind.heads:
        raise CheckpointError(f"{to}: expected a model with the head {' or '.join(kind.heads)}, found {head}")
    if kind.dtypes and config.dtype not in kind.dtypes:
        raise CheckpointError(
            f"{to}: has no room for {config.dtype}; convert to one that it has by dtype: {' or '.join(kind.dtypes)}"
        )
    for name, allowed in kind.no_room.items():
        if not _may_be(config, name, allowed):
            raise CheckpointError(
                f"{to}: has no room for a model whose {name} is {getattr(config, name)!r}; choose another format"
            )
    for name, allowed in kind.fixed.items():
        if not _may_be(config, name, allowed):
            sentence = f"its program computes with {name} = {allowed[0]!r}, this model with {getattr(config, name)!r}"
            if not force:
                raise CheckpointError(f"{to}: {sentence}; with force the weights are converted all the same")
            report.warnings.append(f"{to}: {sentence}: its results will differ")


def _may_be(config: GPT2Config, name: str, allowed: tuple[Any, ...]) -> bool:
    value = getattr(config, name)
    return value in allowed or (name == "n_inner" and value == 4 * config.n_embd)


def _check_place(old: Checkpoint, place: Path, force: bool) -> None:
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place}: expected a folder to write, found a file; give another")
    here = old.path if old.path.is_dir() else old.path.parent
    if place.resolve() == here.resolve():
        raise CheckpointError(f"{place}: is the folder that is read; give another, and delete the old one after it")
    work = Path.cwd()
    if place.resolve() in (work, *work.parents):
        raise CheckpointError(
            f"{place}: is the folder that you work in, or holds it; give another, such as {work / 'new'}"
        )
    there = sorted(file.name for file in place.iterdir() if _is_ours(file)) if place.exists() else []
    if there and not force:
        raise CheckpointError(f"{place}: holds a model already ({', '.join(there[:4])}); give another, or force it")


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to a model, and goes with it."""
    known = (*SETTINGS, REPORT, *COMPANIONS, *RENAMED, *(name for kind in FORMATS.values() for name in kind.own))
    return path.name == Path(CHATS).parent.name if path.is_dir() else matches(path.name, known)


def _made(
    old: Checkpoint,
    config: GPT2Config,
    kind: Format,
    dtype: str | None,
    report: ConversionReport,
    watch: Callable[[str, int, int], None] | None,
) -> dict[str, Made]:
    """The tensors to write under their names in the new format."""
    made: dict[str, Made] = {}
    rows = {row.name: row for row in table(config, old.head)}
    report.missing = [name for name in rows if name not in old and not _tied(name)]
    for name, row in rows.items():
        if name in report.missing:
            continue
        source = "wte.weight" if name not in old else name  # a head that is untied
        stored = FLOATS[dtype] if dtype else old.dtype_of(source)
        parts = kind.spelling.spellings(row, old.head != "base")
        for number, part in enumerate(parts):
            make = partial(_part, old, kind, row, source, number, watch)
            made[part] = (stored, kind.spelling.shape(row), make)
        if in_int8(config, row):
            stored = DTYPE
            made |= spelled([(row, stored, partial(_integers, old, row, source, watch))], old.head, kind.spelling)
        _note(report, old, source, list(parts), row, stored)
    return made


def _tied(name: str) -> bool:
    return name == "lm_head.weight"


def _part(old: Checkpoint, kind: Format, row: Weight, source: str, number: int, watch: Any) -> Array:
    old.release()
    array = old[source]
    if watch is not None and not number:
        watch(row.name, array.nbytes, old.bytes)
    return parts_of(kind.spelling, row, array)[number]


def _integers(old: Checkpoint, row: Weight, source: str, watch: Any) -> Quantized:
    """A row in int8, as the old one has it, or quantized now."""
    old.release()
    found = old.quantized(source)
    if watch is not None:
        watch(row.name, sum(old.found[place].nbytes for place in old.places[source]) // 2, old.bytes)  # scales follow
    return quantized_row(row, old[source]) if found is None else found


def _note(
    report: ConversionReport, old: Checkpoint, source: str, after: list[str], row: Weight, stored: np.dtype[Any]
) -> None:
    places = old.places[source]
    before, dtype = [old.original(place) for place in places], old.found[places[0]].dtype
    report.tensors += len(after)
    report.parameters += sum(old.found[place].size for place in places)
    if before != after:
        report.renamed[", ".join(before)] = after
    if dtype != stored:
        report.cast[row.name] = f"{dtype.name} to {stored.name}"


def _carry(old: Checkpoint, stage: Path, to: str, report: ConversionReport) -> None:
    """Take along what is not weights: tokenizer files under the names that the target's program reads."""
    folder = old.path if old.path.is_dir() else old.path.parent
    names: dict[str, str] = {name: name for name in COMPANIONS}
    for ours, theirs in RENAMED.items():
        names |= {name: theirs if to == "openai" else ours for name in (theirs, ours)}
    for name, new in names.items():
        for path in sorted(folder.glob(name)):
            own = path.relative_to(folder).as_posix()
            target = own if new == name else new
            (stage / target).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, stage / target)
            report.files.append(target if target == own else f"{own} as {target}")
