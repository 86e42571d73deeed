"""Attention in Flax: the cache of keys and values, the biases that hide keys, self- and cross-attention.

Shapes: B batch, T length of this call, S keys (past included), H heads, D head width, E `n_embd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt2_multi.flax.layers import dense, is_concrete
from gpt2_multi.model.config import GPT2Config

Pair = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KVCache(Sequence[Pair]):
    """Room for the keys and values of `capacity` tokens: `cache[layer]` is a (key, value) pair, each (B, H, S, D).

    A pytree that never changes: a call returns the next one. `length`, () int32, says how many tokens are there; it is
    traced, so that a decode step compiles once. With scanned layers `layers` is one pair of (n_layer, B, H, S, D).
    """

    layers: Any
    cross: Any  # the encoder's keys and values, computed once, or None
    length: Array

    @classmethod
    def empty(cls, config: GPT2Config, batch: Any, capacity: int, dtype: Any, scan_layers: bool) -> KVCache:
        """A cache without tokens, with room for `capacity` of `batch` rows."""
        head_dim = config.n_embd // config.n_head
        shapes = [(batch, len(config.heads(i)), capacity, head_dim) for i in range(config.n_layer)]
        if scan_layers:
            whole = (config.n_layer, *shapes[0])
            return cls((jnp.zeros(whole, dtype), jnp.zeros(whole, dtype)), None, jnp.int32(0))
        return cls(tuple((jnp.zeros(s, dtype), jnp.zeros(s, dtype)) for s in shapes), None, jnp.int32(0))

    @staticmethod
    def extend(pair: Pair, key: Array, value: Array, start: Array | int) -> Pair:
        """A layer's pair with (B, H, T, D) keys and values from `start` on; XLA writes them in place where it may."""
        old_key, old_value = pair
        return write(old_key, key, start), write(old_value, value, start)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The (key, value) pair of each layer with all its room, each (B, H, capacity, D)."""
        return tuple(zip(*self.layers, strict=True)) if self.stacked else self.layers  # type: ignore[no-any-return]

    @property
    def stacked(self) -> bool:
        """Whether one pair holds all layers."""
        return isinstance(self.layers[0], jax.Array) or not isinstance(self.layers[0], tuple)

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return int((self.layers if self.stacked else self.layers[0])[0].shape[-2])

    def get_seq_length(self) -> int:
        """The number of tokens in the cache, where it is not traced."""
        return int(self.length)

    def reset(self) -> KVCache:
        """The cache without its tokens, with the same room."""
        return KVCache(self.layers, None, jnp.zeros_like(self.length))

    def __len__(self) -> int:
        return len(self.layers[0]) if self.stacked else len(self.layers)

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        key, value = (x[layer] for x in self.layers) if self.stacked else self.layers[layer]
        return key[:, :, : self.get_seq_length()], value[:, :, : self.get_seq_length()]

    def __iter__(self) -> Iterator[Pair]:
        return (self[layer] for layer in range(len(self)))


def as_cache(past: Any, new: int, stacked: bool) -> Any:
    """A (key, value) pair for each layer, each (B, H, S, D), as a cache with room for `new` tokens; others as it is."""
    if isinstance(past, KVCache) or not isinstance(past, (list, tuple)) or not past or not all(map(_is_pair, past)):
        return past
    more = [(0, 0), (0, 0), (0, new), (0, 0)]
    layers = tuple((jnp.pad(jnp.asarray(pair[0]), more), jnp.pad(jnp.asarray(pair[1]), more)) for pair in past)
    whole = tuple(map(jnp.stack, zip(*layers, strict=True))) if stacked else layers
    return KVCache(whole, None, jnp.int32(np.shape(past[0][0])[2]))


def _is_pair(layer: Any) -> bool:
    if isinstance(layer, (Array, np.ndarray)):  # as transformers stacked them until 2020
        return layer.ndim == 5 and len(layer) == 2
    parts = layer[:2] if isinstance(layer, (list, tuple)) else ()
    return len(parts) == 2 and all(isinstance(x, (Array, np.ndarray)) and x.ndim == 4 for x in parts)


def write(buffer: Array, new: Array, start: Array | int) -> Array:
    """Keys or values (B, H, S, D) with new ones (B, H, T, D) from the place `start` on.

    On a CPU XLA would merge the writing into all that reads a buffer, and copy it for each; a branch it leaves alone.
    """
    new = new.astype(buffer.dtype)

    def written(buffer: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(buffer, new, start, axis=2)

    is_merged = not is_concrete(start) and jax.default_backend() == "cpu"
    if not is_merged or jax.make_jaxpr(written)(buffer).out_avals != [jax.typeof(buffer)]:  # in the axes of shard_map
        return written(buffer)
    return lax.cond(start >= 0, written, lambda x: x, buffer)


class Context(NamedTuple):
    """What every block of one call shares; a bias is added to the scores."""

    bias: Array  # (B or 1, H or 1, T, S)
    start: Array | int = 0  # () int32, where the cache is written
    states: Any = None  # (B, encoder length, E), or None
    states_bias: Array | None = None  # (B, 1, 1, encoder length)


class Layer(NamedTuple):
    """What one block gets for itself; or what all of them get, a list or, for scanned layers, stacked arrays each."""

    scale: Any  # a number
    head_mask: Any = None  # (B or 1, H, T or 1, S or 1), or None
    past: Any = None  # a pair, or None
    cross: Any = None  # a pair, or None


class Attended(NamedTuple):
    """What attention gives: its output (B, T, E), its probabilities (B, H, T, S), and the keys and values."""

    output: Array
    probs: Array
    pair: Pair


def lowest(dtype: Any) -> float:
    """What hides a key: half the lowest finite value, so that adding a score to it stays finite in every dtype."""
    return float(jnp.finfo(dtype).min) / 2


def hiding(keep: Array, dtype: Any) -> Array:
    """A bias of the scores that hides what `keep` does not: booleans of any shape."""
    return jnp.where(keep, jnp.zeros((), dtype), jnp.asarray(lowest(dtype), dtype))


def key_bias(mask: Array, dtype: Any) -> Array:
    """A mask that is 1 where a key counts, as a bias of the scores: (B, S) -> (B, 1, 1, S)"""
    return hiding(mask[:, None, None, :].astype(bool), dtype)


def causal_bias(length: int, keys: int, past: Array | int, mask: Array | None, dtype: Any) -> Array:
    """The bias under which each query sees the keys up to its own that `mask` keeps: (B or 1, H or 1, T, S).

    mask: (B, S), or (B or 1, H or 1, T or 1, S) of booleans, integers (1 keeps) or floats (added to the scores).
    """
    query, key = (jnp.arange(size, dtype=jnp.int32) for size in (length, keys))
    keep = (key[None] <= past + query[:, None])[None, None]  # (1, 1, T, S)
    if mask is None:
        return hiding(keep, dtype)
    if mask.ndim == 4 and jnp.issubdtype(mask.dtype, jnp.floating):
        low = jnp.asarray(lowest(dtype), dtype)
        return jnp.where(keep, jnp.maximum(mask.astype(dtype), low), low)
    mask = mask if mask.ndim == 4 else mask[:, None, None, :]
    return hiding(keep & mask.astype(bool), dtype)


def positions(source: Array, mask: Array | None, past: Array | int) -> Array:
    """Each token's position: the count of unmasked tokens before it, (B, T); its index where no mask counts, (1, T)."""
    length = source.shape[1]
    if mask is None or mask.ndim != 2:
        return (past + jnp.arange(length, dtype=jnp.int32))[None]
    counts = jnp.maximum(jnp.cumsum(mask.astype(bool), axis=-1) - 1, 0)
    return lax.dynamic_slice_in_dim(counts, past, length, axis=1)


