"""Training in Flax: losses, the state of a run, its data, and resuming it, whose Orbax waits until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpt2_multi.flax.training.adapters import load_adapters, save_adapters
from gpt2_multi.flax.training.lora import LoraConfig, init_adapters, merge
from gpt2_multi.flax.training.losses import classification_loss, cosine_schedule, cross_entropy, lm_loss, span_loss
from gpt2_multi.flax.training.optimizers import cosine_rate, decay_mask, optimizer
from gpt2_multi.flax.training.state import TrainState, create_train_state, eval_step, train_step, update
from gpt2_multi.flax.training.windows import Windows

if TYPE_CHECKING:
    from gpt2_multi.flax.training.resuming import restore_state, save_state, saved_steps

__all__ = [
    "LoraConfig",
    "TrainState",
    "Windows",
    "classification_loss",
    "cosine_rate",
    "cosine_schedule",
    "create_train_state",
    "cross_entropy",
    "decay_mask",
    "eval_step",
    "init_adapters",
    "lm_loss",
    "load_adapters",
    "merge",
    "optimizer",
    "restore_state",
    "save_adapters",
    "save_state",
    "saved_steps",
    "span_loss",
    "train_step",
    "update",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gpt2_multi.flax.training' has no attribute {name!r}")
    from gpt2_multi.flax.training import resuming

    return getattr(resuming, name)
