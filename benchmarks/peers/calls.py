"""What the classes of peers share: how ids and modes come, what AdamW is given, and how much memory a process took.

Each class is made of a folder and of modes, words such as "int8", "autocast" (bfloat16, where it serves), "xla",
"whole logits" or "new" (not loaded, but made), and has some of these calls: `generate(ids, new, options)` with options
named as transformers names them, `loss(ids)`, `train(ids)` that makes one update and returns its loss, and `peak()`.
"""

from __future__ import annotations

import sys
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


class Process:
    """What can be asked of any peer."""

    def peak(self) -> float:
        """The most megabytes that this process has held."""
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**20 if sys.platform == "darwin" else 2**10)
