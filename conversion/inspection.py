"""What is in a checkpoint: `inspect` lists every tensor and what the table of weights says of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from gpt2_multi.files.arrays import Array, Shape
from gpt2_multi.files.folders import PathLike
from gpt2_multi.model.checkpoint import find, head_of
from gpt2_multi.model.checkpoint.quantized import SCALE, apart, scale_shape
from gpt2_multi.model.formats.format import Format
from gpt2_multi.model.spelling import is_known_extra, named_rows
from gpt2_multi.model.weights import Weight


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, and what the table says: its canonical name, or what is the matter with it."""

    name: str
    shape: Shape
    dtype: str
    row: str | None
    remark: str = ""

    @property
    def ok(self) -> bool:
        """Whether the table knows it, as it is."""
        return self.row is not None and not self.remark


@dataclass
class Inspection:
    """What `inspect` found. `missing` are the rows of the table that the file lacks.

    `prefix` is what stands before the names of the model, None where no tensor is one of a GPT-2, and `guessed` a
    sentence of what the files do not say.
    """

    path: str
    format: str
    title: str
    head: str
    config: dict[str, Any]
    prefix: str | None = ""
    guessed: str = ""
    tensors: list[TensorEntry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    parameters: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def inspect(
    path: PathLike, *, prefix: str | None = None, drop: str | Iterable[str] = (), n_head: int | None = None
) -> Inspection:
    """List what a checkpoint of any format holds; `prefix`, `drop` and `n_head` are those of `convert`.

    Raises CheckpointError where it cannot be read at all.
    """
    source = find(path, prefix=prefix, drop=drop)
    kind, arrays, originals = source.kind, source.names.tensors, source.names.originals
    config, guessed = source.config({"n_head": n_head})
    config = config if n_head is None else config.replace(n_head=n_head)
    head = head_of(kind, arrays, config)
    whole, scales = apart(arrays)
    rows = named_rows(whole, config, head, kind.spelling, str(path))
    result = Inspection(str(path), source.format, kind.title, head, config.to_dict(), source.names.prefix, guessed)
    result.tensors = [
        _entry(originals[name], array, rows.get(name), is_known_extra(name, config, kind.spelling), kind)
        for name, array in whole.items()
    ]
    result.tensors += [_scale(originals[name + SCALE], scale, rows.get(name)) for name, scale in scales.items()]
    result.missing = [name for name in rows if name not in arrays]
    result.parameters = sum(array.size for name, array in arrays.items() if name in rows)
    result.bytes = sum(array.nbytes for array in arrays.values())
    return result


def _scale(name: str, array: Array, row: Weight | None) -> TensorEntry:
    shape, dtype = tuple(array.shape), array.dtype.name
    wanted = shape if row is None else scale_shape(row)
    return TensorEntry(
        name, shape, dtype, None if row is None else row.name + SCALE, "" if shape == wanted else f"expected {wanted}"
    )


def _entry(name: str, array: Array, row: Weight | None, is_known: bool, kind: Format) -> TensorEntry:
    shape, dtype = tuple(array.shape), array.dtype.name
    if row is None:
        return TensorEntry(name, shape, dtype, None, "dropped when loaded" if is_known else "unknown")
    if shape != kind.spelling.shape(row):
        return TensorEntry(name, shape, dtype, row.name, f"expected {kind.spelling.shape(row)}")
    return TensorEntry(name, shape, dtype, row.name)
