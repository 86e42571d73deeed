"""What a call of the Flax model may be given, looked at before it is compiled; the words are `limits`'s.

Inside another function that is traced, shapes are looked at, and values cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt2_multi import limits
from gpt2_multi.errors import InputError
from gpt2_multi.flax.attention import KVCache, positions

if TYPE_CHECKING:
    from gpt2_multi.config import GPT2Config


def as_array(name: str, value: Any) -> Any:
    """Lists and NumPy arrays as arrays of JAX; a cache as it is."""
    if value is None or isinstance(value, (jax.Array, KVCache)):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise InputError(
            f"{name}: expected rows of numbers, all of one length, found {type(value).__name__}; pad them, and give "
            "attention_mask"
        ) from None


def check_call(config: GPT2Config, given: Mapping[str, Any]) -> None:
    """Every input of the body, (B, T) ids and what goes with them, has to fit the configuration and the others."""
    source = check_source(config, given.get("input_ids"), given.get("inputs_embeds"))
    cache = given.get("past_key_values")
    check_shapes(config, source, given, cache)
    check_states(config, len(source), given.get("encoder_hidden_states"), given.get("encoder_attention_mask"))
    for name in ("input_ids", "token_type_ids", "position_ids"):
        check_values(config, name, given.get(name))
    if given.get("position_ids") is None:
        past = 0 if cache is None else cache.length
        check_values(config, "position_ids", positions(source, given.get("attention_mask"), past))


def check_source(config: GPT2Config, input_ids: Array | None, inputs_embeds: Array | None) -> Array:
    """The ids (B, T) or the embeddings (B, T, E), whichever is given."""
    limits.check_given(input_ids, inputs_embeds)
    if input_ids is not None:
        limits.check_shape("input_ids", input_ids.shape, (None, None))
        return input_ids
    assert inputs_embeds is not None
    limits.check_shape("inputs_embeds", inputs_embeds.shape, (None, None, config.n_embd))
    if not jnp.issubdtype(inputs_embeds.dtype, jnp.floating):
        raise InputError(f"inputs_embeds: expected floats, found {inputs_embeds.dtype}; ids are input_ids")
    return inputs_embeds


def check_shapes(config: GPT2Config, source: Array, given: Mapping[str, Any], cache: KVCache | None) -> None:
    """Every input has to fit the (B, T) of the call and the room of the cache."""
    (batch, length), mask, head_mask = source.shape[:2], given.get("attention_mask"), given.get("head_mask")
    keys = length
    if cache is not None:
        check_cache(cache, batch, length, config)
        keys = cache.capacity
    if mask is not None:
        limits.check_mask(mask.shape, batch, config.n_head, length, keys)
    for name in ("token_type_ids", "position_ids"):
        if given.get(name) is not None:
            rows = 1 if name == "position_ids" and len(given[name]) == 1 else batch
            limits.check_shape(name, given[name].shape, (rows, length))
    if head_mask is not None:
        limits.check_head_mask(head_mask.shape, (config.n_layer, batch, config.n_head, length, keys))


def check_cache(cache: object, batch: int, length: int, config: GPT2Config) -> None:
    """A cache comes from `init_cache`, for as many rows, and has room for the new tokens."""
    if not isinstance(cache, KVCache) or len(cache) != config.n_layer:
        raise InputError(
            f"past_key_values: expected a cache of {config.n_layer} layers from init_cache(batch_size, max_length), or "
            f"what a call made of it, found {type(cache).__name__}"
        )
    key = (cache.layers if cache.stacked else cache.layers[0])[0]
    limits.check_cache(key.shape[-4], str(key.dtype), batch, str(key.dtype))
    if is_concrete(cache.length):
        limits.check_room(length, int(cache.length), cache.capacity)


def check_states(config: GPT2Config, batch: int, states: Array | None, mask: Array | None) -> None:
    """An encoder's states are (B, encoder length, E), their mask (B, encoder length)."""
    if states is not None:
        limits.check_encoder(config.add_cross_attention)
        limits.check_shape("encoder_hidden_states", states.shape, (batch, None, config.n_embd))
        if mask is not None:
            limits.check_shape("encoder_attention_mask", mask.shape, states.shape[:2])


def check_values(config: GPT2Config, name: str, value: Array | None) -> None:
    """Every id has to be in the vocabulary, and every position among the positions."""
    if value is None:
        return
    limits.check_integers(name, value.dtype, bool(jnp.issubdtype(value.dtype, jnp.integer)))
    if not is_concrete(value):
        return
    if name == "position_ids":
        limits.check_positions(*extremes(value), config.n_positions)
    else:
        limits.check_ids(name, *extremes(value), config.vocab_size)


def is_concrete(value: Any) -> bool:
    """Whether an array has values already."""
    return not isinstance(value, jax.core.Tracer)


def extremes(ids: Any) -> tuple[int, int]:
    """The least and the greatest of some ids; (0, 0) of none."""
    return (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
