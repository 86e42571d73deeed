"""The folder of a run: a model folder, with what the run goes on from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files.folders import replaced
from gpt2_multi.files.json_files import hold, read_json, write_whole
from gpt2_multi.model.checkpoint.saving import is_model_file

SUMS = "sums.json"  # in a state: the checksums of its files
KEPT = 2  # states of earlier steps, the last among them
STAGE = r"\.(?:{})\.[a-z0-9_]{{8}}"  # how `folders.replaced` calls a folder until it is whole


class Folder:
    """The places in the folder of a run.

    state/run.json says what the run is; state/00000100 is that of step 100. The model itself lies at the top.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.states, self.tokens = path, path / "state", path / "data"
        self.begun, self.start, self.lock = self.states / "run.json", self.states / "start", self.states / "lock"
        self.metrics, self.curve, self.card = path / "metrics.jsonl", path / "curve.svg", path / "README.md"
        self.events = path / "logs"
        self._lock: Any = None

    def claim(self, resume: bool) -> None:
        """Take the folder for a run; InputError where it has something else, or another run."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: expected a folder, found a file; name another")
        steps, ours = self.steps(), self.begun.exists()
        if resume and not steps:
            raise InputError(f"--out {self.path}: has no run that could go on; leave out --resume")
        if steps and not resume:
            raise InputError(f"--out {self.path}: has a run, of {steps[-1]:,} steps; add --resume, or name another")
        if not ours and self._has_others():
            raise InputError(f"--out {self.path}: expected an empty folder, found other things in it; name another")
        self.states.mkdir(parents=True, exist_ok=True)
        self._lock = self.lock.open("w")
        hold(self._lock, f"--out {self.path}")
        if not self.begun.exists():
            self.begin({})
        self._clear()

    def _has_others(self) -> bool:
        """Whether anything is there but what a process leaves that was killed before it began."""
        ours, partial = (self.states, self.lock), f".{self.begun.name}."
        return any(path not in ours and not path.name.startswith(partial) for path in self.path.rglob("*"))

    def release(self) -> None:
        """Let another process take the folder."""
        if self._lock is not None:
            self._lock.close()

    def _clear(self) -> None:
        """Take away what a process that was killed had not finished."""
        whole = self.path.resolve()
        left = [*stages(self.states, f"[0-9]+|{self.start.name}"), *self.path.glob(".replaced-*")]
        beside = stages(whole.parent, re.escape(whole.name[:20]))
        left += [path for path in beside if all(map(is_model_file, path.iterdir()))]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps whose states are there."""
        return sorted(int(path.name) for path in self.states.glob("[0-9]*") if path.is_dir() and path.name.isdigit())

    def state(self, step: int) -> Path:
        """The place of a state."""
        return self.states / f"{step:08}"

    def begin(self, values: Mapping[str, Any]) -> None:
        """Write what the run is."""
        write_whole(self.begun, json.dumps(dict(values), indent=2))

    def read(self) -> dict[str, Any]:
        """What the run is."""
        return read_json(self.begun)

    def backend(self) -> str | None:
        """The backend that a run there has, if there is one."""
        found = self.read().get("plan") if self.begun.exists() else None
        return None if found is None else str(found["backend"])

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a state: whole, or not at all."""
        with replaced(self.state(step), lambda _: True) as stage:
            write(stage)
            (stage / SUMS).write_text(json.dumps(sums(stage)), encoding="utf-8")

    def check(self, step: int) -> None:
        """CheckpointError where a state is not what was written: a flipped bit is a number like another to a reader."""
        state = self.state(step)
        kept = read_json(state / SUMS) if (state / SUMS).exists() else {}
        there = sums(state)
        if wrong := [name for name, found in kept.items() if name in there and there[name] != found]:
            raise CheckpointError(f"{state / wrong[0]}: is damaged, for its checksum is another")

    def prune(self) -> None:
        """Take away the states before the last ones, and the first weights, which no state needs."""
        for path in [*map(self.state, self.steps()[:-KEPT]), self.start]:
            shutil.rmtree(path, ignore_errors=True)


def sums(state: Path) -> dict[str, int]:
    """The checksum of each file of a state."""
    found = {}
    for path in sorted(path for path in state.rglob("*") if path.is_file() and path.name != SUMS):
        with path.open("rb") as file:
            found[path.relative_to(state).as_posix()] = reduce(lambda sum_, part: crc32(part, sum_), parts(file), 0)
    return found


def parts(file: BinaryIO) -> Iterator[bytes]:
    """A file, a few megabytes after the other."""
    return iter(lambda: file.read(1 << 22), b"")


def stages(place: Path, stem: str) -> Iterator[Path]:
    """The folders that `folders.replaced` had not finished, for targets of such a name."""
    return (path for path in place.iterdir() if re.fullmatch(STAGE.format(stem), path.name) and path.is_dir())
