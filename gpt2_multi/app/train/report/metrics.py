"""metrics.jsonl: a line for each step, which is cut to the step that a run goes on from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.json_files import sync, write_whole

NEEDED = "step", "loss", "seconds"  # of a line, to go on behind it


class Point(NamedTuple):
    """What one evaluation saw, per token."""

    step: int
    train: float  # the mean since the last evaluation
    held_out: float | None


class Metrics:
    """The figures of a run, in memory only as far as a curve needs them."""

    def __init__(self, path: Path, step: int = 0) -> None:
        """Go on behind a step; later lines are taken away."""
        self.path, self.points = path, list[Point]()
        self._sum, self._count, self.steps, self.seconds = 0.0, 0, 0, 0.0
        text = "".join(self._until(step)) if path.exists() else ""
        if self.steps != step:
            raise CheckpointError(f"{path}: expected the lines of {step} steps, found {self.steps}; start another run")
        write_whole(path, text)
        self._file = path.open("ab")

    def _until(self, step: int) -> Iterator[str]:
        for row in read(self.path):
            if row["step"] <= step:
                self._note(row)
                yield line(row)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add lines."""
        self._file.write("".join(map(line, rows)).encode())
        for row in rows:
            self._note(row)

    def _note(self, row: dict[str, Any]) -> None:
        self._sum, self._count = self._sum + row["loss"], self._count + 1
        self.steps, self.seconds = row["step"], row["seconds"]
        if "val_loss" in row:
            self.points.append(Point(row["step"], self._sum / self._count, row["val_loss"]))
            self._sum, self._count = 0.0, 0

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        sync(self._file)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    @property
    def best(self) -> Point | None:
        """The evaluation with the least held-out loss, if anything was held out."""
        measured = [point for point in self.points if point.held_out is not None]
        return min(measured, key=lambda point: point.held_out or math.inf, default=None)


def line(row: dict[str, Any]) -> str:
    """A row of the file."""
    return json.dumps(row) + "\n"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; the last one may be torn off, by a process that was killed."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            try:
                row = json.loads(text)
                whole = all(isinstance(row[name], int | float) for name in NEEDED)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise CheckpointError(f"{path}, line {number}: is not what a run writes; start another run")
            yield row
