"""Generation in Flax while another function is traced: shapes are known, values are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt2_multi.errors import InputError
from gpt2_multi.flax.generation.decoding import align
from gpt2_multi.flax.layers import facts, is_concrete
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.request import Request, new_tokens_after, options_of
from gpt2_multi.model import inputs

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def traced_request(
    model: Any, config: GenerationConfig, ids: Array, mask: Array | None, tokenizer: GPT2Tokenizer | None
) -> Request:
    """The same for ids (B, T) and a mask of which only the shapes are known."""
    inputs.check_shape("input_ids", ids.shape, (None, None))
    mask = jnp.ones(ids.shape, bool) if mask is None else mask != 0
    inputs.check_shape("attention_mask", mask.shape, ids.shape)
    inputs.check_ids("input_ids", facts(ids), model.config.vocab_size)
    new, options = new_tokens_after(config, ids.shape[1]), options_of(config, model.config, len(ids), tokenizer)
    traced: Any = (ids, *align(ids, mask))
    return Request(config, model.config, tokenizer, None, traced[0], traced[1], traced[2], new, options)


def is_traced(*trees: Any) -> bool:
    """Whether anything in these trees has no value yet."""
    return not all(map(is_concrete, jax.tree.leaves(trees)))


def check_guided(config: GenerationConfig, traced: bool) -> None:
    """A loop that is guided from outside cannot be part of another function."""
    for name, is_on in (
        ("sliding_window", config.sliding_window),
        ("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens is not None),
    ):
        if traced and is_on:
            raise InputError(f"{name}: cannot be used while generate is traced; leave it out, or call it outside")
