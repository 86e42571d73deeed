"""GPT-2 for JAX in Flax linen: the bare model and its five heads, as modules and under the names of transformers."""

try:
    import flax as _flax  # noqa: F401
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('gpt2_multi.flax needs JAX and Flax: pip install "gpt2-multi[flax]"') from error

from gpt2_multi.flax.attention import KVCache
from gpt2_multi.flax.heads import (
    FlaxGPT2DoubleHeadsModel,
    FlaxGPT2ForQuestionAnswering,
    FlaxGPT2ForSequenceClassification,
    FlaxGPT2ForTokenClassification,
    FlaxGPT2LMHeadModel,
    GPT2DoubleHeadsModule,
    GPT2ForQuestionAnsweringModule,
    GPT2ForSequenceClassificationModule,
    GPT2ForTokenClassificationModule,
    GPT2LMHeadModule,
)
from gpt2_multi.flax.loading import FlaxGPT2PreTrainedModel
from gpt2_multi.flax.model import FlaxGPT2Model, GPT2Module
from gpt2_multi.flax.training.losses import cosine_rate, cosine_schedule, decay_mask, optimizer
from gpt2_multi.flax.training.state import TrainState, create_train_state, eval_step, train_step

__all__ = [  # noqa: RUF022  the order of the other two packages
    "FlaxGPT2PreTrainedModel",
    "FlaxGPT2Model",
    "FlaxGPT2LMHeadModel",
    "FlaxGPT2DoubleHeadsModel",
    "FlaxGPT2ForSequenceClassification",
    "FlaxGPT2ForTokenClassification",
    "FlaxGPT2ForQuestionAnswering",
    "GPT2Module",
    "GPT2LMHeadModule",
    "GPT2DoubleHeadsModule",
    "GPT2ForSequenceClassificationModule",
    "GPT2ForTokenClassificationModule",
    "GPT2ForQuestionAnsweringModule",
    "KVCache",
    "cosine_schedule",
    "cosine_rate",
    "decay_mask",
    "optimizer",
    "TrainState",
    "create_train_state",
    "train_step",
    "eval_step",
]
