"""Attention in TensorFlow: the cache of keys and values, the biases that hide keys, self- and cross-attention.

Shapes: B batch, T length of this call, S keys (past included), H heads, D head width, E `n_embd`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf.layers import known, projection, register, replace_variable, sizes

Pair = tuple[tf.Tensor, tf.Tensor]


@register
@dataclass(frozen=True)
class KVCache(Sequence[Pair]):
    """Keys and values of the tokens so far: `cache[layer]` is a (key, value) pair, each (B, H, S, D).

    A cache never changes: passed back, it gives the next one, so that it can be a loop variable of `tf.while_loop`. The
    ones that a model returns grow; one from `init_cache` has room for `max_length` tokens, of which `filled` are there.
    """

    layers: tuple[Pair, ...] = ()
    cross: tuple[Pair, ...] = ()  # the encoder's keys and values, computed once
    filled: tf.Tensor | None = None  # () int32 in a preallocated cache; None in one that grows

    @classmethod
    def empty(cls, shapes: Sequence[Sequence[Any]], dtype: Any) -> KVCache:
        """A preallocated cache for layers of these shapes, (B, H, capacity, D)."""
        layers = tuple((tf.zeros(shape, dtype), tf.zeros(shape, dtype)) for shape in shapes)
        return cls(layers, filled=tf.constant(0))

    def extend(self, layer: int, key: tf.Tensor, value: tf.Tensor) -> Pair:
        """All keys and values of a layer, (B, H, S, D), after these (B, H, T, D): what the next cache holds of it."""
        if not self.layers:
            return key, value
        old_key, old_value = self.layers[layer]
        if self.filled is None:
            return tf.concat([old_key, key], 2), tf.concat([old_value, value], 2)
        return write(old_key, key, self.filled), write(old_value, value, self.filled)

    def spread(self, rows: int, room: Any) -> KVCache:
        """A preallocated cache with each row so many times, and room for so many tokens more."""

        def several(x: tf.Tensor, room: Any) -> tf.Tensor:
            return tf.pad(x if rows == 1 else tf.repeat(x, rows, axis=0), [(0, 0), (0, 0), (0, room), (0, 0)])

        layers = tuple((several(key, room), several(value, room)) for key, value in self.layers)
        cross = tuple((several(key, 0), several(value, 0)) for key, value in self.cross)
        return KVCache(layers, cross, tf.convert_to_tensor(self.length))

    def flat(self) -> KVCache:
        """With rows and heads as one axis, (B * H, S, D): in a loop XLA writes that in place, and others it copies."""
        return replace(self, layers=tuple((flat(key), flat(value)) for key, value in self.layers))

    def of_rows(self, rows: Any) -> KVCache:
        """A flat cache of so many rows as others are."""
        return replace(self, layers=tuple((of_rows(key, rows), of_rows(value, rows)) for key, value in self.layers))

    @property
    def is_flat(self) -> bool:
        """Whether rows and heads are one axis."""
        return self.filled is not None and self.layers[0][0].shape.rank == 3

    @property
    def length(self) -> Any:
        """The number of tokens in the cache: an int where it is known, a tensor () otherwise."""
        if self.filled is not None:
            return known(self.filled)
        return sizes(self.layers[0][0])[2] if self.layers else 0

    @property
    def capacity(self) -> Any:
        """How many tokens fit, or None for a cache that grows."""
        return None if self.filled is None else sizes(self.layers[0][0])[-2]

    def get_seq_length(self) -> Any:
        """The number of tokens in the cache."""
        return self.length

    def reset(self) -> KVCache:
        """The cache without its tokens, with the same room."""
        return KVCache() if self.filled is None else KVCache(self.layers, filled=tf.constant(0))

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            return [self[i] for i in range(len(self))[layer]]
        key, value = self.layers[layer]
        return key[:, :, : self.length], value[:, :, : self.length]

    def __iter__(self) -> Iterator[Pair]:
        return (self[layer] for layer in range(len(self)))


def write(buffer: tf.Tensor, new: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """The buffer, (B, H, S, D) or flat, with `new` (B, H, T, D) from `start` on.

    In a flat one it is T that is written, in place; elsewhere it is a select of S, which every runtime has.
    """
    if buffer.shape.rank == 3:
        return keras.ops.slice_update(buffer, (0, start, 0), flat(new))
    index = tf.range(tf.shape(buffer)[2]) - start  # (S,)
    inside = (index >= 0) & (index < tf.shape(new)[2])
    if new.shape[2] != 1:
        new = tf.gather(new, tf.clip_by_value(index, 0, tf.shape(new)[2] - 1), axis=2)
    return tf.where(inside[None, None, :, None], new, buffer)


def flat(x: tf.Tensor) -> tf.Tensor:
    """(B, H, S, D) -> (B * H, S, D)"""
    rows, heads, length, width = sizes(x)
    return tf.reshape(x, (rows * heads, length, width))


def of_rows(x: tf.Tensor, rows: Any) -> tf.Tensor:
    """(B * H, S, D) -> (B, H, S, D)"""
    return tf.reshape(x, (rows, -1, *sizes(x)[1:]))


def with_cached(x: tf.Tensor, cached: tf.Tensor, transpose: bool = False) -> tf.Tensor:
    """The product of x (B, H, T, ...) with a cache's values, or transposed keys, (B, H, S, D) or flat."""
    if cached.shape.rank == 4:
        return tf.matmul(x, cached, transpose_b=transpose)
    return of_rows(tf.matmul(flat(x), cached, transpose_b=transpose), sizes(x)[0])


