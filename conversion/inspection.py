"""What is in a checkpoint: `inspect` lists every tensor and what the table of weights says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpt2_multi.files.arrays import Array, Shape
from gpt2_multi.files.folders import PathLike
from gpt2_multi.model.checkpoint import config_of, head_of, recognised
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.table import FORMATS
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
    """What `inspect` found. `missing` are the rows of the table that the file lacks."""

    path: str
    format: str
    title: str
    head: str
    config: dict[str, Any]
    tensors: list[TensorEntry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    parameters: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def inspect(path: PathLike) -> Inspection:
    """List what a checkpoint of any format holds. Raises CheckpointError where it cannot be read at all."""
    format, main = recognised(Path(path))
    kind = FORMATS[format]
    arrays, config = kind.read(main), config_of(kind, main)
    head = head_of(kind, arrays, config)
    rows = named_rows(arrays, config, head, kind.spelling, str(path))
    result = Inspection(str(path), format, kind.title, head, config.to_dict())
    result.tensors = [_entry(name, array, rows.get(name), config, format) for name, array in arrays.items()]
    result.missing = [name for name in rows if name not in arrays]
    result.parameters = sum(array.size for name, array in arrays.items() if name in rows)
    result.bytes = sum(array.nbytes for array in arrays.values())
    return result


def _entry(name: str, array: Array, row: Weight | None, config: GPT2Config, format: str) -> TensorEntry:
    shape, dtype, spelling = tuple(array.shape), array.dtype.name, FORMATS[format].spelling
    if row is None:
        known = is_known_extra(name, config, spelling)
        return TensorEntry(name, shape, dtype, None, "dropped when loaded" if known else "unknown")
    if shape != spelling.shape(row):
        return TensorEntry(name, shape, dtype, row.name, f"expected {spelling.shape(row)}")
    return TensorEntry(name, shape, dtype, row.name)
