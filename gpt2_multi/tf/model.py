"""GPT-2's body in TensorFlow: MLP, block, and the bare model.

Shapes: B batch, T length of this call, S keys (past included), H heads, D head width, E `n_embd`, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.outputs import BaseModelOutputWithPastAndCrossAttentions, Output
from gpt2_multi.tf.attention import (
    Attention,
    Context,
    CrossAttention,
    KVCache,
    Pair,
    causal_bias,
    key_bias,
    positions,
)
from gpt2_multi.tf.fit.policies import Policy
from gpt2_multi.tf.layers import dropout, embedding, facts, lookup, made, norm, projection, register, sizes
from gpt2_multi.tf.loading import TFGPT2PreTrainedModel

for output_class in Output.__subclasses__():
    register(output_class)


def gelu(x: tf.Tensor) -> tf.Tensor:
    """x Phi(x) (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + tf.math.erf(x * 2**-0.5))


def tanh_gelu(x: tf.Tensor) -> tf.Tensor:
    """Its approximation by tanh, written out: TensorFlow's own kernel is good to 4e-9 only, in float64 too."""
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def quick_gelu(x: tf.Tensor) -> tf.Tensor:
    """x sigmoid(1.702 x) (Hendrycks and Gimpel 2016)."""
    return x * tf.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "gelu": gelu,
    "tanh_gelu": tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "tanh": tf.tanh,
}


class MLP(keras.layers.Layer):
    """Two projections with the activation between them, `n_inner` (4 E by default) wide."""

    def __init__(self, config: GPT2Config, **options: Any) -> None:
        super().__init__(**options)
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = projection(config, config.n_embd, inner, "c_fc", self.dtype_policy)
        self.c_proj = projection(config, inner, config.n_embd, "c_proj", self.dtype_policy)
        self.act = ACTIVATIONS[config.activation]
        self.dropout = keras.layers.Dropout(config.resid_pdrop, dtype=self.dtype_policy)
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(keras.layers.Layer):
    """Pre-norm transformer block (Radford et al. 2019, section 2.3)."""

    def __init__(self, config: GPT2Config, layer: int, **options: Any) -> None:
        super().__init__(**options)
        policy = self.dtype_policy
        self.ln_1 = norm(config, "ln_1", policy)
        self.attn = Attention(config, layer, name="attn", dtype=policy)
        if config.add_cross_attention:
            self.ln_cross_attn = norm(config, "ln_cross_attn", policy)
            self.crossattention = CrossAttention(config, layer, name="crossattention", dtype=policy)
        self.ln_2 = norm(config, "ln_2", policy)
        self.mlp = MLP(config, name="mlp", dtype=policy)
        made(self, None, None, config.n_embd)

    def call(
        self, x: tf.Tensor, context: Context | None = None, head_mask: Any = None, training: bool | None = None
    ) -> tf.Tensor:
        """The hidden states of the next block; Keras tells the layers inside of `training`."""
        if context is None:  # as Keras calls it, to see what its layers see of a text
            length = sizes(x)[1]
            context = Context(causal_bias(length, length, 0, None, x.dtype), KVCache())
        a, probs = self.attn(self.ln_1(x), context=context, head_mask=head_mask)
        note(context.probs, probs)
        x = x + a
        if context.states is not None or context.past.cross:
            a, probs = self.crossattention(self.ln_cross_attn(x), context=context)
            note(context.cross_probs, probs)
            x = x + a
        return x + self.mlp(self.ln_2(x))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """That of the hidden states, (B, T, E)."""
        return input_shape


def recomputed(block: Block) -> Callable[..., tf.Tensor]:
    """A block in training whose activations the backward pass computes again, with the same noise, and does not keep.

    All that it may have gradients for goes in as an argument, and comes out as a result.
    """
    noises = [layer.seed_generator for layer in block._flatten_layers() if hasattr(layer, "seed_generator")]
    seeds = [(noise.state, noise.next()) for noise in noises]

    def call(x: tf.Tensor, context: Context, head_mask: tf.Tensor | None) -> tf.Tensor:
        given = {"bias": context.bias, "states": context.states, "states_bias": context.states_bias, "head": head_mask}
        names = [name for name, value in given.items() if value is not None]

        def again(x: tf.Tensor, *values: tf.Tensor) -> list[tf.Tensor]:
            found: dict[str, Any] = dict.fromkeys(given) | dict(zip(names, values, strict=True))
            heads, own = found.pop("head"), Context(past=context.past, **found)
            own.probs, own.cross_probs = (None if kept is None else [] for kept in (context.probs, context.cross_probs))
            with keras.StatelessScope(state_mapping=seeds):
                x = block(x, context=own, head_mask=heads, training=True)
            return [x, *(own.probs or ()), *(own.cross_probs or ())]

        x, *probs = tf.recompute_grad(again)(x, *(given[name] for name in names))
        for kept, value in zip((context.probs, context.cross_probs), probs, strict=False):
            note(kept, value)
        return x

    return call


