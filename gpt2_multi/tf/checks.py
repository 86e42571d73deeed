"""What a call of the TensorFlow model may be given, looked at before a kernel runs; the words are `limits`'s.

While a function is traced, only what is known then is looked at: ranks, and the sizes that are not None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.tf.attention import KVCache, Pair

if TYPE_CHECKING:
    from gpt2_multi.tf.model import TFGPT2Model


def check_tensors(**inputs: object) -> None:
    """Whatever is given has to be a tensor."""
    for name, value in inputs.items():
        if value is not None and not tf.is_tensor(value):
            raise InputError(f"{name}: expected a tensor, found {type(value).__name__}; use tf.convert_to_tensor")


def check_numbers(**inputs: tf.Tensor | None) -> None:
    """What is cast has to be numbers or booleans."""
    for name, value in inputs.items():
        if value is not None and value.dtype == tf.string:
            raise InputError(f"{name}: expected numbers, found strings; the tokenizer makes them of texts")


def shape(x: tf.Tensor, *expected: int | None) -> tuple[int, ...]:
    """The shape of a tensor, in which sizes that are unknown yet count as the expected ones."""
    if x.shape.rank is None:
        raise InputError("found a tensor whose rank is not known while tracing; tell it with tf.ensure_shape")
    wanted = expected if x.shape.rank == len(expected) else [None] * x.shape.rank
    return tuple((w or 0) if size is None else size for size, w in zip(x.shape, wanted, strict=True))


def check_source(model: TFGPT2Model, input_ids: tf.Tensor | None, inputs_embeds: tf.Tensor | None) -> tf.Tensor:
    """The ids (B, T) or the embeddings (B, T, E), whichever is given."""
    inputs.check_given(input_ids, inputs_embeds)
    check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds)
    if input_ids is not None:
        inputs.check_shape("input_ids", shape(input_ids), (None, None))
        check_integers("input_ids", input_ids)
        return input_ids
    assert inputs_embeds is not None
    inputs.check_shape("inputs_embeds", shape(inputs_embeds), (None, None, model.config.n_embd))
    if not inputs_embeds.dtype.is_floating:
        raise InputError(f"inputs_embeds: expected floats, found {inputs_embeds.dtype.name}; ids are input_ids")
    return inputs_embeds


def check_past(model: TFGPT2Model, past: KVCache | Sequence[Pair] | None) -> KVCache:
    """A cache has a (key, value) pair for each layer, each (B, H, S, D); no cache is an empty one."""
    if past is None or (isinstance(past, KVCache) and not past.layers):
        return KVCache()
    layers = past.layers if isinstance(past, KVCache) else past
    fits = isinstance(layers, (list, tuple)) and len(layers) == len(model.h)
    if not fits or not all(_is_pair(layer) for layer in layers):
        raise InputError(
            f"past_key_values: expected what a call returned, a (key, value) pair for each of {len(model.h)} layers, "
            f"found {type(past).__name__}; pass it back as it is, or use init_cache"
        )
    return past if isinstance(past, KVCache) else KVCache(tuple((layer[0], layer[1]) for layer in layers))


def _is_pair(layer: object) -> bool:
    if tf.is_tensor(layer):  # as transformers stacks them
        return layer.shape.rank == 5 and layer.shape[0] == 2  # type: ignore[attr-defined]
    parts = layer[:2] if isinstance(layer, (list, tuple)) else ()
    return len(parts) == 2 and all(tf.is_tensor(x) and x.shape.rank == 4 for x in parts)


def check_shapes(
    model: TFGPT2Model,
    source: tf.Tensor,
    mask: tf.Tensor | None,
    types: tf.Tensor | None,
    position_ids: tf.Tensor | None,
    head_mask: tf.Tensor | None,
    cache: KVCache,
) -> None:
    """Every input has to fit the (B, T) of the call and what is cached; the sizes that are not known yet do."""
    check_tensors(attention_mask=mask, token_type_ids=types, position_ids=position_ids, head_mask=head_mask)
    check_numbers(attention_mask=mask, head_mask=head_mask)
    batch, length, past = source.shape[0], source.shape[1], cache.length
    counted = position_ids is None and (mask is None or mask.shape.rank != 2)  # positions are indices
    if counted and isinstance(length, int) and isinstance(past, int):
        inputs.check_positions(0, past + length - 1, model.wpe.input_dim)
    if batch is None or length is None or not isinstance(past, int):
        return
    if cache.layers:
        key = cache.layers[0][0]
        inputs.check_cache(shape(key, batch)[0], key.dtype.name, batch, model.compute_dtype)
        if isinstance(cache.capacity, int):
            inputs.check_room(length, past, cache.capacity)
    keys, heads = past + length, model.config.n_head
    if mask is not None and not (mask.shape.rank == 2 and mask.shape == (batch, cache.capacity)):
        known = shape(mask, batch, keys) if mask.shape.rank == 2 else shape(mask, batch, heads, length, keys)
        inputs.check_mask(known, batch, heads, length, keys)
    if types is not None:
        inputs.check_shape("token_type_ids", shape(types, batch, length), (batch, length))
    if position_ids is not None:
        rows = 1 if position_ids.shape.rank and position_ids.shape[0] == 1 else batch
        inputs.check_shape("position_ids", shape(position_ids, rows, length), (rows, length))
    if head_mask is not None:
        inputs.check_head_mask(shape(head_mask), (model.config.n_layer, batch, heads, length, keys))


def check_states(model: TFGPT2Model, batch: int | None, states: tf.Tensor | None, mask: tf.Tensor | None) -> None:
    """An encoder's states are (B, encoder length, E), their mask (B, encoder length)."""
    check_tensors(encoder_hidden_states=states, encoder_attention_mask=mask)
    check_numbers(encoder_hidden_states=states, encoder_attention_mask=mask)
    if states is not None:
        inputs.check_encoder(model.config.add_cross_attention)
        known = shape(states, batch, None, None)
        inputs.check_shape("encoder_hidden_states", known, (batch, None, model.config.n_embd))
        if mask is not None:
            inputs.check_shape("encoder_attention_mask", shape(mask, *known[:2]), known[:2])


def check_values(model: TFGPT2Model, **ids: tf.Tensor | None) -> None:
    """Every id has to be in the vocabulary, and every position among the positions; unknown while traced."""
    for name, value in ids.items():
        if value is None:
            continue
        check_integers(name, value)
        if not is_concrete(value):
            continue
        if name == "position_ids":
            inputs.check_positions(*extremes(value), model.wpe.input_dim)
        else:
            inputs.check_ids(name, *extremes(value), model.wte.input_dim)


def check_integers(name: str, value: tf.Tensor) -> None:
    """Ids are integers."""
    inputs.check_integers(name, value.dtype.name, value.dtype in (tf.int64, tf.int32))


def is_concrete(value: Any) -> bool:
    """Whether a tensor has values already."""
    return bool(hasattr(value, "numpy")) and tf.executing_eagerly()


def extremes(ids: tf.Tensor) -> tuple[int, int]:
    """The least and the greatest of some ids; (0, 0) of none."""
    if not tf.size(ids):
        return 0, 0
    return int(tf.reduce_min(ids)), int(tf.reduce_max(ids))
