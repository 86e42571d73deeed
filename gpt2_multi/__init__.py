"""GPT-2 for PyTorch, TensorFlow and JAX, from one configuration, one tokenizer and one table of weights.

The names here are imported when they are first used: `import gpt2_multi` alone loads no framework, and not even NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_multi.app.pipeline import pipeline
    from gpt2_multi.generation.config import GenerationConfig
    from gpt2_multi.generation.request import set_seed
    from gpt2_multi.model.config import GPT2Config
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

__version__ = "0.1.0"
__all__ = ["GPT2Config", "GPT2Tokenizer", "GenerationConfig", "__version__", "pipeline", "set_seed"]

_PLACES = {
    "GPT2Config": "gpt2_multi.model.config",
    "GPT2Tokenizer": "gpt2_multi.tokenizer.tokenizer",
    "GenerationConfig": "gpt2_multi.generation.config",
    "pipeline": "gpt2_multi.app.pipeline",
    "set_seed": "gpt2_multi.generation.request",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gpt2_multi' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
