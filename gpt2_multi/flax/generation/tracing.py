"""Generation in Flax while another function is traced: shapes are known, values are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from gpt2_multi.errors import InputError
from gpt2_multi.flax.generation.decoding import align
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.request import Given, Request, check_beside, new_tokens_after, options_of
from gpt2_multi.model import inputs


def traced_request(
    model: Any, config: GenerationConfig, given: Given, found: Mapping[str, inputs.Facts], past: int | None
) -> Request:
    """The same for ids (B, T), or embeddings (B, T, E), and what else is given, of which only the shapes are known."""
    if past is not None:
        raise InputError("past_key_values: cannot be used while the ids are traced; call generate outside")
    given.callbacks.check(config)
    ids, types = ids_of(model, given.input_ids, found), given.token_type_ids
    check_beside(config, "inputs_embeds" in found, types is not None, False)
    if types is not None:
        inputs.check_shape("token_type_ids", types.shape, ids.shape)
    order, whole, keep, types = align(mask := mask_of("attention_mask", given, ids.shape), ids, mask, types)
    new, options = new_tokens_after(config, ids.shape[1]), options_of(config, model.config, len(ids), given.tokenizer)
    negative: Any = None
    if config.is_guided:
        order, whole, keep, negative = with_negative(given, order, whole, keep)
    return Request(
        config, model.config, given.tokenizer, None, ids[:, : ids.shape[1] * (given.input_ids is not None)], whole,
        keep, new, options, given.callbacks, order, types, negative, width=ids.shape[1],
    )  # fmt: skip


def ids_of(model: Any, ids: Any, found: Mapping[str, inputs.Facts]) -> Any:
    """Ids (B, T), or what stands for them beside embeddings: see `Request`."""
    vocab_size, shape = model.config.vocab_size, None
    if "inputs_embeds" in found:
        shape = inputs.check_source(model.config, {"inputs_embeds": found["inputs_embeds"]}).shape[:2]
    if ids is None:
        inputs.check_given(ids, shape)
        return jnp.full(shape, vocab_size)  # type: ignore[arg-type]
    inputs.check_shape("input_ids", ids.shape, shape or (None, None))
    inputs.check_ids("input_ids", found["input_ids"], vocab_size)
    return ids


def mask_of(name: str, given: Given, shape: tuple[int, ...]) -> Array:
    """A mask of this name, (B, T) booleans; all True where there is none."""
    mask = getattr(given, name)
    mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    inputs.check_shape(name, mask.shape, shape)
    return mask


def with_negative(given: Given, order: Array, ids: Array, mask: Array) -> tuple[Any, ...]:
    """Order, ids and mask, as wide as what they are guided away from, and that: see `Request`."""
    others: Any = (ids[:, -1:], mask[:, -1:])
    if (negative := given.negative_prompt_ids) is not None:
        inputs.check_shape("negative_prompt_ids", negative.shape, (len(ids), None))
        keep = mask_of("negative_prompt_attention_mask", given, negative.shape)
        _, *others = align(keep, jnp.asarray(negative), keep)
    width = max(ids.shape[1], others[0].shape[1])
    rows = [jnp.pad(x, [(0, 0), (width - x.shape[1], 0)]) for x in (order, ids, mask, *others)]
    return rows[0], rows[1], rows[2], (rows[3], rows[4])


def check_alone(config: GenerationConfig, callbacks: Callbacks, assistant: Any) -> None:
    """A loop that is led from outside cannot be part of another function."""
    for name, is_on in (
        ("sliding_window", config.sliding_window),
        ("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens is not None),
        ("max_time", config.max_time is not None),
        ("streamer", callbacks.streamer is not None),
        ("assistant_model", assistant is not None),
    ):
        if is_on:
            raise InputError(f"{name}: cannot be used while generate is traced; leave it out, or call it outside")
