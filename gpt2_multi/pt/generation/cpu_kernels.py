"""Steps of few tokens on a CPU: a block in a dozen calls, by oneDNN's products, with weights packed where that pays.

Only where nobody would see the difference: every module is one of ours or PyTorch's, as it was made, without hooks, in
float32, int8 or bfloat16. oneDNN is quicker at weights in an order of its own, into which `packing` copies them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gpt2_multi.pt.attention import Attention, CrossAttention, KVCache, positions
from gpt2_multi.pt.generation.packing import Loan
from gpt2_multi.pt.layers import (
    HAS_ONEDNN,
    WORTHWHILE,
    QuantizedEmbedding,
    QuantizedLinear,
    is_plain,
    is_unchanged,
    multiplies_int8,
)
from gpt2_multi.pt.model import ACTIVATIONS, MLP, GPT2Block, GPT2Model

Product = Callable[[Tensor, Tensor | None], Tensor]  # (..., in) and what is added to the product, (..., out)
Class = TypeVar("Class", bound=type)

FUSED: dict[Any, tuple[str, list[Any], str]] = {  # activations that oneDNN computes on the way
    ACTIVATIONS["tanh_gelu"]: ("gelu", [], "tanh"),
    ACTIVATIONS["gelu"]: ("gelu", [], "none"),
    ACTIVATIONS["relu"]: ("relu", [], ""),
    None: ("none", [], ""),
}
_MADE_BY = ("__init__", "__setstate__")
_KNOWN: dict[type, dict[str, Any]] = {}  # what each class consists of
_CALLED = set(vars(object)) - set(_MADE_BY)  # the names of all that


def known(cls: Class) -> Class:
    """Remember a class as it is now: what its modules do may be done in another way, as long as it stays so."""
    for base in cls.__mro__[:-1]:
        _KNOWN[base] = functions(base)
        _CALLED.update(_KNOWN[base])
    return cls


def functions(cls: type) -> dict[str, Any]:
    """What a class does, by its own methods; torch.compile replaces those by which modules are made, of all of them."""
    return {name: value for name, value in vars(cls).items() if callable(value) and name not in _MADE_BY}


_PARTS: list[type] = [nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList]
_PARTS += [QuantizedLinear, QuantizedEmbedding]
for _cls in [*_PARTS, GPT2Model, GPT2Block, Attention, CrossAttention, MLP, KVCache]:
    known(_cls)
_PLACES: dict[str, type] = {  # what calls a part by its name may take it for
    **dict.fromkeys(("c_attn", "q_attn", "c_proj", "c_fc", "lm_head"), nn.Linear),
    **dict.fromkeys(("ln_1", "ln_cross_attn", "ln_2", "ln_f"), nn.LayerNorm),
    **dict.fromkeys(("drop", "resid_dropout", "dropout"), nn.Dropout),
    **{"wte": nn.Embedding, "wpe": nn.Embedding, "attn": Attention, "crossattention": CrossAttention, "mlp": MLP},
}


class Block(NamedTuple):
    """What a block calls, and by which numbers it splits and scales."""

    ln_1: Callable[[Tensor], Tensor]
    c_attn: Product
    heads: tuple[int, int]  # H, D
    scale: float
    attn_proj: Product
    ln_2: Callable[[Tensor], Tensor]
    c_fc: Product
    mlp_proj: Product

    @classmethod
    def of(cls, block: Any, loan: Loan | None) -> Block:
        """The calls of one of the model's blocks."""
        attn, mlp = block.attn, block.mlp
        return cls(
            norm_of(block.ln_1), product_of(attn.c_attn, loan), (attn.num_heads, attn.head_dim), attn.scale,
            product_of(attn.c_proj, loan), norm_of(block.ln_2), product_of(mlp.c_fc, loan, mlp.act),
            product_of(mlp.c_proj, loan),
        )  # fmt: skip

    def read(self, x: Tensor, layer: int, cache: KVCache, bias: Tensor | None) -> Tensor:
        """(R, T, E) -> (R, T, E), whose keys and values are in the cache from now on."""
        qkv = self.c_attn(self.ln_1(x), None).view(*x.shape[:2], 3, *self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (R, H, T, D)
        k, v = cache.extend(layer, k, v)
        x = self.attn_proj(attended(q, k, v, bias, self.scale), x)
        return self.mlp_proj(self.c_fc(self.ln_2(x), None), x)


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(R, H, T, D), keys and values (R, H, S, D) and a bias of scores -> (R, T, E)

    Of one token in each of several rows by a call for all heads, each of which is little for SDPA's own products.
    """
    rows, heads, length, size = q.shape
    if length > 1 or rows == 1 or bias is None or bias.shape[1] > 1 or q.dtype != torch.float32:
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return a.transpose(1, 2).flatten(2)
    added = bias.expand(rows, heads, 1, -1).reshape(rows * heads, 1, -1)
    scores = torch.baddbmm(added, q.reshape(-1, 1, size), k.flatten(0, 1).mT, alpha=scale)  # (R * H, 1, S)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(rows, 1, -1)


class Kernels(NamedTuple):
    """What a step of decoding multiplies by."""

    body: Any
    blocks: list[Block]
    ln_f: Callable[[Tensor], Tensor]
    head: Product
    loan: Loan | None  # of the weights that are packed

    @classmethod
    def of(cls, model: Any, loan: Loan | None) -> Kernels:
        """A model's."""
        body = model.transformer
        blocks = [Block.of(block, loan) for block in body.h]
        return cls(body, blocks, norm_of(body.ln_f), product_of(model.lm_head, loan), loan)

    def read(self, tokens: Tensor, cache: KVCache, mask: Tensor | None, count: int) -> Tensor:
        """The logits after the last `count` of tokens (R, T), which follow those in a cache: (R, count, V)"""
        x = self.body.embed(tokens, positions(tokens, mask, cache.length))
        bias = self.body._context(x, cache, mask, None, None).bias
        return self.head(self.ln_f(self.store(x, cache, bias)[:, -count:]), None)

    def store(self, x: Tensor, cache: KVCache, bias: Tensor | None) -> Tensor:
        """What the blocks make of the first one's input, whose keys and values are in a cache from now on: (R, T, E)"""
        for layer, block in enumerate(self.blocks):
            x = block.read(x, layer, cache, bias)
        cache.length += x.shape[1]
        return x

    def step(self, tokens: Tensor, places: Tensor, cache: KVCache, bias: Tensor | None) -> Tensor:
        """`read` of one token of each row, whose positions (R, 1) and bias of scores (R, 1, 1, S) are known: (R, V)"""
        return self.head(self.ln_f(self.store(self.body.embed(tokens, places), cache, bias)[:, -1]), None)


def norm_of(layer: Any) -> Callable[[Tensor], Tensor]:
    """What nn.LayerNorm calls."""
    return lambda x: F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def product_of(layer: Any, loan: Loan | None, act: Any = None) -> Product:
    """What a projection calls, with an activation after it: where there is much to do, by oneDNN."""
    if isinstance(layer, QuantizedLinear):
        return quantized_product_of(layer, loan, act)
    bias, fused, op = layer.bias, FUSED.get(act), torch.ops.mkldnn._linear_pointwise
    weight = layer.weight if loan is None else loan.packed(layer)

    def product(x: Tensor, added: Tensor | None) -> Tensor:
        if x.numel() * layer.out_features < WORTHWHILE:
            found = F.linear(x, layer.weight, bias)
            return added + found if added is not None else act(found) if act else found
        if added is not None:
            return op.binary(x, added, weight, bias, "add")
        return op.default(x, weight, bias, *fused) if fused else act(op.default(x, weight, bias, *FUSED[None]))

    return product


def quantized_product_of(layer: QuantizedLinear, loan: Loan | None, act: Any) -> Product:
    """The same of a layer in int8."""
    weight = None if loan is None or not multiplies_int8() else loan.packed(layer)

    def product(x: Tensor, added: Tensor | None) -> Tensor:
        y = layer.multiply(x, weight) if multiplies_int8() else layer.product(x)
        y = y if act is None else act(y)
        return y if added is None else y.add_(added)

    return product


def is_read(x: Tensor) -> bool:
    """Whether numbers on a CPU are computed with as they are, and oneDNN is there for them."""
    if x.dtype != torch.bfloat16:
        return is_plain(x)
    if not (HAS_ONEDNN and x.is_cpu and torch.backends.mkldnn.enabled) or torch.is_autocast_enabled("cpu"):
        return False
    return is_unchanged(x) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_ordinary(x: Any) -> bool:
    """Whether a parameter is of a dtype for oneDNN, on a CPU, in the order of rows or of columns, or is none."""
    if x is None:
        return True
    is_there = type(x) is nn.Parameter and x.is_cpu and x.layout is torch.strided
    if not is_there or x.dtype not in (torch.float32, torch.bfloat16, torch.int8) or not x.numel():
        return False
    return x.is_contiguous() or x.mT.is_contiguous()


def is_own(
    model: Any, is_read: Callable[[Any], bool] = is_read, is_ordinary: Callable[[Any], bool] = is_ordinary
) -> bool:
    """Whether nothing but code of this package and of PyTorch would run in a call, so that it may run in another way.

    No subclass, no hook, no layer or method that was replaced, no adapter, no recording and no dropout. The functions
    say whether one of its tensors is computed with as it is, and whether a parameter can be read.
    """
    body = getattr(model, "transformer", None)
    if torch.is_grad_enabled() or type(body) is not GPT2Model or type(body.wpe) is not nn.Embedding:
        return False
    if not is_read(body.wpe.weight.detach()):
        return False
    if body.attn_implementation != "sdpa" or body.config.reorder_and_upcast_attn:
        return False
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    dtype = body.wpe.weight.dtype
    are_as_made = all(is_as_made(module, is_ordinary, dtype) for module in model.modules())
    return are_as_made and all(map(is_as_known, _KNOWN)) and are_in_order(body)


def is_as_known(cls: type) -> bool:
    """Whether a class does what it did; another library may have given it methods that nothing here calls."""
    found = functions(cls)
    return {name: found[name] for name in found if name in _CALLED} == _KNOWN[cls]


def is_as_made(module: nn.Module, is_ordinary: Callable[[Any], bool], dtype: torch.dtype) -> bool:
    """Whether a module is of a class that is known, with parameters that can be read, and nobody has changed it."""
    kind, own = type(module), vars(module)
    if kind not in _KNOWN or module.training or own.get("_compiled_call_impl"):
        return False
    if own.get("compute_dtype") not in (None, dtype):  # parameters are to be computed with in another one
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(own[name] for name in hooks) or any(callable(getattr(kind, name, None)) for name in own):
        return False
    if own["_buffers"] or any(isinstance(value, Tensor) for value in own.values()) or own.get("max_norm") is not None:
        return False  # a weight that is computed, or changed by each call
    if not all(isinstance(part, _PLACES.get(name, object)) for name, part in own["_modules"].items()):
        return False
    found = own["_parameters"].values()
    return all(is_ordinary(x) and (x is None or x.dtype in (dtype, torch.int8)) for x in found)


def are_in_order(body: Any) -> bool:
    """Whether every block is there once, and its projection is as wide as its heads."""
    attns = [block.attn for block in body.h]
    return all(
        attn.layer == layer and attn.c_attn.weight.shape[0] == 3 * attn.split_size for layer, attn in enumerate(attns)
    )