def split_heads(x: Array) -> Array:
    """(B, T, H, D) -> (B, H, T, D), or N of them, (B, T, N, H, D) -> (N, B, H, T, D)"""
    x = x.swapaxes(1, -2)
    return x if x.ndim == 4 else jnp.moveaxis(x, 2, 0)


def merge_heads(x: Array) -> Array:
    """(B, H, T, D) -> (B, T, H, D), which c_proj takes"""
    return x.swapaxes(1, 2)


def upcast(x: Array) -> Array:
    """At least float32: a sum over many tokens is beyond float16, and beyond bfloat16's precision."""
    return x.astype(np.promote_types(x.dtype, np.float32))


class BaseAttention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), and the projection after it."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    train: bool
    heads: int

    def attend(
        self, q: Array, pair: Pair, bias: Array | None, scale: Array | float, head_mask: Array | None
    ) -> Attended:
        """The output for queries (B, H, T, D) and keys and values (B, H, S, D) under a bias (B or 1, H or 1, T, S)."""
        k, v = pair
        if self.config.reorder_and_upcast_attn:
            q, k = upcast(q), upcast(k)
        scores = jnp.einsum("bhtd,bhsd->bhts", q * jnp.asarray(scale, q.dtype), k)
        scores = scores if bias is None else scores + bias.astype(scores.dtype)
        probs = nn.softmax(scores).astype(v.dtype)
        probs = nn.Dropout(self.config.attn_pdrop)(probs, deterministic=not self.train)
        probs = probs if head_mask is None else probs * head_mask
        x = dense(self, self.config.n_embd, "c_proj", axis=(-2, -1))(merge_heads(probs @ v))  # (B, T, E)
        return Attended(nn.Dropout(self.config.resid_pdrop)(x, deterministic=not self.train), probs, pair)


class Attention(BaseAttention):
    """Causal self-attention."""

    @nn.compact
    def __call__(self, x: Array, context: Context, layer: Layer) -> Attended:
        parts = (3, self.heads, self.config.n_embd // self.config.n_head)
        q, k, v = split_heads(dense(self, parts, "c_attn")(x))
        pair = (k, v) if layer.past is None else KVCache.extend(layer.past, k, v, context.start)
        return self.attend(q, pair, context.bias, layer.scale, layer.head_mask)


class CrossAttention(BaseAttention):
    """Attention of the decoder to an encoder's states."""

    @nn.compact
    def __call__(self, x: Array, context: Context, layer: Layer) -> Attended:
        parts = (self.heads, self.config.n_embd // self.config.n_head)
        q = split_heads(dense(self, parts, "q_attn")(x))
        return self.attend(q, self.encoded(context, layer), context.states_bias, layer.scale, None)

    def encoded(self, context: Context, layer: Layer) -> Pair:
        """The encoder's keys and values, of the cache where it has them."""
        if layer.cross is not None:
            return layer.cross  # type: ignore[no-any-return]
        parts = (2, self.heads, self.config.n_embd // self.config.n_head)
        k, v = split_heads(dense(self, parts, "c_attn")(context.states))
        return k, v
