"""The optimizer, and the learning rate under the schedule."""

from __future__ import annotations

from typing import Any

import jax
import optax

from gpt2_multi.flax.training.lora import A, B
from gpt2_multi.flax.training.losses import cosine_schedule
from gpt2_multi.model.spelling import FLAX

DECAYED = {A, B, *(FLAX.leaves[kind] for kind in ("embedding", "kernel", "linear"))}  # of the table's kinds


def decay_mask(params: Any) -> Any:
    """True where a parameter decays: matrices and embeddings, not biases and layer norms (Radford et al. 2018).

    The table's kinds decide, since unflattened and stacked biases have two dimensions and more.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def optimizer(
    learning_rate: float | optax.Schedule, weight_decay: float = 0.1, max_norm: float | None = 1.0, **options: Any
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) with gradients clipped to `max_norm` together (Pascanu et al. 2013).

    `options` are those of `optax.adamw`, such as b1, b2 and eps.
    """
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, **{"mask": decay_mask, **options})
    return adamw if max_norm is None else optax.chain(optax.clip_by_global_norm(max_norm), adamw)


def cosine_rate(learning_rate: float, steps: int, warmup: int = 0, least: float = 0.1) -> optax.Schedule:
    """A learning rate under `cosine_schedule`, for `optimizer`."""
    return lambda step: learning_rate * cosine_schedule(step, steps, warmup, least)
