"""GPT-2 for JAX in Flax linen: the bare model and its five heads, as modules and under the names of transformers."""

try:
    import flax as _flax  # noqa: F401
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('gpt2_multi.flax needs JAX and Flax: pip install "gpt2-multi[flax]"') from error

from gpt2_multi.flax.attention import KVCache
from gpt2_multi.flax.classes import (
    FlaxGPT2DoubleHeadsModel,
    FlaxGPT2ForQuestionAnswering,
    FlaxGPT2ForSequenceClassification,
    FlaxGPT2ForTokenClassification,
    FlaxGPT2LMHeadModel,
    FlaxGPT2Model,
)
from gpt2_multi.flax.heads import (
    GPT2DoubleHeadsModule,
    GPT2ForQuestionAnsweringModule,
    GPT2ForSequenceClassificationModule,
    GPT2ForTokenClassificationModule,
    GPT2LMHeadModule,
)
from gpt2_multi.flax.loading import FlaxGPT2PreTrainedModel
from gpt2_multi.flax.model import GPT2Module
from gpt2_multi.flax.training.losses import cosine_schedule
from gpt2_multi.flax.training.optimizers import cosine_rate, decay_mask, optimizer
from gpt2_multi.flax.training.state import TrainState, create_train_state, eval_step, train_step
from gpt2_multi.model import outputs

# There is one architecture, and so an Auto class is the class of its task.
FlaxAutoModel = FlaxGPT2Model
FlaxAutoModelForCausalLM = FlaxAutoModelForPreTraining = FlaxGPT2LMHeadModel
FlaxAutoModelForSequenceClassification = FlaxGPT2ForSequenceClassification
FlaxAutoModelForTokenClassification = FlaxGPT2ForTokenClassification
FlaxAutoModelForQuestionAnswering = FlaxGPT2ForQuestionAnswering
# transformers names outputs by framework; the classes hold any kind of array.
FlaxBaseModelOutputWithPastAndCrossAttentions = outputs.BaseModelOutputWithPastAndCrossAttentions
FlaxCausalLMOutputWithCrossAttentions = outputs.CausalLMOutputWithCrossAttentions
FlaxGPT2DoubleHeadsModelOutput = outputs.GPT2DoubleHeadsModelOutput
FlaxSequenceClassifierOutput = outputs.SequenceClassifierOutputWithPast
FlaxTokenClassifierOutput = outputs.TokenClassifierOutput
FlaxQuestionAnsweringModelOutput = outputs.QuestionAnsweringModelOutput

__all__ = [  # noqa: RUF022  the order of the other two packages
    "FlaxGPT2PreTrainedModel",
    "FlaxGPT2Model",
    "FlaxGPT2LMHeadModel",
    "FlaxGPT2DoubleHeadsModel",
    "FlaxGPT2ForSequenceClassification",
    "FlaxGPT2ForTokenClassification",
    "FlaxGPT2ForQuestionAnswering",
    "FlaxAutoModel",
    "FlaxAutoModelForCausalLM",
    "FlaxAutoModelForPreTraining",
    "FlaxAutoModelForSequenceClassification",
    "FlaxAutoModelForTokenClassification",
    "FlaxAutoModelForQuestionAnswering",
    "FlaxBaseModelOutputWithPastAndCrossAttentions",
    "FlaxCausalLMOutputWithCrossAttentions",
    "FlaxGPT2DoubleHeadsModelOutput",
    "FlaxSequenceClassifierOutput",
    "FlaxTokenClassifierOutput",
    "FlaxQuestionAnsweringModelOutput",
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
