"""Generation as a part of another function that is being traced: what has no values yet, and maybe no sizes."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Given, Request, check_beside, new_tokens_after, options_of
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf.generation.decoding import Prompt, align, begin, begins, decode, prefill
from gpt2_multi.tf.layers import facts, sizes


def traced_request(config: GenerationConfig, model: GPT2Config, given: Given, embeds: inputs.Facts | None) -> Request:
    """`Request.of` for tensors (B, T) of which sizes may not be known; without a mask every id counts."""
    check_traced(config, given)
    (callbacks := given.callbacks).check(config)
    tokenizer, types, states = given.tokenizer, given.token_type_ids, given.encoder_hidden_states
    check_beside(config, embeds is not None, types is not None, False)
    own, ids = rows_of(config, model, given.input_ids, embeds, 1 if states is None else sizes(states)[0])
    rows, length = ids.shape
    new = new_tokens_after(config, length)
    if given.attention_mask is None:
        config.check_context(length or 0, new, model.n_positions)
    mask = mask_of("attention_mask", given.attention_mask, ids)
    seeds = len(config.seed) if isinstance(config.seed, (list, tuple)) else None
    options = options_of(config, model, (seeds or 1) if rows is None else rows, tokenizer)
    if rows is None and seeds is None:
        first = tf.bitcast(options.streams[0], tf.uint64)
        options = options._replace(streams=counted(first, tf.shape(ids)[0] * config.rows))
    if types is not None:
        inputs.check_shape("token_type_ids", types.shape, ids.shape)
    order, whole, keep, types = align(mask, ids, mask, types)
    others = None
    if config.is_guided:
        negative = given.negative_prompt_ids, given.negative_prompt_attention_mask
        whole, keep, others = with_negative(whole, keep, *negative)
    rest = callbacks, order, types, others
    return Request(config, model, tokenizer, None, own, whole, keep, new, options, *rest)


def check_traced(config: GenerationConfig, given: Given) -> None:
    """What looks at tokens, at the clock or at values between compiled parts cannot be traced."""
    wanted = {
        "sliding_window": config.sliding_window,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "max_time": config.max_time is not None,
        "streamer": given.streamer is not None,
        "past_key_values": given.past_key_values is not None,
        "assistant_model": given.assistant_model is not None,
    }
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        raise InputError(f"{name}: cannot be traced into another function; leave it out, or call generate outside")


def rows_of(
    config: GenerationConfig, model: GPT2Config, ids: Any, embeds: inputs.Facts | None, batch: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Ids as they were given, and what is read: ids (B, T), or what stands for them beside embeddings."""
    shape: Any = None if embeds is None else inputs.check_source(model, {"inputs_embeds": embeds}).shape[:2]
    if ids is None and shape is None:
        inputs.check_begin(config.bos_token_id, model.vocab_size)
        ids = tf.fill((batch, 1), config.bos_token_id)
    if ids is None:
        ids = tf.fill(shape, model.vocab_size)
        return ids[:, :0], ids
    inputs.check_shape("input_ids", ids.shape, shape or (None, None))
    inputs.check_integers("input_ids", facts("input_ids", ids))
    return ids, ids


def mask_of(name: str, mask: Any, ids: tf.Tensor) -> tf.Tensor:
    """A mask of this name for ids (B, T); without one every id counts."""
    mask = tf.ones_like(ids, tf.bool) if mask is None else tf.cast(mask, tf.bool)
    inputs.check_shape(name, mask.shape, ids.shape)
    return mask


def with_negative(ids: tf.Tensor, mask: tf.Tensor, negative: Any, negative_mask: Any) -> tuple[Any, Any, Any]:
    """Ids and mask (B, T) as wide as what they are guided away from, and that: see `Request`."""
    others = ids[:, -1:], mask[:, -1:]
    if negative is not None:
        inputs.check_shape("negative_prompt_ids", negative.shape, (ids.shape[0], None))
        keep = mask_of("negative_prompt_attention_mask", negative_mask, negative)
        _, *rows = align(keep, tf.cast(negative, ids.dtype), keep)
        others = rows[0], rows[1]
    length, other = sizes(ids)[1], sizes(others[0])[1]

    def widened(x: tf.Tensor, more: Any) -> tf.Tensor:
        return tf.pad(x, [(0, 0), (tf.maximum(more, 0), 0)])

    pair = widened(others[0], length - other), widened(others[1], length - other)
    return widened(ids, other - length), widened(mask, other - length), pair


def counted(first: tf.Tensor, rows: Any) -> tf.Tensor:
    """The streams of noise (rows, 2) uint32 that count on from a first one, () uint64."""
    return tf.bitcast(first + tf.cast(tf.range(rows), tf.uint64), tf.uint32)  # the low word, then the high


def traced(model: keras.Model, strategy: Any, prompt: Prompt, options: Options, new: Any) -> Any:
    """The state in which `new` tokens are made."""
    wide = prompt.repeated(strategy.rows)
    state = strategy.start(model, wide, options)
    if begins(strategy, prompt):
        state = begin(model, prompt, strategy, state, new, options)
    else:
        cache, keep = prefill(model, prompt, strategy.room, strategy.rows)
        state = state._replace(cache=cache, keep=keep)
    return decode(model, wide, strategy, state, new, new, options)
