"""The compiled functions of generation in Flax, and the loop that calls them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt2_multi.flax.attention import upcast
from gpt2_multi.flax.generation.cpu_kernels import Kernels, are_worthwhile, transposed
from gpt2_multi.flax.generation.decoding import Prompt, Sampling, State, decode, prefill, slide
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Request
from gpt2_multi.generation.rules import bucket


@dataclass(frozen=True)
class Decoders:
    """The compiled functions of a model; `decode` writes over the state that it is given."""

    start: Callable[..., State]
    prefill: Callable[..., dict[str, Any]]
    decode: Callable[..., State]
    transposed: Callable[..., Kernels]

    @classmethod
    def of(cls, model: Any) -> Decoders:
        """Those of a model, which are compiled when they are first called."""
        return cls(
            jax.jit(lambda strategy, prompt, options: strategy.start(model, prompt, options), static_argnums=0),
            jax.jit(partial(prefill, model), static_argnums=(2, 3)),
            jax.jit(partial(decode, model), static_argnums=2, donate_argnums=1),
            jax.jit(transposed),
        )


def kernels_of(model: Any, params: Tree, strategy: Sampling, prompt: Prompt) -> Kernels:
    """The kernels that a whole loop multiplies by, if that is quicker."""
    rows = len(prompt.ids) * strategy.rows * (1 + strategy.guesses)
    return model.decoders.transposed(params) if are_worthwhile(model, rows, strategy.room) else {}


def states_of(
    model: Any,
    params: Tree,
    request: Request,
    strategy: Sampling,
    prompt: Prompt,
    options: Options,
    stride: int,
    kernels: Kernels,
) -> Iterator[State]:
    """The states after every `stride` tokens or more, and where a window is full, which slides and is read anew."""
    new, longest = request.new_tokens, model.config.n_positions
    sliding, room = request.config.sliding_window, min(max(longest // 2, 1), request.new_tokens)
    state, step, until = model.decoders.start(strategy, prompt, options), 0, 0 if sliding else new
    if not sliding:
        state = state._replace(**model.decoders.prefill(params, prompt, strategy.room, strategy.rows))
    while step < new:
        if step == until:
            window = slide(prompt.repeated(strategy.rows), state, longest)
            until = min(step + min(longest + 1 - int(window.mask.sum(-1).max()), room), new)
            state = state._replace(**model.decoders.prefill(params, window, bucket(room), 1))
        reached = min(step + stride, until)
        state = model.decoders.decode(params, state, strategy, reached, new, options, kernels)
        yield state
        if reached == new or not strategy.is_open(state):
            return
        step = int(state.step)


@jax.jit
def log_probs_of(logits: Array, ids: Array) -> Array:
    """The log-probability of each id (B, T) by its logits (B, T, V)."""
    logits = upcast(logits)
    return jnp.take_along_axis(logits, ids[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)
