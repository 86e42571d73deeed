"""GPT-2 for PyTorch, TensorFlow and JAX, from one configuration, one tokenizer and one table of weights.

The names here are imported when they are first used: `import gpt2_multi` alone loads no framework, and not even NumPy.
The models are in `gpt2_multi.pt`, `gpt2_multi.tf` and `gpt2_multi.flax`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers read; `as` says that a name is given on
    from gpt2_multi.app.pipeline import TextGenerationPipeline as TextGenerationPipeline
    from gpt2_multi.app.pipeline import pipeline as pipeline
    from gpt2_multi.errors import CheckpointError as CheckpointError
    from gpt2_multi.errors import ConfigError as ConfigError
    from gpt2_multi.errors import GPT2Error as GPT2Error
    from gpt2_multi.errors import InputError as InputError
    from gpt2_multi.errors import TokenizerError as TokenizerError
    from gpt2_multi.generation.callbacks import LogitsProcessor as LogitsProcessor
    from gpt2_multi.generation.callbacks import LogitsProcessorList as LogitsProcessorList
    from gpt2_multi.generation.callbacks import StoppingCriteria as StoppingCriteria
    from gpt2_multi.generation.callbacks import StoppingCriteriaList as StoppingCriteriaList
    from gpt2_multi.generation.callbacks import TextIteratorStreamer as TextIteratorStreamer
    from gpt2_multi.generation.callbacks import TextStreamer as TextStreamer
    from gpt2_multi.generation.config import GenerationConfig as GenerationConfig
    from gpt2_multi.generation.request import set_seed as set_seed
    from gpt2_multi.generation.scoring import TextScore as TextScore
    from gpt2_multi.model.config import GPT2Config as GPT2Config
    from gpt2_multi.model.outputs import (
        BaseModelOutputWithPastAndCrossAttentions as BaseModelOutputWithPastAndCrossAttentions,
    )
    from gpt2_multi.model.outputs import CausalLMOutputWithCrossAttentions as CausalLMOutputWithCrossAttentions
    from gpt2_multi.model.outputs import GenerateOutput as GenerateOutput
    from gpt2_multi.model.outputs import GPT2DoubleHeadsModelOutput as GPT2DoubleHeadsModelOutput
    from gpt2_multi.model.outputs import QuestionAnsweringModelOutput as QuestionAnsweringModelOutput
    from gpt2_multi.model.outputs import SequenceClassifierOutputWithPast as SequenceClassifierOutputWithPast
    from gpt2_multi.model.outputs import TokenClassifierOutput as TokenClassifierOutput
    from gpt2_multi.tokenizer.encoding import BatchEncoding as BatchEncoding
    from gpt2_multi.tokenizer.fast import GPT2TokenizerFast as GPT2TokenizerFast
    from gpt2_multi.tokenizer.files import AddedToken as AddedToken
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer as GPT2Tokenizer

__version__ = "0.1.0"
_ROOMS = {  # where each name is
    "AddedToken": "tokenizer.files",
    "BaseModelOutputWithPastAndCrossAttentions": "model.outputs",
    "BatchEncoding": "tokenizer.encoding",
    "CausalLMOutputWithCrossAttentions": "model.outputs",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "GPT2Config": "model.config",
    "GPT2DoubleHeadsModelOutput": "model.outputs",
    "GPT2Error": "errors",
    "GPT2Tokenizer": "tokenizer.tokenizer",
    "GPT2TokenizerFast": "tokenizer.fast",
    "GenerateOutput": "model.outputs",
    "GenerationConfig": "generation.config",
    "InputError": "errors",
    "LogitsProcessor": "generation.callbacks",
    "LogitsProcessorList": "generation.callbacks",
    "QuestionAnsweringModelOutput": "model.outputs",
    "SequenceClassifierOutputWithPast": "model.outputs",
    "StoppingCriteria": "generation.callbacks",
    "StoppingCriteriaList": "generation.callbacks",
    "TextGenerationPipeline": "app.pipeline",
    "TextIteratorStreamer": "generation.callbacks",
    "TextScore": "generation.scoring",
    "TextStreamer": "generation.callbacks",
    "TokenClassifierOutput": "model.outputs",
    "TokenizerError": "errors",
    "pipeline": "app.pipeline",
    "set_seed": "generation.request",
}
__all__ = ["__version__", *_ROOMS]

if not TYPE_CHECKING:  # to which a module with a __getattr__ has every name

    def __getattr__(name: str) -> Any:
        if name not in _ROOMS:
            raise AttributeError(f"module 'gpt2_multi' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"gpt2_multi.{_ROOMS[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
