"""GPT-2 for PyTorch, TensorFlow and JAX, from one configuration, one tokenizer and one table of weights.

The names here are imported when they are first used: `import gpt2_multi` alone loads no framework, and not even NumPy.
The models are in `gpt2_multi.pt`, `gpt2_multi.tf` and `gpt2_multi.flax`, whose names in transformers are here too: of
PyTorch `GPT2LMHeadModel`, of TensorFlow `TFGPT2LMHeadModel`, of Flax `FlaxGPT2LMHeadModel`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers read; `as` says that a name is given on
    from gpt2_multi.app.pipeline.pipeline import TextGenerationPipeline as TextGenerationPipeline
    from gpt2_multi.app.pipeline.pipeline import pipeline as pipeline
    from gpt2_multi.errors import CheckpointError as CheckpointError
    from gpt2_multi.errors import ConfigError as ConfigError
    from gpt2_multi.errors import GPT2Error as GPT2Error
    from gpt2_multi.errors import InputError as InputError
    from gpt2_multi.errors import LostError as LostError
    from gpt2_multi.errors import TokenizerError as TokenizerError
    from gpt2_multi.files.hub import GPT2_PRETRAINED_CONFIG_ARCHIVE_MAP as GPT2_PRETRAINED_CONFIG_ARCHIVE_MAP
    from gpt2_multi.files.hub import GPT2_PRETRAINED_MODEL_ARCHIVE_LIST as GPT2_PRETRAINED_MODEL_ARCHIVE_LIST
    from gpt2_multi.files.hub import GPT2_PRETRAINED_MODEL_ARCHIVE_MAP as GPT2_PRETRAINED_MODEL_ARCHIVE_MAP
    from gpt2_multi.files.hub import TF_GPT2_PRETRAINED_MODEL_ARCHIVE_LIST as TF_GPT2_PRETRAINED_MODEL_ARCHIVE_LIST
    from gpt2_multi.files.hub import TF_GPT2_PRETRAINED_MODEL_ARCHIVE_MAP as TF_GPT2_PRETRAINED_MODEL_ARCHIVE_MAP
    from gpt2_multi.flax import FlaxAutoModel as FlaxAutoModel
    from gpt2_multi.flax import FlaxAutoModelForCausalLM as FlaxAutoModelForCausalLM
    from gpt2_multi.flax import FlaxAutoModelForPreTraining as FlaxAutoModelForPreTraining
    from gpt2_multi.flax import FlaxAutoModelForQuestionAnswering as FlaxAutoModelForQuestionAnswering
    from gpt2_multi.flax import FlaxAutoModelForSequenceClassification as FlaxAutoModelForSequenceClassification
    from gpt2_multi.flax import FlaxAutoModelForTokenClassification as FlaxAutoModelForTokenClassification
    from gpt2_multi.flax import (
        FlaxBaseModelOutputWithPastAndCrossAttentions as FlaxBaseModelOutputWithPastAndCrossAttentions,
    )
    from gpt2_multi.flax import FlaxCausalLMOutputWithCrossAttentions as FlaxCausalLMOutputWithCrossAttentions
    from gpt2_multi.flax import FlaxGPT2DoubleHeadsModel as FlaxGPT2DoubleHeadsModel
    from gpt2_multi.flax import FlaxGPT2DoubleHeadsModelOutput as FlaxGPT2DoubleHeadsModelOutput
    from gpt2_multi.flax import FlaxGPT2ForQuestionAnswering as FlaxGPT2ForQuestionAnswering
    from gpt2_multi.flax import FlaxGPT2ForSequenceClassification as FlaxGPT2ForSequenceClassification
    from gpt2_multi.flax import FlaxGPT2ForTokenClassification as FlaxGPT2ForTokenClassification
    from gpt2_multi.flax import FlaxGPT2LMHeadModel as FlaxGPT2LMHeadModel
    from gpt2_multi.flax import FlaxGPT2Model as FlaxGPT2Model
    from gpt2_multi.flax import FlaxGPT2PreTrainedModel as FlaxGPT2PreTrainedModel
    from gpt2_multi.flax import FlaxQuestionAnsweringModelOutput as FlaxQuestionAnsweringModelOutput
    from gpt2_multi.flax import FlaxSequenceClassifierOutput as FlaxSequenceClassifierOutput
    from gpt2_multi.flax import FlaxTokenClassifierOutput as FlaxTokenClassifierOutput
    from gpt2_multi.generation.callbacks import LogitsProcessor as LogitsProcessor
    from gpt2_multi.generation.callbacks import LogitsProcessorList as LogitsProcessorList
    from gpt2_multi.generation.callbacks import StoppingCriteria as StoppingCriteria
    from gpt2_multi.generation.callbacks import StoppingCriteriaList as StoppingCriteriaList
    from gpt2_multi.generation.callbacks import TextIteratorStreamer as TextIteratorStreamer
    from gpt2_multi.generation.callbacks import TextStreamer as TextStreamer
    from gpt2_multi.generation.config import GenerationConfig as GenerationConfig
    from gpt2_multi.generation.request import set_seed as set_seed
    from gpt2_multi.generation.scoring import TextScore as TextScore
    from gpt2_multi.model.checkpoint.programs import BitsAndBytesConfig as BitsAndBytesConfig
    from gpt2_multi.model.config import AutoConfig as AutoConfig
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
    from gpt2_multi.pt import AutoModel as AutoModel
    from gpt2_multi.pt import AutoModelForCausalLM as AutoModelForCausalLM
    from gpt2_multi.pt import AutoModelForPreTraining as AutoModelForPreTraining
    from gpt2_multi.pt import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from gpt2_multi.pt import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from gpt2_multi.pt import AutoModelForTokenClassification as AutoModelForTokenClassification
    from gpt2_multi.pt import AutoModelWithLMHead as AutoModelWithLMHead
    from gpt2_multi.pt import GPT2DoubleHeadsModel as GPT2DoubleHeadsModel
    from gpt2_multi.pt import GPT2ForQuestionAnswering as GPT2ForQuestionAnswering
    from gpt2_multi.pt import GPT2ForSequenceClassification as GPT2ForSequenceClassification
    from gpt2_multi.pt import GPT2ForTokenClassification as GPT2ForTokenClassification
    from gpt2_multi.pt import GPT2LMHeadModel as GPT2LMHeadModel
    from gpt2_multi.pt import GPT2Model as GPT2Model
    from gpt2_multi.pt import GPT2PreTrainedModel as GPT2PreTrainedModel
    from gpt2_multi.pt import load_tf_weights_in_gpt2 as load_tf_weights_in_gpt2
    from gpt2_multi.tf import TFAutoModel as TFAutoModel
    from gpt2_multi.tf import TFAutoModelForCausalLM as TFAutoModelForCausalLM
    from gpt2_multi.tf import TFAutoModelForPreTraining as TFAutoModelForPreTraining
    from gpt2_multi.tf import TFAutoModelForQuestionAnswering as TFAutoModelForQuestionAnswering
    from gpt2_multi.tf import TFAutoModelForSequenceClassification as TFAutoModelForSequenceClassification
    from gpt2_multi.tf import TFAutoModelForTokenClassification as TFAutoModelForTokenClassification
    from gpt2_multi.tf import TFAutoModelWithLMHead as TFAutoModelWithLMHead
    from gpt2_multi.tf import TFBaseModelOutputWithPastAndCrossAttentions as TFBaseModelOutputWithPastAndCrossAttentions
    from gpt2_multi.tf import TFCausalLMOutputWithCrossAttentions as TFCausalLMOutputWithCrossAttentions
    from gpt2_multi.tf import TFGPT2DoubleHeadsModel as TFGPT2DoubleHeadsModel
    from gpt2_multi.tf import TFGPT2DoubleHeadsModelOutput as TFGPT2DoubleHeadsModelOutput
    from gpt2_multi.tf import TFGPT2ForQuestionAnswering as TFGPT2ForQuestionAnswering
    from gpt2_multi.tf import TFGPT2ForSequenceClassification as TFGPT2ForSequenceClassification
    from gpt2_multi.tf import TFGPT2ForTokenClassification as TFGPT2ForTokenClassification
    from gpt2_multi.tf import TFGPT2LMHeadModel as TFGPT2LMHeadModel
    from gpt2_multi.tf import TFGPT2MainLayer as TFGPT2MainLayer
    from gpt2_multi.tf import TFGPT2Model as TFGPT2Model
    from gpt2_multi.tf import TFGPT2PreTrainedModel as TFGPT2PreTrainedModel
    from gpt2_multi.tf import TFGPT2Tokenizer as TFGPT2Tokenizer
    from gpt2_multi.tf import TFQuestionAnsweringModelOutput as TFQuestionAnsweringModelOutput
    from gpt2_multi.tf import TFSequenceClassifierOutputWithPast as TFSequenceClassifierOutputWithPast
    from gpt2_multi.tf import TFTokenClassifierOutput as TFTokenClassifierOutput
    from gpt2_multi.tokenizer.encoding import BatchEncoding as BatchEncoding
    from gpt2_multi.tokenizer.fast import AutoTokenizer as AutoTokenizer
    from gpt2_multi.tokenizer.fast import GPT2TokenizerFast as GPT2TokenizerFast
    from gpt2_multi.tokenizer.files import AddedToken as AddedToken
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer as GPT2Tokenizer

__version__ = "0.1.0"
_ROOMS = {  # what each shows here; the packages of the frameworks show more
    "app.pipeline.pipeline": ("TextGenerationPipeline", "pipeline"),
    "errors": ("CheckpointError", "ConfigError", "GPT2Error", "InputError", "LostError", "TokenizerError"),
    "files.hub": (
        "GPT2_PRETRAINED_CONFIG_ARCHIVE_MAP",
        "GPT2_PRETRAINED_MODEL_ARCHIVE_LIST",
        "GPT2_PRETRAINED_MODEL_ARCHIVE_MAP",
        "TF_GPT2_PRETRAINED_MODEL_ARCHIVE_LIST",
        "TF_GPT2_PRETRAINED_MODEL_ARCHIVE_MAP",
    ),
    "flax": (
        "FlaxAutoModel",
        "FlaxAutoModelForCausalLM",
        "FlaxAutoModelForPreTraining",
        "FlaxAutoModelForQuestionAnswering",
        "FlaxAutoModelForSequenceClassification",
        "FlaxAutoModelForTokenClassification",
        "FlaxBaseModelOutputWithPastAndCrossAttentions",
        "FlaxCausalLMOutputWithCrossAttentions",
        "FlaxGPT2DoubleHeadsModel",
        "FlaxGPT2DoubleHeadsModelOutput",
        "FlaxGPT2ForQuestionAnswering",
        "FlaxGPT2ForSequenceClassification",
        "FlaxGPT2ForTokenClassification",
        "FlaxGPT2LMHeadModel",
        "FlaxGPT2Model",
        "FlaxGPT2PreTrainedModel",
        "FlaxQuestionAnsweringModelOutput",
        "FlaxSequenceClassifierOutput",
        "FlaxTokenClassifierOutput",
    ),
    "generation.callbacks": (
        "LogitsProcessor",
        "LogitsProcessorList",
        "StoppingCriteria",
        "StoppingCriteriaList",
        "TextIteratorStreamer",
        "TextStreamer",
    ),
    "generation.config": ("GenerationConfig",),
    "generation.request": ("set_seed",),
    "generation.scoring": ("TextScore",),
    "model.checkpoint.programs": ("BitsAndBytesConfig",),
    "model.config": ("AutoConfig", "GPT2Config"),
    "model.outputs": (
        "BaseModelOutputWithPastAndCrossAttentions",
        "CausalLMOutputWithCrossAttentions",
        "GPT2DoubleHeadsModelOutput",
        "GenerateOutput",
        "QuestionAnsweringModelOutput",
        "SequenceClassifierOutputWithPast",
        "TokenClassifierOutput",
    ),
    "pt": (
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelWithLMHead",
        "GPT2DoubleHeadsModel",
        "GPT2ForQuestionAnswering",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2LMHeadModel",
        "GPT2Model",
        "GPT2PreTrainedModel",
        "load_tf_weights_in_gpt2",
    ),
    "tf": (
        "TFAutoModel",
        "TFAutoModelForCausalLM",
        "TFAutoModelForPreTraining",
        "TFAutoModelForQuestionAnswering",
        "TFAutoModelForSequenceClassification",
        "TFAutoModelForTokenClassification",
        "TFAutoModelWithLMHead",
        "TFBaseModelOutputWithPastAndCrossAttentions",
        "TFCausalLMOutputWithCrossAttentions",
        "TFGPT2DoubleHeadsModel",
        "TFGPT2DoubleHeadsModelOutput",
        "TFGPT2ForQuestionAnswering",
        "TFGPT2ForSequenceClassification",
        "TFGPT2ForTokenClassification",
        "TFGPT2LMHeadModel",
        "TFGPT2MainLayer",
        "TFGPT2Model",
        "TFGPT2PreTrainedModel",
        "TFGPT2Tokenizer",
        "TFQuestionAnsweringModelOutput",
        "TFSequenceClassifierOutputWithPast",
        "TFTokenClassifierOutput",
    ),
    "tokenizer.encoding": ("BatchEncoding",),
    "tokenizer.fast": ("AutoTokenizer", "GPT2TokenizerFast"),
    "tokenizer.files": ("AddedToken",),
    "tokenizer.tokenizer": ("GPT2Tokenizer",),
}
_ROOM = {name: room for room, names in _ROOMS.items() for name in names}
# A star, and whoever walks through the names, gets those that need no framework.
__all__ = ["__version__", *(name for name, room in _ROOM.items() if room not in ("pt", "tf", "flax"))]

if not TYPE_CHECKING:  # to which a module with a __getattr__ has every name

    def __getattr__(name: str) -> Any:
        if name not in _ROOM:
            raise AttributeError(f"module 'gpt2_multi' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"gpt2_multi.{_ROOM[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
