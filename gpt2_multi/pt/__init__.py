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
from gpt2_multi.pt.loading import load_tf_weights_in_gpt2
from gpt2_multi.pt.model import GPT2Model

__all__ = [
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "KVCache",
    "load_tf_weights_in_gpt2",
]