@keras.saving.register_keras_serializable("gpt2_multi")
class TFGPT2Model(TFGPT2PreTrainedModel):
    """The bare GPT-2, without a head.

    `dtype` is what it computes in, `param_dtype` what it stores; both may be names, and `dtype` a policy of Keras such
    as "mixed_float16". Without either, Keras' global policy holds.
    """

    head = "base"
    output_class = BaseModelOutputWithPastAndCrossAttentions
    label_names = ()
    logit_names = ("last_hidden_state",)
    logit_axes = "BTE"

    def __init__(self, config: GPT2Config, *, dtype: Policy = None, param_dtype: Any = None, **options: Any) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, **options)
        config = self.config
        self.gradient_checkpointing, self.every_n_layers = False, 1
        policy = self.dtype_policy
        self.wte = embedding(config, "wte", policy)
        self.wpe = keras.layers.Embedding(
            config.n_positions, config.n_embd, embeddings_initializer="zeros", name="wpe", dtype=policy
        )
        self.wpe.build((None, None))
        self.drop = dropout(config.embd_pdrop, config.n_embd, "drop", policy)
        self.h = [Block(config, layer, name=f"h_{layer}", dtype=policy) for layer in range(config.n_layer)]
        for block in self.h:
            self._track_trackable(block, block.name)  # or tf.train.Checkpoint, which sees no list, would leave them out
        self.ln_f = norm(config, "ln_f", policy)
        self.initialise()

    def attentions(self) -> list[Attention]:
        """The self-attention of every block."""
        return [block.attn for block in self.h]

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens of `batch_size` rows."""
        inputs.check_positions(0, max_length - 1, self.wpe.input_dim)
        shapes = [(batch_size, len(attn.present), max_length, attn.head_dim) for attn in self.attentions()]
        return KVCache.empty(shapes, self.compute_dtype)

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        past_key_values: KVCache | Sequence[Pair] | None = None,
        attention_mask: tf.Tensor | None = None,
        token_type_ids: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        encoder_hidden_states: tf.Tensor | None = None,
        encoder_attention_mask: tf.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """The hidden states of (B, T) ids, or of (B, T, E) `inputs_embeds`.

        attention_mask: (B, past + T), or (B, capacity) of a preallocated cache, 1 where a token counts; or of rank 4,
        (B or 1, H or 1, T or 1, past + T), booleans or integers (1 keeps) or floats (added to the scores); no mask
        shows a token what comes after it.
        position_ids: (B, T) or (1, T); without them a token's position is the count of unmasked tokens before it.
        head_mask: (H,), (n_layer, H) or (n_layer, B, H, T, S). encoder_hidden_states: (B, encoder length, E),
        encoder_attention_mask: (B, encoder length).

        Raises InputError for an id outside the vocabulary, a position beyond `n_positions` and shapes that do not fit;
        while a function is traced, for the shapes that are known.
        """
        inputs.check_given(input_ids, inputs_embeds)
        source = inputs_embeds if input_ids is None else input_ids
        is_recomputed = self.gradient_checkpointing and training
        if is_recomputed:
            use_cache = inputs.check_recomputed(past_key_values, use_cache)
        past = as_cache(past_key_values, len(self.h))
        check_call(
            self.config, past, self.compute_dtype, (self.wte.input_dim, self.wpe.input_dim),
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, head_mask=head_mask,
            position_ids=position_ids, inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )  # fmt: skip
        position_ids = self._places(source, attention_mask, past) if position_ids is None else position_ids
        x = self.embed(source, position_ids, token_type_ids)
        context = self._context(x, past, attention_mask, encoder_hidden_states, encoder_attention_mask)
        self._wanted(context, output_attentions, output_hidden_states)
        for layer, (block, heads) in enumerate(zip(self.h, self._head_masks(head_mask), strict=True)):
            note(context.hidden, x)
            is_kept = not is_recomputed or layer % self.every_n_layers
            x = (block if is_kept else recomputed(block))(x, context=context, head_mask=heads)
        x = self.ln_f(x)
        note(context.hidden, x)
        cached = self.config.use_cache and not training if use_cache is None else use_cache
        cache = longer(context, sizes(x)[1]) if cached else None
        seen = (tuple(kept) if kept else None for kept in (context.hidden, context.probs, context.cross_probs))
        return give(self.config, BaseModelOutputWithPastAndCrossAttentions(x, cache, *seen), return_dict)

    def embed(self, source: tf.Tensor, position_ids: tf.Tensor, token_type_ids: tf.Tensor | None = None) -> tf.Tensor:
        """The first block's input, (B, T, E): the sum of tokens (ids, or their embeddings), positions and types."""
        x = tf.cast(source, self.compute_dtype) if source.dtype.is_floating else lookup(self.wte, source)
        x = x + lookup(self.wpe, position_ids)
        return self.drop(x if token_type_ids is None else x + lookup(self.wte, token_type_ids))

    def _places(self, source: tf.Tensor, mask: tf.Tensor | None, past: KVCache) -> tf.Tensor:
        found = positions(source, mask, past.length)
        if past.capacity is None:
            return found
        return tf.minimum(found, self.wpe.input_dim - 1)  # the last may be beyond: nothing is asked for there

    def _context(
        self, x: tf.Tensor, past: KVCache, mask: tf.Tensor | None, states: Any, states_mask: tf.Tensor | None
    ) -> Context:
        length = sizes(x)[1]
        keys = past.length + length if past.capacity is None else past.capacity
        if mask is not None and past.capacity is not None:
            room = keys - sizes(mask)[-1]
            mask = tf.pad(mask, [*[(0, 0)] * (mask.shape.rank - 1), (0, room)])
        bias = causal_bias(length, keys, past.length, mask, x.dtype)
        context = Context(bias, past, states=states)
        if states is not None and states_mask is not None:
            context.states_bias = key_bias(states_mask, x.dtype)
        return context

    def _wanted(self, context: Context, attentions: bool | None, hidden_states: bool | None) -> None:
        attentions = self.config.output_attentions if attentions is None else attentions
        hidden_states = self.config.output_hidden_states if hidden_states is None else hidden_states
        context.hidden = [] if hidden_states else None
        context.probs = [] if attentions else None
        context.cross_probs = [] if attentions and context.states is not None else None

    def _head_masks(self, head_mask: tf.Tensor | None) -> Sequence[tf.Tensor | None]:
        if head_mask is None:
            return [None] * len(self.h)
        rows = tf.cast(head_mask, self.compute_dtype)
        if rows.shape.rank != 5:
            rows = tf.broadcast_to(rows, (len(self.h), self.config.n_head))[:, None, :, None, None]
        present = (attn.present for attn in self.attentions())
        masks = zip(tf.unstack(rows, len(self.h)), present, strict=True)
        return [row if row.shape[1] == 1 else tf.gather(row, heads, axis=1) for row, heads in masks]


