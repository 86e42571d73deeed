"""Attention: caches, biases and layers, and the kernels that compute runs of tokens."""

from gpt2_multi.pt.attention.attention import Attention as Attention
from gpt2_multi.pt.attention.attention import Borrowed as Borrowed
from gpt2_multi.pt.attention.attention import Context as Context
from gpt2_multi.pt.attention.attention import CrossAttention as CrossAttention
from gpt2_multi.pt.attention.attention import KVCache as KVCache
from gpt2_multi.pt.attention.attention import causal_bias as causal_bias
from gpt2_multi.pt.attention.attention import is_autocast as is_autocast
from gpt2_multi.pt.attention.attention import key_bias as key_bias
from gpt2_multi.pt.attention.attention import lowest as lowest
from gpt2_multi.pt.attention.attention import merge_heads as merge_heads
from gpt2_multi.pt.attention.attention import positions as positions
from gpt2_multi.pt.attention.attention import score_dtype as score_dtype
from gpt2_multi.pt.attention.attention import upcast as upcast
from gpt2_multi.pt.attention.attention import whole as whole
from gpt2_multi.pt.attention.kernels import FLASH as FLASH
from gpt2_multi.pt.attention.kernels import Kernel as Kernel
from gpt2_multi.pt.attention.kernels import begins as begins
from gpt2_multi.pt.attention.kernels import check_flash as check_flash
from gpt2_multi.pt.attention.kernels import check_implementation as check_implementation
from gpt2_multi.pt.attention.kernels import documents as documents
from gpt2_multi.pt.attention.kernels import kernel as kernel
from gpt2_multi.pt.attention.kernels import together as together
