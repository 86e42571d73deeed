"""What a call of the PyTorch model may be given, looked at before a kernel runs; the words are `limits`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.pt.attention import KVCache, Pair

if TYPE_CHECKING:
    from gpt2_multi.pt.model import GPT2Model


def check_tensors(**inputs: object) -> None:
    """Whatever is given has to be a tensor."""
    for name, value in inputs.items():
        if value is not None and not isinstance(value, Tensor):
            raise InputError(f"{name}: expected a torch.Tensor, found {type(value).__name__}; use torch.as_tensor")


def check_source(model: GPT2Model, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The ids (B, T) or the embeddings (B, T, E), whichever is given."""
    inputs.check_given(input_ids, inputs_embeds)
    if input_ids is not None:
        inputs.check_shape("input_ids", input_ids.shape, (None, None))
        return input_ids
    assert inputs_embeds is not None
    inputs.check_shape("inputs_embeds", inputs_embeds.shape, (None, None, model.config.n_embd))
    if not inputs_embeds.is_floating_point():
        raise InputError(f"inputs_embeds: expected floats, found {inputs_embeds.dtype}; ids are input_ids")
    return inputs_embeds


def check_past(model: GPT2Model, past: KVCache | Sequence[Pair] | None) -> None:
    """A cache has a (key, value) pair for each layer, each (B, H, S, D); a new one may still be empty."""
    layers = past.layers if isinstance(past, KVCache) else past
    if layers is None or (isinstance(past, KVCache) and not layers):
        return
    fits = isinstance(layers, (list, tuple)) and len(layers) == len(model.h)
    if not fits or not all(_is_pair(layer) for layer in layers):
        raise InputError(
            f"past_key_values: expected what a call returned, a (key, value) pair for each of {len(model.h)} layers, "
            f"found {type(past).__name__}; pass it back as it is, or use init_cache"
        )


def _is_pair(layer: object) -> bool:
    parts = layer[:2] if isinstance(layer, (list, tuple)) else ()
    return len(parts) == 2 and all(isinstance(x, Tensor) and x.dim() == 4 for x in parts)


def check_shapes(
    model: GPT2Model,
    source: Tensor,
    mask: Tensor | None,
    types: Tensor | None,
    position_ids: Tensor | None,
    head_mask: Tensor | None,
    cache: KVCache | None,
) -> None:
    """Every input has to fit the (B, T) of the call and what is cached."""
    batch, length = source.shape[:2]
    past = cache.length if cache is not None else 0
    if cache is not None and cache.layers:
        key = cache.layers[0][0]
        inputs.check_cache(key.shape[0], str(key.dtype), batch, str(model.dtype))
        if cache.capacity is not None:
            inputs.check_room(length, past, cache.capacity)
    if mask is not None:
        inputs.check_mask(mask.shape, batch, model.config.n_head, length, past + length)
    if types is not None:
        inputs.check_shape("token_type_ids", types.shape, (batch, length))
    if position_ids is not None:
        rows = 1 if len(position_ids) == 1 else batch
        inputs.check_shape("position_ids", position_ids.shape, (rows, length))
    if head_mask is not None:
        sizes = (model.config.n_layer, batch, model.config.n_head, length, past + length)
        inputs.check_head_mask(head_mask.shape, sizes)


def check_states(model: GPT2Model, batch: int, states: Tensor | None, mask: Tensor | None) -> None:
    """An encoder's states are (B, encoder length, E), their mask (B, encoder length)."""
    if states is not None:
        inputs.check_encoder(model.config.add_cross_attention)
        inputs.check_shape("encoder_hidden_states", states.shape, (batch, None, model.config.n_embd))
        if mask is not None:
            inputs.check_shape("encoder_attention_mask", mask.shape, states.shape[:2])


def check_values(model: GPT2Model, **ids: Tensor | None) -> None:
    """Every id has to be in the vocabulary, and every position among the positions."""
    for name, value in ids.items():
        if value is None:
            continue
        inputs.check_integers(name, value.dtype, value.dtype in (torch.int64, torch.int32))
        if name == "position_ids":
            inputs.check_positions(*extremes(value), model.wpe.num_embeddings)
        else:
            inputs.check_ids(name, *extremes(value), model.wte.num_embeddings)


def extremes(ids: Tensor) -> tuple[int, int]:
    """The least and the greatest of some ids; (0, 0) of none."""
    if not ids.numel():
        return 0, 0
    low, high = ids.aminmax()
    return int(low), int(high)
