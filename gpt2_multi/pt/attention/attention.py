"""Attention in PyTorch: the cache of keys and values, the biases that hide keys, self- and cross-attention.

Shapes: B batch, T length of this call, S keys (past included), H heads, D head width, E `n_embd`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt.attention.kernels import Kernel
from gpt2_multi.pt.layers import project, projection, replace_parameter

Pair = tuple[Tensor, Tensor]


class KVCache(Sequence[Pair]):
    """Keys and values of the tokens so far: `cache[layer]` is a (key, value) pair, each (B, H, S, D).

    A cache that a model returns never changes: passed back, it gives a new, longer one. A cache from `init_cache` has
    room for `max_length` tokens, is written in place, and is used again after `reset()`.
    """

    def __init__(
        self, layers: Sequence[Pair] = (), length: int = 0, preallocated: bool = False, trusted: bool = False
    ) -> None:
        self.layers = list(layers)
        self.cross: list[Pair] = []  # the encoder's keys and values, computed once
        self.length = length
        self.preallocated = preallocated
        self.trusted = trusted  # it is `generate`'s own: whatever is read into it was checked before

    @classmethod
    def empty(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, devices: Sequence[torch.device]) -> Self:
        """A preallocated cache: for each layer a shape (B, H, capacity, D) and a device."""
        places = list(zip(shapes, devices, strict=True))
        keys, values = ([torch.zeros(shape, dtype=dtype, device=at) for shape, at in places] for _ in range(2))
        return cls(list(zip(keys, values, strict=True)), preallocated=True)

    def fork(self) -> KVCache:
        """The cache that the next call may extend: this one, or a shallow copy where this one must not change.

        One of `generate`'s is copied although it is written in place, so that a forward may read the same tokens twice.
        """
        if self.preallocated and not self.trusted:
            return self
        copy = KVCache(self.layers, self.length, self.preallocated, self.trusted)
        copy.cross = list(self.cross)
        return copy

    def extend(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Append (B, H, T, D) keys and values to a layer and return all of its (B, H, S, D)."""
        if not self.preallocated:
            if layer < len(self.layers):
                key, value = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (key, value), strict=True))
            self.layers[layer : layer + 1] = [(key, value)]
            return key, value
        start, end, (keys, values) = self.length, self.length + key.shape[2], self.layers[layer]
        if self.trusted and not start and (keys.device, keys.dtype) != (key.device, key.dtype):
            # a wrapper has the layer computed elsewhere than its parameters are, or in another dtype
            keys, values = self.layers[layer] = key.new_zeros(keys.shape), key.new_zeros(values.shape)
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]

    @property
    def capacity(self) -> int | None:
        """How many tokens fit, or None for a cache that grows."""
        return self.layers[0][0].shape[2] if self.preallocated else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens in the cache, which is that of every layer."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """How many tokens fit, or -1 for a cache that grows."""
        return -1 if self.capacity is None else self.capacity

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens, or, where it is negative, all but the last so many; in place."""
        inputs.check_crop(max_length)
        self.length = max(0, self.length + max_length) if max_length < 0 else min(self.length, max_length)
        if not self.preallocated:
            self.layers = [(key[:, :, : self.length], value[:, :, : self.length]) for key, value in self.layers]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row so many times, one beside the other; in place."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only, by numbers or by booleans (B,); in place."""
        self._each(lambda x: x[indices.to(x.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row be the one that `beam_idx` (B,) names; in place."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for pairs in (self.layers, self.cross):
            pairs[:] = [(change(key), change(value)) for key, value in pairs]

    def returned(self) -> KVCache:
        """What the caller gets: itself."""
        return self

    def reset(self) -> None:
        """Forget the tokens and keep the room."""
        self.length = 0
        self.cross.clear()
        if not self.preallocated:
            self.layers.clear()

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        key, value = self.layers[layer]
        return key[:, :, : self.length], value[:, :, : self.length]

    def __iter__(self) -> Iterator[Pair]:
        return (self[layer] for layer in range(len(self)))


def _flatten(cache: KVCache) -> tuple[list[Any], tuple[int, bool, bool]]:
    return [cache.layers, cache.cross], (cache.length, cache.preallocated, cache.trusted)


def _unflatten(parts: Iterable[Any], context: tuple[int, bool, bool]) -> KVCache:
    layers, cross = parts
    cache = KVCache(layers, *context)
    cache.cross = list(cross)
    return cache


register_pytree_node(KVCache, _flatten, _unflatten, serialized_type_name="gpt2_multi.pt.KVCache")  # for torch.export


class Borrowed:
    """A cache of another library, such as transformers' DynamicCache, for one call: it stores keys by its own `update`.

    Known by what can be asked of it: `update` and `get_seq_length`. One with a `cross_attention_cache` keeps the
    encoder's keys and values too.
    """

    preallocated = trusted = False

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.own = getattr(cache, "self_attention_cache", cache)
        self.encoder = getattr(cache, "cross_attention_cache", None)
        self.length = int(self.own.get_seq_length())
        self.layers = stored(self.own)
        self.cross = stored(self.encoder) if any(getattr(cache, "is_updated", {}).values()) else []
        self.known = len(self.cross)  # of them, how many layers the encoder's cache has already

    @property
    def capacity(self) -> int | None:
        """How many tokens fit, or None for a cache that grows or does not say."""
        longest = getattr(self.own, "get_max_cache_shape", getattr(self.own, "get_max_length", lambda layer: None))(0)
        return None if longest is None or longest < 0 else int(longest)

    def fork(self) -> Borrowed:
        """Itself: whoever made it reads it again after the call, as transformers does."""
        return self

    def extend(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Append (B, H, T, D) keys and values to a layer and return all of its (B, H, S, D)."""
        end = self.length + key.shape[2]
        places = {"cache_position": torch.arange(self.length, end, device=key.device)}
        keys, values = self.own.update(key, value, layer, places)
        return keys[:, :, :end], values[:, :, :end]  # of a static one, what is filled

    def __iter__(self) -> Iterator[Pair]:
        return ((key[:, :, : self.length], value[:, :, : self.length]) for key, value in self.layers)

    def copied(self) -> KVCache:
        """A cache of ours with the same tokens."""
        copy = KVCache(list(self), self.length)
        copy.cross = list(self.cross)
        return copy

    def returned(self) -> Any:
        """What the caller gave, with what this call read in it."""
        if self.encoder is not None:
            for layer, (key, value) in enumerate(self.cross[self.known :], self.known):
                self.encoder.update(key, value, layer)
                self.cache.is_updated[layer] = True
        return self.cache


def stored(cache: Any) -> list[Pair]:
    """The (key, value) of each layer, (B, H, S, D) each, that a cache of transformers has by now, old or new."""
    if hasattr(cache, "layers"):
        pairs: Any = ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers)
    else:
        pairs = zip(getattr(cache, "key_cache", ()), getattr(cache, "value_cache", ()), strict=True)
    return [(key, value) for key, value in pairs if isinstance(key, Tensor) and key.dim() == 4]


@dataclass
class Context:
    """What every block of one call shares. A bias is added to the scores; None means plainly causal."""

    bias: Tensor | None = None  # (B or 1, H or 1, T, S)
    cache: KVCache | Borrowed | None = None
    eager: bool = False
    kernel: Kernel | None = None  # what computes self-attention by runs of tokens, where something does
    states: Tensor | None = None  # (B, encoder length, E)
    states_bias: Tensor | None = None  # (B, 1, 1, encoder length)
    hidden: list[Tensor] | None = None  # lists to fill with what the caller wants to see
    probs: list[Tensor] | None = None
    cross_probs: list[Tensor] | None = None


class Attended(NamedTuple):
    """What attention gives: its output (B, T, E), and its probabilities (B, H, T, S) where they were computed."""

    output: Tensor
    probs: Tensor | None


def lowest(dtype: torch.dtype) -> float:
    """What hides a key: half the lowest finite value, so that adding a score to it stays finite in every dtype."""
    return torch.finfo(dtype).min / 2


def score_dtype(x: Tensor) -> torch.dtype:
    """What scores of `x` are computed in: its dtype, or autocast's, in which another dtype's bias would be infinite."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast chooses what is computed where `x` is; of "meta" one may not ask."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def key_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is 1 where a key counts, as a bias of the scores: (B, S) -> (B, 1, 1, S)"""
    hidden = mask[:, None, None, :] == 0
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, lowest(dtype))


def causal_bias(length: int, keys: int, mask: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias under which each query sees the keys up to its own that `mask` keeps: (B or 1, H or 1, T, S).

    mask: (B, S), or (B or 1, H or 1, T or 1, S) of booleans, integers (1 keeps) or floats (added to the scores).
    """
    keep = torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)[None, None]  # (1, 1, T, S)
    bias = torch.zeros((), dtype=dtype, device=device)
    if mask is not None and mask.dim() == 4 and mask.is_floating_point():
        bias = mask.to(dtype).clamp(min=lowest(dtype))
    elif mask is not None:
        keep = keep & (mask if mask.dim() == 4 else mask[:, None, None, :]).bool()
    return torch.where(keep, bias, lowest(dtype))


def positions(source: Tensor, mask: Tensor | None, past: int) -> Tensor:
    """Each token's position: the count of unmasked tokens before it, (B, T); its index where no mask counts, (1, T)."""
    length = source.shape[1]
    if mask is None or mask.dim() != 2:
        return torch.arange(past, past + length, device=source.device)[None]
    return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def whole(name: str, x: Tensor, width: int) -> Tensor:
    """What a layer gives, all `width` columns of it: (..., width) -> (..., width); InputError where it gives a part.

    So it is where DTensor splits a layer by columns. Of c_attn, a part would take queries for keys.
    """
    if (x.shape[-1] == width) is False:  # traced, a comparison of sizes is no bool
        raise InputError(
            f"{name}: expected {width} columns, found {x.shape[-1]}, as where parallelize_module splits it by columns; "
            "leave it out, or give it ColwiseParallel(output_layouts=Replicate())"
        )
    return x


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(2)


def upcast(x: Tensor) -> Tensor:
    """At least float32: a sum over many tokens is beyond float16, and beyond bfloat16's precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class BaseAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) under every switch of the configuration."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.embed_dim = self.split_size = config.n_embd  # the second, and the heads, are fewer where heads are cut
        self.num_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.scale_attn_weights = config.scale_attn_weights
        self.scale = config.score_scale(layer)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, eager: bool, head_mask: Tensor | None
    ) -> Attended:
        dropout, is_upcast = self.config.attn_pdrop if self.training else 0.0, self.config.reorder_and_upcast_attn
        if not (eager or head_mask is not None or is_upcast):
            if bias is not None or q.shape[2] == 1:  # an `if`: compiled or traced, a comparison of sizes is no bool
                causal = False
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal, scale=self.scale
            )
            return Attended(merge_heads(x), None)
        if is_upcast:
            q, k = upcast(q), upcast(k)
        scores = (q * self.scale) @ k.mT  # (B, H, T, S)
        if bias is None and causal:
            bias = causal_bias(q.shape[2], k.shape[2], None, scores.dtype, scores.device)
        probs = F.softmax(scores if bias is None else scores + bias, dim=-1).to(v.dtype)
        probs = F.dropout(probs, dropout)
        probs = probs if head_mask is None else probs * head_mask
        return Attended(merge_heads(probs @ v), probs)


class Attention(BaseAttention):
    """Causal self-attention."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.present = config.heads(layer)
        self.num_heads = len(self.present)
        self.split_size = self.head_dim * self.num_heads
        self.c_attn = projection(config, config.n_embd, 3 * self.split_size)
        self.c_proj = projection(config, self.split_size, config.n_embd)

    def forward(self, x: Tensor, context: Context, head_mask: Tensor | None) -> Attended:
        qkv = whole("attn.c_attn", project(self.c_attn, x), 3 * self.split_size)
        q, k, v = (split_heads(t, self.head_dim) for t in qkv.chunk(3, dim=-1))
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        if context.kernel is not None:
            dropout = self.config.attn_pdrop if self.training else 0.0
            x, probs = merge_heads(context.kernel(q, k, v, dropout, self.scale)), None
        else:
            x, probs = self.attend(q, k, v, context.bias, True, context.eager, head_mask)
        return Attended(self.resid_dropout(project(self.c_proj, x)), probs)

    @torch.no_grad()
    def prune(self, heads: Iterable[int]) -> None:
        """Cut these heads away, numbered as in the whole model; those that are gone already do not count."""
        left = [head for head in self.present if head not in set(heads)]
        columns = [self.present.index(head) * self.head_dim + d for head in left for d in range(self.head_dim)]
        kept = torch.tensor(columns, device=self.c_proj.weight.device)
        every = torch.cat([kept + part * self.c_proj.in_features for part in range(3)])  # of queries, keys and values
        replace_parameter(self.c_attn, "weight", self.c_attn.weight[every])
        replace_parameter(self.c_attn, "bias", self.c_attn.bias[every])
        replace_parameter(self.c_proj, "weight", self.c_proj.weight[:, kept])
        self.c_attn.out_features, self.c_proj.in_features, self.present = len(every), len(kept), left
        self.num_heads, self.split_size = len(left), len(kept)


class CrossAttention(BaseAttention):
    """Attention of the decoder to an encoder's states."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.q_attn = projection(config, config.n_embd, config.n_embd)
        self.c_attn = projection(config, config.n_embd, 2 * config.n_embd)
        self.c_proj = projection(config, config.n_embd, config.n_embd)

    def forward(self, x: Tensor, context: Context) -> Attended:
        q = split_heads(whole("crossattention.q_attn", project(self.q_attn, x), self.split_size), self.head_dim)
        k, v = self.encoded(context)
        x, probs = self.attend(q, k, v, context.states_bias, False, context.eager, None)
        return Attended(self.resid_dropout(project(self.c_proj, x)), probs)

    def encoded(self, context: Context) -> Pair:
        cached = context.cache.cross if context.cache is not None else []
        if self.layer < len(cached):
            return cached[self.layer]
        kv = whole("crossattention.c_attn", project(self.c_attn, context.states), 2 * self.split_size)
        k, v = (split_heads(t, self.head_dim) for t in kv.chunk(2, dim=-1))
        cached.append((k, v))
        return k, v
