"""The data of a training run: batches that follow from the step, so that a run can go on where it stopped."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt2_multi.generation.rules import batches_per_epoch, window_starts
from gpt2_multi.model import inputs


class Windows:
    """Batches of windows of a text: `data[step]` is the batch of a step, so that the step says where in the data it is.

    Each epoch cuts the ids (N,) elsewhere, and takes all windows once, in an order that `seed` decides: that of
    `gpt2-multi train`.
    """

    def __init__(self, ids: Any, length: int, batch_size: int, seed: int = 0) -> None:
        inputs.check_size("length", length, 1)
        inputs.check_size("batch_size", batch_size, 1)
        inputs.check_size("seed", seed)
        self.ids, self.length, self.batch_size, self.seed = np.asarray(ids), length, batch_size, seed  # or a file's map
        inputs.check_shape("ids", self.ids.shape, (None,))
        if len(self.ids):
            inputs.check_integers("ids", inputs.Facts.of(self.ids))
        self.steps_per_epoch = batches_per_epoch(len(self.ids), length, batch_size)

    def __getitem__(self, step: int) -> dict[str, np.ndarray[Any, Any]]:
        """Ids and labels (B, T) of a step."""
        starts = window_starts(len(self.ids), self.length, self.batch_size, self.seed, step)
        ids = self.ids[starts[:, None] + np.arange(self.length)].astype(np.int32)  # (B, T)
        return {"input_ids": ids, "labels": ids}
