"""What a call of the Flax model may be given, looked at before it is compiled; the words are `limits`'s.

Inside another function that is traced, shapes are looked at, and values cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt2_multi.errors import InputError
from gpt2_multi.flax.attention import KVCache
from gpt2_multi.model import inputs

if TYPE_CHECKING:
    from gpt2_multi.flax.loading import FlaxGPT2PreTrainedModel
    from gpt2_multi.model.config import GPT2Config

POLICIES = (  # of jax.checkpoint_policies
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


def as_array(name: str, value: Any) -> Any:
    """Lists and NumPy arrays as arrays of JAX."""
    if value is None or isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(narrowed(value))
    except OverflowError:
        raise InputError(f"{name}: found an integer that no id can be; give what the tokenizer made") from None
    except (TypeError, ValueError):
        raise no_numbers(name, value) from None


def no_numbers(name: str, value: Any) -> InputError:
    """The error for what is no array."""
    return InputError(
        f"{name}: expected rows of numbers, all of one length, found {type(value).__name__}; pad them, and give "
        "attention_mask"
    )


def on_host(name: str, value: Any) -> Any:
    """Lists as arrays of NumPy; arrays of JAX stay where they are."""
    if isinstance(value, jax.Array):
        return value
    try:
        found = np.asarray(value)
    except (TypeError, ValueError):
        raise no_numbers(name, value) from None
    if found.dtype.kind in "OSU":
        raise no_numbers(name, value)
    return found


def narrowed(value: Any) -> Any:
    """An array of NumPy; integers that JAX's would cut off are as great as they can be, so that they stay wrong."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        return value
    limit = np.iinfo(np.int64 if jax.config.jax_enable_x64 else np.int32)  # type: ignore[attr-defined]
    return value.clip(limit.min, limit.max) if value.dtype.itemsize == 8 else value


