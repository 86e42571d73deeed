"""GPT-2 for PyTorch: the bare model and its five heads, under the names of transformers."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('gpt2_multi.pt needs PyTorch: pip install "gpt2-multi[pt]"') from error

from gpt2_multi.pt.attention import KVCache
from gpt2_multi.pt.heads import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)
from gpt2_multi.pt.loading import GPT2PreTrainedModel
from gpt2_multi.pt.model import GPT2Model
from gpt2_multi.pt.parameters.filling import load_tf_weights_in_gpt2
from gpt2_multi.pt.training import cosine_schedule, parameter_groups, train_step

# There is one architecture, and so an Auto class is the class of its task.
AutoModel = GPT2Model
AutoModelForCausalLM = AutoModelForPreTraining = AutoModelWithLMHead = GPT2LMHeadModel
AutoModelForSequenceClassification = GPT2ForSequenceClassification
AutoModelForTokenClassification = GPT2ForTokenClassification
AutoModelForQuestionAnswering = GPT2ForQuestionAnswering

__all__ = [  # noqa: RUF022  the order of the other two packages
    "GPT2PreTrainedModel",
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForPreTraining",
    "AutoModelWithLMHead",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "KVCache",
    "load_tf_weights_in_gpt2",
    "cosine_schedule",
    "parameter_groups",
    "train_step",
]
