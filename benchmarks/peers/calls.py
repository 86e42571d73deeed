"""What the classes of peers share: how ids and modes come, what AdamW is given, how many threads and how much memory.

Each class loads a folder in modes, words such as "int8", "autocast" (bfloat16, where it serves), "xla", "whole logits"
or "new" (not loaded, but made), and has some of these calls: `generate(ids, new, options)` with options named as
transformers names them, `loss(ids)`, and `train(ids)` that makes one update and returns its loss.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

Ids = np.ndarray[Any, Any]
ADAMW = {"learning_rate": 1e-4, "weight_decay": 0.01}


def as_ids(given: Any) -> Ids:
    """Ids as a model takes them."""
    return np.array(given, np.int32)


def dtype_of(modes: frozenset[str]) -> str:
    """What the weights are stored in."""
    return "bfloat16" if "bfloat16" in modes else "float32"


def threads() -> int:
    """How many threads compute: one on each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Process:
    """What can be asked of any peer."""

    def __init__(self, folder: Path, modes: frozenset[str]) -> None:
        self.modes = modes
        self.load(folder)

    def load(self, folder: Path) -> None:
        """Make the model of a folder."""
        raise NotImplementedError

    def turn_to(self, folder: str) -> None:
        """Go on with the model of another folder."""
        self.load(Path(folder))

    def peak(self) -> float:
        """The most megabytes that this process has held."""
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**20 if sys.platform == "darwin" else 2**10)