@dataclass
class Context:
    """What every block of one call shares; a bias is added to the scores."""

    bias: tf.Tensor  # (B or 1, H or 1, T, S)
    past: KVCache
    presents: list[Pair] = field(default_factory=list)
    cross_presents: list[Pair] = field(default_factory=list)
    states: tf.Tensor | None = None  # (B, encoder length, E)
    states_bias: tf.Tensor | None = None  # (B, 1, 1, encoder length)
    hidden: list[tf.Tensor] | None = None  # lists to fill with what the caller wants to see
    probs: list[tf.Tensor] | None = None
    cross_probs: list[tf.Tensor] | None = None


class Attended(NamedTuple):
    """What attention gives: its output (B, T, E) and its probabilities (B, H, T, S)."""

    output: tf.Tensor
    probs: tf.Tensor


def lowest(dtype: tf.DType) -> float:
    """What hides a key: half the lowest finite value, so that adding a score to it stays finite in every dtype."""
    return float(tf.as_dtype(dtype).min) / 2


def hiding(keep: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A bias of the scores that hides what `keep` does not: booleans of any shape."""
    return tf.where(keep, tf.zeros((), dtype), tf.constant(lowest(dtype), dtype))


def key_bias(mask: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A mask that is 1 where a key counts, as a bias of the scores: (B, S) -> (B, 1, 1, S)"""
    return hiding(tf.cast(for_scores(mask), tf.bool), dtype)


def for_scores(mask: tf.Tensor) -> tf.Tensor:
    """(B, S) -> (B, 1, 1, S), not by `[:, None, None]`: a slice, which LiteRT has only for sizes that are known."""
    return tf.expand_dims(tf.expand_dims(mask, 1), 1)


def causal_bias(length: Any, keys: Any, past: Any, mask: tf.Tensor | None, dtype: tf.DType) -> tf.Tensor:
    """The bias under which each query sees the keys up to its own that `mask` keeps: (B or 1, H or 1, T, S).

    mask: (B, S), or (B or 1, H or 1, T or 1, S) of booleans, integers (1 keeps) or floats (added to the scores).
    """
    keep = (tf.range(keys)[None] <= past + tf.range(length)[:, None])[None, None]  # (1, 1, T, S)
    if mask is None:
        return hiding(keep, dtype)
    if mask.shape.rank == 4 and mask.dtype.is_floating:
        bias = tf.maximum(tf.cast(mask, dtype), tf.constant(lowest(dtype), dtype))
        return tf.where(keep, bias, tf.constant(lowest(dtype), dtype))
    mask = mask if mask.shape.rank == 4 else for_scores(mask)
    return hiding(keep & tf.cast(mask, tf.bool), dtype)


def positions(source: tf.Tensor, mask: tf.Tensor | None, past: Any) -> tf.Tensor:
    """Each token's position: the count of unmasked tokens before it, (B, T); its index where no mask counts, (1, T)."""
    index = past + tf.range(sizes(source)[1])
    if mask is None or mask.shape.rank != 2:
        return index[None]
    counts = tf.cumsum(tf.cast(tf.cast(mask, tf.bool), tf.int32), axis=-1)
    return tf.maximum(tf.gather(counts, index, axis=1) - 1, 0)


def split_heads(x: tf.Tensor, head_dim: int) -> tf.Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    batch, length, width = sizes(x)
    return tf.transpose(tf.reshape(x, (batch, length, width // head_dim, head_dim)), (0, 2, 1, 3))


def merge_heads(x: tf.Tensor) -> tf.Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    batch, heads, length, head_dim = sizes(x)
    return tf.reshape(tf.transpose(x, (0, 2, 1, 3)), (batch, length, heads * head_dim))


def upcast(x: tf.Tensor) -> tf.Tensor:
    """At least float32: a sum over many tokens is beyond float16, and beyond bfloat16's precision."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


class BaseAttention(keras.layers.Layer):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) under every switch of the configuration."""

    def __init__(self, config: GPT2Config, layer: int, **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        self.layer = layer
        self.head_dim = config.n_embd // config.n_head
        self.scale = config.score_scale(layer)
        self.attn_dropout = keras.layers.Dropout(config.attn_pdrop, dtype=self.dtype_policy)
        self.resid_dropout = keras.layers.Dropout(config.resid_pdrop, dtype=self.dtype_policy)

    def attend(
        self, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor, bias: tf.Tensor | None, head_mask: tf.Tensor | None
    ) -> Attended:
        if self.config.reorder_and_upcast_attn:
            q, k = upcast(q), upcast(k)
        scores = with_cached(q * tf.constant(self.scale, q.dtype), k, transpose=True)  # (B, H, T, S)
        scores = scores if bias is None else scores + tf.cast(bias, scores.dtype)
        probs = self.attn_dropout(tf.cast(tf.nn.softmax(scores), v.dtype))
        probs = probs if head_mask is None else probs * head_mask
        return Attended(merge_heads(with_cached(probs, v)), probs)


class Attention(BaseAttention):
    """Causal self-attention."""

    def __init__(self, config: GPT2Config, layer: int, **options: Any) -> None:
        super().__init__(config, layer, **options)
        self.present = config.heads(layer)
        inner = self.head_dim * len(self.present)
        self.c_attn = projection(config, config.n_embd, 3 * inner, "c_attn", self.dtype_policy)
        self.c_proj = projection(config, inner, config.n_embd, "c_proj", self.dtype_policy)
        self.built = True

    def call(self, x: tf.Tensor, context: Context, head_mask: tf.Tensor | None = None) -> Attended:
        q, k, v = (split_heads(t, self.head_dim) for t in tf.split(self.c_attn(x), 3, axis=-1))
        k, v = context.past.extend(self.layer, k, v)
        context.presents.append((k, v))
        x, probs = self.attend(q, k, v, context.bias, head_mask)
        return Attended(self.resid_dropout(self.c_proj(x)), probs)

    def prune(self, heads: Iterable[int]) -> None:
        """Cut these heads away, numbered as in the whole model; those that are gone already do not count."""
        left = [head for head in self.present if head not in set(heads)]
        kept = np.array([self.present.index(head) * self.head_dim + d for head in left for d in range(self.head_dim)])
        every = np.concatenate([kept + part * self.head_dim * len(self.present) for part in range(3)])
        replace_variable(self.c_attn, "kernel", tf.gather(self.c_attn.kernel, every, axis=1))
        replace_variable(self.c_attn, "bias", tf.gather(self.c_attn.bias, every))
        replace_variable(self.c_proj, "kernel", tf.gather(self.c_proj.kernel, kept))
        self.c_proj.input_spec = keras.InputSpec(min_ndim=2, axes={-1: len(kept)})
        self.c_attn.units, self.present = len(every), left


class CrossAttention(BaseAttention):
    """Attention of the decoder to an encoder's states."""

    def __init__(self, config: GPT2Config, layer: int, **options: Any) -> None:
        super().__init__(config, layer, **options)
        self.q_attn = projection(config, config.n_embd, config.n_embd, "q_attn", self.dtype_policy)
        self.c_attn = projection(config, config.n_embd, 2 * config.n_embd, "c_attn", self.dtype_policy)
        self.c_proj = projection(config, config.n_embd, config.n_embd, "c_proj", self.dtype_policy)
        self.built = True

    def call(self, x: tf.Tensor, context: Context) -> Attended:
        q = split_heads(self.q_attn(x), self.head_dim)
        k, v = context.past.cross[self.layer] if context.past.cross else self.encoded(context.states)
        context.cross_presents.append((k, v))
        x, probs = self.attend(q, k, v, context.states_bias, None)
        return Attended(self.resid_dropout(self.c_proj(x)), probs)

    def encoded(self, states: tf.Tensor) -> Pair:
        """The encoder's keys and values, each (B, H, encoder length, D)."""
        k, v = (split_heads(t, self.head_dim) for t in tf.split(self.c_attn(states), 2, axis=-1))
        return k, v
