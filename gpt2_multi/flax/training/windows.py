"""The data of a training run: batches that follow from the step, so that a run can go on where it stopped."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs


class Windows:
    """Batches of windows of a text: `data[step]` is the batch of a step, so that the step says where in the data it is.

    Each epoch cuts the ids (N,) elsewhere, and takes all windows once, in an order that `seed` decides.
    """

    def __init__(self, ids: Any, length: int, batch_size: int, seed: int = 0) -> None:
        inputs.check_size("length", length, 1)
        inputs.check_size("batch_size", batch_size, 1)
        inputs.check_size("seed", seed)
        self.ids, self.length, self.batch_size, self.seed = np.asarray(ids), length, batch_size, seed  # or a file's map
        inputs.check_shape("ids", self.ids.shape, (None,))
        if len(self.ids):
            inputs.check_integers("ids", inputs.Facts.of(self.ids))
        self.steps_per_epoch = (len(self.ids) // length - 1) // batch_size
        if self.steps_per_epoch < 1:
            raise InputError(
                f"ids: expected at least {(batch_size + 1) * length}, a batch of {batch_size} windows of {length} and "
                f"one to spare, found {len(self.ids)}; give a longer text, shorter windows or a smaller batch"
            )

    def __getitem__(self, step: int) -> dict[str, np.ndarray[Any, Any]]:
        """Ids and labels (B, T) of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        offset, order = rng.integers(self.length), rng.permutation(len(self.ids) // self.length - 1)
        starts = offset + self.length * order[number * self.batch_size :][: self.batch_size]
        ids = self.ids[starts[:, None] + np.arange(self.length)].astype(np.int32)  # (B, T)
        return {"input_ids": ids, "labels": ids}
