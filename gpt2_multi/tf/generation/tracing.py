"""Generation as a part of another function that is being traced: what has no values yet, and maybe no sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Request, new_tokens_after, options_of
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf.generation.decoding import Prompt, align, decode, prefill
from gpt2_multi.tf.layers import facts

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def traced_request(
    config: GenerationConfig, model: GPT2Config, ids: tf.Tensor, mask: Any, tokenizer: GPT2Tokenizer | None
) -> Request:
    """`Request.of` for tensors (B, T) of which sizes may not be known; without a mask every id counts."""
    if config.sliding_window or config.prompt_lookup_num_tokens:  # which look at their tokens between compiled parts
        name = "sliding_window" if config.sliding_window else "prompt_lookup_num_tokens"
        raise InputError(f"{name}: cannot be traced into another function; leave it out, or call generate outside")
    inputs.check_shape("input_ids", ids.shape, (None, None))
    inputs.check_integers("input_ids", facts("input_ids", ids))
    batch, length = ids.shape
    new = new_tokens_after(config, length)
    if mask is None:
        config.check_context(length or 0, new, model.n_positions)
    mask = tf.ones_like(ids, tf.bool) if mask is None else tf.cast(mask, tf.bool)
    inputs.check_shape("attention_mask", mask.shape, ids.shape)
    seeds = len(config.seed) if isinstance(config.seed, (list, tuple)) else None
    options = options_of(config, model, (seeds or 1) if batch is None else batch, tokenizer)
    if batch is None and seeds is None:
        first = tf.bitcast(options.streams[0], tf.uint64)
        options = options._replace(streams=counted(first, tf.shape(ids)[0] * config.rows))
    return Request(config, model, tokenizer, None, ids, *align(ids, mask), new, options)


def counted(first: tf.Tensor, rows: Any) -> tf.Tensor:
    """The streams of noise (rows, 2) uint32 that count on from a first one, () uint64."""
    return tf.bitcast(first + tf.cast(tf.range(rows), tf.uint64), tf.uint32)  # the low word, then the high


def traced(model: keras.Model, strategy: Any, prompt: Prompt, options: Options, new: Any) -> Any:
    """The state in which `new` tokens are made."""
    cache, keep = prefill(model, prompt, strategy.room + 1, strategy.rows)
    prompt = prompt.repeated(strategy.rows)
    state = strategy.start(model, prompt, options)._replace(cache=cache, keep=keep)
    return decode(model, prompt, strategy, state, new, options)