def check_call(model: FlaxGPT2PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Every input of the body, (B, T) ids and what goes with them, has to fit the configuration and the others."""
    config, cache = model.config, given.get("past_key_values")
    source = check_source(config, given.get("input_ids"), given.get("inputs_embeds"))
    if cache is not None:
        check_cache(cache, source.shape[0], source.shape[1], model)
    check_shapes(config, source, given, cache)
    check_states(config, len(source), given.get("encoder_hidden_states"), given.get("encoder_attention_mask"))
    for name in ("input_ids", "token_type_ids", "position_ids"):
        check_values(config, name, given.get(name))
    if given.get("position_ids") is None:
        past = 0 if cache is None else cache.length
        check_end(config, past, source.shape[1], given.get("attention_mask"))


def check_source(config: GPT2Config, input_ids: Array | None, inputs_embeds: Array | None) -> Array:
    """The ids (B, T) or the embeddings (B, T, E), whichever is given."""
    inputs.check_given(input_ids, inputs_embeds)
    if input_ids is not None:
        inputs.check_shape("input_ids", input_ids.shape, (None, None))
        return input_ids
    assert inputs_embeds is not None
    inputs.check_shape("inputs_embeds", inputs_embeds.shape, (None, None, config.n_embd))
    if not jnp.issubdtype(inputs_embeds.dtype, jnp.floating):
        raise InputError(f"inputs_embeds: expected floats, found {inputs_embeds.dtype}; ids are input_ids")
    return inputs_embeds


def check_shapes(config: GPT2Config, source: Array, given: Mapping[str, Any], cache: KVCache | None) -> None:
    """Every input has to fit the (B, T) of the call and the room of the cache."""
    (batch, length), mask, head_mask = source.shape[:2], given.get("attention_mask"), given.get("head_mask")
    keys = length if cache is None else cache.capacity
    if mask is not None:
        inputs.check_mask(mask.shape, batch, config.n_head, length, keys)
    for name in ("token_type_ids", "position_ids"):
        if given.get(name) is not None:
            shape = given[name].shape
            rows = 1 if name == "position_ids" and shape[:1] == (1,) else batch
            inputs.check_shape(name, shape, (rows, length))
    if head_mask is not None:
        inputs.check_head_mask(head_mask.shape, (config.n_layer, batch, config.n_head, length, keys))


def check_cache(cache: object, batch: int, length: int, model: FlaxGPT2PreTrainedModel) -> None:
    """A cache comes from `init_cache`, for as many rows, and has room for the new tokens."""
    layers, stacked = model.config.n_layer, model.scan_layers
    if not isinstance(cache, KVCache) or len(cache) != layers or cache.stacked != stacked:
        raise InputError(
            f"past_key_values: expected a cache of {layers} layers from init_cache(batch_size, max_length) of this "
            f"model{' with scan_layers' if stacked else ''}, or what a call made of it, found {type(cache).__name__}"
        )
    check_alive("past_key_values", cache)
    key = (cache.layers if cache.stacked else cache.layers[0])[0]
    inputs.check_cache(key.shape[-4], str(key.dtype), batch, str(jnp.dtype(model.dtype)))
    if is_concrete(cache.length):
        inputs.check_room(length, int(cache.length), cache.capacity)


def check_states(config: GPT2Config, batch: int, states: Array | None, mask: Array | None) -> None:
    """An encoder's states are (B, encoder length, E), their mask (B, encoder length)."""
    if states is not None:
        inputs.check_encoder(config.add_cross_attention)
        inputs.check_shape("encoder_hidden_states", states.shape, (batch, None, config.n_embd))
    if mask is not None:
        inputs.check_shape("encoder_attention_mask", mask.shape, (batch, None) if states is None else states.shape[:2])


def check_values(config: GPT2Config, name: str, value: Array | None) -> None:
    """Every id has to be in the vocabulary, and every position among the positions."""
    if value is None:
        return
    inputs.check_integers(name, value.dtype, bool(jnp.issubdtype(value.dtype, jnp.integer)))
    if not is_concrete(value):
        return
    if name == "position_ids":
        inputs.check_positions(*extremes(value), config.n_positions)
    else:
        inputs.check_ids(name, *extremes(value), config.vocab_size)


def check_end(config: GPT2Config, past: Array | int, length: int, mask: Array | None) -> None:
    """Positions that count unmasked tokens have to end within the positions."""
    if not is_concrete(past) or not is_concrete(mask):
        return
    keys = int(past) + length
    if mask is not None and mask.ndim == 2:
        keys = int((np.asarray(mask)[:, :keys] != 0).sum(-1).max(initial=0))
    inputs.check_positions(0, keys - 1, config.n_positions)


def check_classes(labels: Array | None, number: int) -> None:
    """Labels have to be classes or -100; what is wrong in them but their values, the loss finds while it is traced."""
    if labels is not None and is_concrete(labels) and jnp.issubdtype(labels.dtype, jnp.integer):
        inputs.check_labels(*extremes(labels), number)


def check_alive(name: str, tree: Any) -> None:
    """JAX gives the memory of a donated argument to the function that it is donated to."""
    if any(isinstance(x, Array) and is_concrete(x) and x.is_deleted() for x in jax.tree.leaves(tree)):
        raise InputError(
            f"{name}: the memory was given away, to a function that arguments are donated to such as train_step; go on "
            "with what that returned, or give it a copy"
        )


def check_key(name: str, key: Any) -> None:
    """Dropout is drawn with one key, typed or of the old kind."""
    dtype, rank = getattr(key, "dtype", None), np.ndim(key)
    if dtype is None or not (
        dtype == np.uint32 if rank == 1 else not rank and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    ):
        found = type(key).__name__ if dtype is None else f"{dtype}{list(np.shape(key))}"
        raise InputError(f"{name}: expected one key, such as jax.random.key(0), found {found}")


def as_flag(name: str, value: Any) -> bool:
    """Whether something is wanted; it decides what is compiled."""
    try:
        return bool(value)
    except (TypeError, ValueError):  # traced, or several values
        raise InputError(f"{name}: expected True or False, found {type(value).__name__}; it cannot be traced") from None


def check_remat(policy: str | None) -> None:
    """What a backward pass computes again is the name of a policy, one that needs nothing more."""
    if policy is not None and policy not in POLICIES:
        raise InputError(f"remat: expected None or one of {', '.join(POLICIES)}, found {policy!r}")


def is_concrete(value: Any) -> bool:
    """Whether an array has values already."""
    return not isinstance(value, jax.core.Tracer)


def extremes(ids: Any) -> tuple[int, int]:
    """The least and the greatest of some ids; (0, 0) of none. NumPy finds them without compiling anything."""
    ids = np.asarray(ids)
    return (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
