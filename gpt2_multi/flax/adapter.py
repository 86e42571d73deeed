"""JAX behind the calls that every backend has: see `gpt2_multi.app.backends.Adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gpt2_multi.flax.classes import FlaxGPT2LMHeadModel
from gpt2_multi.generation.config import GenerationConfig

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]


def devices() -> list[str]:
    """Where JAX can compute, the fastest kind first."""
    fast = [f"{device.platform}:{i}" for i, device in enumerate(jax.devices()) if device.platform != "cpu"]
    return [*fast, "cpu"]


def dtypes(device: str) -> list[str]:
    """The floating-point dtypes that a device computes in; float64 where the process has switched it on."""
    wide = jax.config.jax_enable_x64 and not device.startswith("tpu")  # type: ignore[attr-defined]
    return [*(["float64"] if wide else []), "float32", "bfloat16", "float16"]


def load(folder: Path, device: str, dtype: str = "float32") -> FlaxGPT2LMHeadModel:
    """The language model in a folder, on a device."""
    kind, _, number = device.partition(":")
    with jax.default_device(jax.devices(kind)[int(number or 0)]):
        model = FlaxGPT2LMHeadModel.from_pretrained(folder, param_dtype=dtype)
    assert isinstance(model, FlaxGPT2LMHeadModel)
    return model


def logits(model: FlaxGPT2LMHeadModel, ids: Array) -> Array:
    """The logits (B, T, V), in float64, of ids (B, T)."""
    return np.asarray(model(ids).logits).astype(np.float64)


def hidden_states(model: FlaxGPT2LMHeadModel, ids: Array) -> list[Array]:
    """What goes into each layer and what the last norm gives, (B, T, E) each, in float64, of ids (B, T)."""
    return [np.asarray(hidden).astype(np.float64) for hidden in model(ids, output_hidden_states=True).hidden_states]


def stream(
    model: FlaxGPT2LMHeadModel, ids: Array, config: GenerationConfig, tokenizer: GPT2Tokenizer | None = None
) -> Iterator[Array]:
    """New ids, one column (B * num_return_sequences,) at a time, that continue ids (B, T)."""
    for column in model.stream_tokens(ids, generation_config=config, tokenizer=tokenizer):
        yield np.asarray(column)


def stream_text(
    model: FlaxGPT2LMHeadModel, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig
) -> Iterator[str]:
    """What continues a text, piece by piece."""
    return model.stream(text, config, tokenizer=tokenizer)


def generate_texts(
    model: FlaxGPT2LMHeadModel, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig
) -> list[str]:
    """A text with what continues it, as often as `config` says."""
    made = model.generate(text, generation_config=config, tokenizer=tokenizer)
    return [made] if isinstance(made, str) else list(made)
