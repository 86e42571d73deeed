"""The figures of a run as events that TensorBoard shows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from gpt2_multi.errors import InputError

TAGS = {"loss": "loss/training", "val_loss": "loss/held_out", "lr": "lr", "norm": "norm", "tokens_per_second": "speed"}


class Events:
    """A file of events; those of earlier files behind the step that a run goes on from are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter  # their EventFileWriter loads TensorFlow
        except ModuleNotFoundError:
            raise InputError("--log tensorboard: TensorBoard is not installed: pip install tensorboard") from None
        self._event, self._session, self._summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{os.getpid()}.{step}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._add(file_version="brain.Event:2")
        if step:
            self._add(step=step + 1, session_log=self._session(status=self._session.START))
        self._writer.flush()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Add rows of metrics.jsonl."""
        for row in rows:
            found = {tag: row[name] for name, tag in TAGS.items() if row.get(name) is not None}
            values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in found.items()]
            self._add(step=row["step"], summary=self._summary(value=values))
        self._writer.flush()

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: Any) -> None:
        self._writer.close()
