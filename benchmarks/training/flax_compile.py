"""Seconds until XLA has compiled gpt2-xl for a CPU, its layers one after the other or scanned; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import OURS, Row, compare, folders, rounds
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.training.state import Loss
from gpt2_multi.model.config import GPT2Config

WAYS = {OURS: False, f"{OURS}, scan_layers": True}
SMALL = {"config": folders.TINY, "length": 8}


def run(config: GPT2Config | None = None, batch: int = 1, length: int = 128, count: int = 1) -> list[Row]:
    """Trace and compile the loss, and then the loss and its gradients, of a batch of this shape.

    Some minutes pass over the gradients of layers that are not scanned, so no round goes before those that count.
    """
    config, rows = folders.plain(config or GPT2Config(n_embd=1600, n_layer=48, n_head=25)), []
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    for what, change in (("forward", lambda loss: loss), ("forward and backward", partial(jax.grad, has_aux=True))):
        title = f"JAX, compile {what}, {config.n_layer} layers"
        ways = {who: partial(compile_loss, config, scan, change, ids) for who, scan in WAYS.items()}
        rows += compare(title, rounds(title, ways, count, before=0), "s")
    return rows


def compile_loss(config: GPT2Config, scan: bool, change: Callable[..., Any], ids: jax.ShapeDtypeStruct) -> None:
    """Compile the loss, so changed, for parameters that need no memory."""
    jax.clear_caches()
    model = FlaxGPT2LMHeadModel(config, _do_init=False, scan_layers=scan)
    batch = {"input_ids": ids, "labels": ids}
    jax.jit(change(Loss(model.module, model.head, model.check))).lower(model.params_shape_tree, batch).compile()
