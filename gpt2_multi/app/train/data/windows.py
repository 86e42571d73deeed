"""Batches that follow from the step: the same on every framework, in every number of processes, after any stop."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt2_multi.generation.rules import batches_per_epoch, window_starts
from gpt2_multi.model import inputs

Array = np.ndarray[Any, Any]


class Windows:
    """Batches of windows of token ids: `windows[step]` is that of a step, in whichever epoch this is.

    ids: an array (N,), a map of a file, or `Tokens`, of which no more is read than a batch has. Raises InputError where
    they are too few for a batch.
    """

    def __init__(self, ids: Any, length: int, batch_size: int, seed: int = 0) -> None:
        inputs.check_size("length", length, 1)
        inputs.check_size("batch_size", batch_size, 1)
        inputs.check_size("seed", seed)
        self.ids, self.length, self.batch_size, self.seed = ids, length, batch_size, seed
        self._batches = batches_per_epoch(len(ids), length, batch_size)

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return self._batches

    def __getitem__(self, step: int) -> dict[str, Array]:
        """Ids and labels, both (B, T) int32, of a step from 0."""
        inputs.check_size("step", step)
        starts = window_starts(len(self.ids), self.length, self.batch_size, self.seed, int(step))
        ids = np.stack([self.ids[start : start + self.length] for start in starts.tolist()]).astype(np.int32)  # (B, T)
        return {"input_ids": ids, "labels": ids}
