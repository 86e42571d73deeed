"""PyTorch behind the calls that every backend has: see `gpt2_multi.app.backends.Adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.pt.heads import GPT2LMHeadModel
from gpt2_multi.pt.layers import to_numpy

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]


def devices() -> list[str]:
    """Where PyTorch can compute, the fastest kind first."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    return [*(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())), "cpu"]


def dtypes(device: str) -> list[str]:
    """The floating-point dtypes that a device computes in."""
    wide = [] if device.startswith("mps") else ["float64"]  # Apple's GPUs have none
    return [*wide, "float32", "bfloat16", "float16"]


def load(folder: Path, device: str, dtype: str = "float32") -> GPT2LMHeadModel:
    """The language model in a folder, on a device."""
    return GPT2LMHeadModel.from_pretrained(folder, param_dtype=dtype).to(device)


@torch.no_grad()
def logits(model: GPT2LMHeadModel, ids: Array) -> Array:
    """The logits (B, T, V), in float64, of ids (B, T)."""
    return to_numpy(model(torch.tensor(ids, device=model.device), use_cache=False).logits).astype(np.float64)


@torch.no_grad()
def hidden_states(model: GPT2LMHeadModel, ids: Array) -> list[Array]:
    """What goes into each layer and what the last norm gives, (B, T, E) each, in float64, of ids (B, T)."""
    outputs = model(torch.tensor(ids, device=model.device), use_cache=False, output_hidden_states=True)
    return [to_numpy(hidden).astype(np.float64) for hidden in outputs.hidden_states]


def stream(
    model: GPT2LMHeadModel, ids: Array, config: GenerationConfig, tokenizer: GPT2Tokenizer | None = None
) -> Iterator[Array]:
    """New ids, one column (B * num_return_sequences,) at a time, that continue ids (B, T)."""
    for column in model.stream_tokens(
        torch.tensor(ids, device=model.device), generation_config=config, tokenizer=tokenizer
    ):
        yield to_numpy(column)


def stream_text(model: GPT2LMHeadModel, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig) -> Iterator[str]:
    """What continues a text, piece by piece."""
    return model.stream(text, config, tokenizer=tokenizer)


def generate_texts(model: GPT2LMHeadModel, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig) -> list[str]:
    """A text with what continues it, as often as `config` says."""
    made = model.generate(text, generation_config=config, tokenizer=tokenizer)
    return [made] if isinstance(made, str) else list(made)
