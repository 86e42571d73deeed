"""TensorFlow behind the calls that every backend has: see `gpt2_multi.app.backends.Adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.tf.heads import TFGPT2LMHeadModel

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]


def devices() -> list[str]:
    """Where TensorFlow can compute, the fastest kind first."""
    return [*(f"gpu:{i}" for i in range(len(tf.config.list_physical_devices("GPU")))), "cpu"]


def dtypes(device: str) -> list[str]:
    """The floating-point dtypes that a device computes in."""
    return ["float64", "float32", "bfloat16", "float16"]


def load(folder: Path, device: str, dtype: str = "float32") -> TFGPT2LMHeadModel:
    """The language model in a folder, on a device."""
    with tf.device(device):
        return TFGPT2LMHeadModel.from_pretrained(folder, param_dtype=dtype)


def logits(model: TFGPT2LMHeadModel, ids: Array) -> Array:
    """The logits (B, T, V), in float64, of ids (B, T)."""
    return model(tf.convert_to_tensor(ids), use_cache=False).logits.numpy().astype(np.float64)


def hidden_states(model: TFGPT2LMHeadModel, ids: Array) -> list[Array]:
    """What goes into each layer and what the last norm gives, (B, T, E) each, in float64, of ids (B, T)."""
    outputs = model(tf.convert_to_tensor(ids), use_cache=False, output_hidden_states=True)
    return [hidden.numpy().astype(np.float64) for hidden in outputs.hidden_states]


def stream(
    model: TFGPT2LMHeadModel, ids: Array, config: GenerationConfig, tokenizer: GPT2Tokenizer | None = None
) -> Iterator[Array]:
    """New ids, one column (B * num_return_sequences,) at a time, that continue ids (B, T).

    Without XLA: a text is written before XLA has compiled what writes it.
    """
    for column in model.stream_tokens(
        tf.convert_to_tensor(ids), generation_config=config, tokenizer=tokenizer, jit_compile=False
    ):
        yield column.numpy()


def stream_text(
    model: TFGPT2LMHeadModel, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig
) -> Iterator[str]:
    """What continues a text, piece by piece."""
    return model.stream(text, config, tokenizer=tokenizer, jit_compile=False)


def generate_texts(
    model: TFGPT2LMHeadModel, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig
) -> list[str]:
    """A text with what continues it, as often as `config` says."""
    made = model.generate(text, generation_config=config, tokenizer=tokenizer, jit_compile=False)
    return [made] if isinstance(made, str) else list(made)
