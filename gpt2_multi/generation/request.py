"""What a call of `generate` asks for: here, the seed that its sampling begins with."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from threading import Lock

import numpy as np

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model import inputs

_lock = Lock()


_next: int | None = None  # the first stream of noise that no text has had since set_seed


def set_seed(seed: int) -> None:
    """Set the seed of what is sampled without one, and of Python's, NumPy's and the imported frameworks' generators.

    Calls of `generate` after it go on where the last one ended, so that equal calls give different texts, and the same
    ones again after the same `set_seed`. Raises InputError for anything but a whole number from 0 to 2**32 - 1.
    """
    global _next
    inputs.check_seed(seed)
    seed = int(seed)
    with _lock:
        _next = seed
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].random.set_seed(seed)


def seed_of(config: GenerationConfig, prompts: int) -> int | Sequence[int]:
    """The seed of a call: its own, or where `set_seed` left off, or 0."""
    global _next
    if config.seed is not None:
        return config.seed
    with _lock:
        if not config.do_sample or _next is None:
            return 0
        first, _next = _next, (_next + prompts * config.rows) % 2**64
    return first