def note(kept: list[Any] | None, value: Any) -> None:
    """Keep a value where the caller wants to see it."""
    if kept is not None:
        kept.append(value)


def longer(context: Context, length: int | tf.Tensor) -> KVCache:
    """The cache after a call of `length` tokens."""
    filled = None if context.past.filled is None else context.past.filled + length
    return KVCache(tuple(context.presents), tuple(context.cross_presents), filled)


def check_call(
    config: GPT2Config, cache: KVCache, dtype: str, tables: tuple[int, int], **given: tf.Tensor | None
) -> None:
    """Everything that the body was given has to fit its configuration, the others and the cache, as far as known."""
    found = {name: facts(name, x) for name, x in given.items() if x is not None}
    batch, length = inputs.check_source(config, found).shape[:2]
    past = cache.length if isinstance(cache.length, int) else None
    mask, keys = found.get("attention_mask"), None if past is None or length is None else past + length
    if cache.layers:
        key = cache.layers[0][0]
        inputs.check_cache(None if cache.is_flat else key.shape[0], key.dtype.name, batch, dtype)
        inputs.check_room(length, past, key.shape[-2] if cache.capacity is not None else None)
        if cache.capacity is not None and mask is not None and mask.shape[1:] == (key.shape[-2],):
            keys = key.shape[-2]
    inputs.check_call(config, found, tables, past, keys)


def as_cache(past: KVCache | Sequence[Pair] | None, layers: int) -> KVCache:
    """A cache, or a (key, value) pair for each layer, each (B, H, S, D), as a cache; no cache is an empty one."""
    if past is None or (isinstance(past, KVCache) and not past.layers):
        return KVCache()
    pairs = past.layers if isinstance(past, KVCache) else past
    rank = 3 if isinstance(past, KVCache) and past.is_flat else 4
    fits = isinstance(pairs, (list, tuple)) and len(pairs) == layers and all(_is_pair(pair, rank) for pair in pairs)
    inputs.check_past(past, fits, layers)
    return past if isinstance(past, KVCache) else KVCache(tuple((pair[0], pair[1]) for pair in past))


def _is_pair(layer: Any, rank: int) -> bool:
    if tf.is_tensor(layer):  # as transformers stacks them
        return bool(layer.shape.rank == 5 and layer.shape[0] == 2)
    parts = layer[:2] if isinstance(layer, (list, tuple)) else ()
    return len(parts) == 2 and all(tf.is_tensor(x) and x.shape.rank == rank for x in parts)


def give(config: GPT2Config, output: Any, return_dict: bool | None) -> Any:
    """The output as it was asked for: a dataclass, or a tuple of the fields that are there."""
    return output if (config.use_return_dict if return_dict is None else return_dict) else output.to_tuple()
