"""GPT-2 for TensorFlow on Keras 3: the bare model and its five heads, under the names of transformers."""

try:
    import tensorflow as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('gpt2_multi.tf needs TensorFlow: pip install "gpt2-multi[tf]"') from error

import keras

if keras.config.backend() != "tensorflow":
    raise ImportError(
        f"gpt2_multi.tf needs Keras on TensorFlow, but Keras runs on {keras.config.backend()}: set the environment "
        'variable KERAS_BACKEND to "tensorflow" before Keras is imported, or unset it'
    )

from gpt2_multi.errors import GPT2Error
from gpt2_multi.model import outputs
from gpt2_multi.tf.attention import KVCache
from gpt2_multi.tf.fit.metrics import Perplexity
from gpt2_multi.tf.fit.optimizers import AdamW, CosineSchedule
from gpt2_multi.tf.heads import (
    TFGPT2DoubleHeadsModel,
    TFGPT2ForQuestionAnswering,
    TFGPT2ForSequenceClassification,
    TFGPT2ForTokenClassification,
    TFGPT2LMHeadModel,
)
from gpt2_multi.tf.loading import TFGPT2PreTrainedModel
from gpt2_multi.tf.model import TFGPT2Model
from gpt2_multi.tf.serve.tokenizer import TFGPT2Tokenizer
from gpt2_multi.tf.training import cosine_schedule

GPT2Error._keras_call_info_injected = True  # type: ignore[attr-defined]  # or Keras buries the sentence in a page
GPT2Error.ag_pass_through = True  # type: ignore[attr-defined]  # or AutoGraph raises a page of its own in its place

TFGPT2MainLayer = TFGPT2Model  # which is a layer, too
# There is one architecture, and so an Auto class is the class of its task.
TFAutoModel = TFGPT2Model
TFAutoModelForCausalLM = TFAutoModelForPreTraining = TFAutoModelWithLMHead = TFGPT2LMHeadModel
TFAutoModelForSequenceClassification = TFGPT2ForSequenceClassification
TFAutoModelForTokenClassification = TFGPT2ForTokenClassification
TFAutoModelForQuestionAnswering = TFGPT2ForQuestionAnswering
# transformers names outputs by framework; the classes hold any kind of array.
TFBaseModelOutputWithPastAndCrossAttentions = outputs.BaseModelOutputWithPastAndCrossAttentions
TFCausalLMOutputWithCrossAttentions = outputs.CausalLMOutputWithCrossAttentions
TFGPT2DoubleHeadsModelOutput = outputs.GPT2DoubleHeadsModelOutput
TFSequenceClassifierOutputWithPast = outputs.SequenceClassifierOutputWithPast
TFTokenClassifierOutput = outputs.TokenClassifierOutput
TFQuestionAnsweringModelOutput = outputs.QuestionAnsweringModelOutput

__all__ = [  # noqa: RUF022  the order of the other two packages
    "TFGPT2PreTrainedModel",
    "TFGPT2Model",
    "TFGPT2LMHeadModel",
    "TFGPT2DoubleHeadsModel",
    "TFGPT2ForSequenceClassification",
    "TFGPT2ForTokenClassification",
    "TFGPT2ForQuestionAnswering",
    "TFAutoModel",
    "TFAutoModelForCausalLM",
    "TFAutoModelForPreTraining",
    "TFAutoModelWithLMHead",
    "TFAutoModelForSequenceClassification",
    "TFAutoModelForTokenClassification",
    "TFAutoModelForQuestionAnswering",
    "TFBaseModelOutputWithPastAndCrossAttentions",
    "TFCausalLMOutputWithCrossAttentions",
    "TFGPT2DoubleHeadsModelOutput",
    "TFSequenceClassifierOutputWithPast",
    "TFTokenClassifierOutput",
    "TFQuestionAnsweringModelOutput",
    "KVCache",
    "TFGPT2MainLayer",
    "TFGPT2Tokenizer",
    "cosine_schedule",
    "AdamW",
    "CosineSchedule",
    "Perplexity",
]
