"""The compiled functions of generation in Flax, and the loop that calls them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gpt2_multi.flax.attention import KVCache, as_cache, upcast
from gpt2_multi.flax.generation.cpu_kernels import Kernels, are_worthwhile, transposed
from gpt2_multi.flax.generation.decoding import (
    INSIDE,
    Prompt,
    Sampling,
    State,
    Weights,
    begin,
    decode,
    prefill,
    slide,
)
from gpt2_multi.flax.parameters.axes import on_automatic_axes
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Given, Request
from gpt2_multi.generation.rules import bucket

MOST = 16  # sets of a caller's functions that stay compiled


@dataclass(frozen=True)
class Decoders:
    """The compiled functions of a model; `decode` writes over the state that it is given."""

    start: Callable[..., State]
    prefill: Callable[..., dict[str, Any]]
    begin: Callable[..., State]
    decode: Callable[..., State]
    transposed: Callable[..., Kernels]
    callbacks: set[Callbacks] = field(default_factory=set)  # which they were compiled with
    kept: dict[str, Any] = field(default_factory=dict)  # what others have compiled of the model

    @classmethod
    def of(cls, model: Any) -> Decoders:
        """Those of a model, which are compiled when they are first called."""
        return cls(
            jax.jit(lambda strategy, prompt, options: strategy.start(model, prompt, options), static_argnums=0),
            jax.jit(partial(prefill, model), static_argnums=(2, 3)),
            jax.jit(partial(begin, model), static_argnums=3),
            jax.jit(partial(decode, model), static_argnums=2, donate_argnums=1),
            jax.jit(transposed),
        )

    def has_room(self, callbacks: Callbacks) -> bool:
        """Whether there is room for what is compiled with these functions."""
        self.callbacks.add(callbacks)
        return len(self.callbacks) <= MOST


class Source(NamedTuple):
    """What a generation reads besides prompts."""

    params: Tree
    past: KVCache | None = None  # with the first columns of each prompt
    assistant: Any = None  # a model

    @classmethod
    def of(cls, model: Any, params: Tree | None, given: Given) -> Source:
        """What a call was given of it, and the model's own parameters where it was given none."""
        past = as_cache(given.past_key_values, 0, model.scan_layers)
        return cls(model.fitting(params), past, given.assistant_model)


def weights_of(model: Any, source: Source, strategy: Sampling, prompt: Prompt, several: bool) -> Weights:
    """What the loop multiplies by: the kernels transposed, where `several` tokens are made at once and it is quicker.

    An assistant's layers would take those of the same names for theirs.
    """
    if source.assistant is not None:
        return Weights(source.params, {}, on_automatic_axes(source.assistant.fitting(None)))
    rows = len(prompt.ids) * strategy.rows * (1 + strategy.guesses) * (1 if prompt.negative is None else 2)
    is_quicker = several and are_worthwhile(model, rows, strategy.room)
    return Weights(source.params, model.decoders.transposed(source.params) if is_quicker else {})


def started(
    model: Any, weights: Weights, source: Source, request: Request, strategy: Sampling, prompt: Prompt, options: Options
) -> tuple[State, int]:
    """The state in which prompts are read, and how many tokens were made: one, where they are read to their end."""
    params, state = weights.params, model.decoders.start(strategy, prompt, options)
    if source.assistant is not None:
        beside = prompt._replace(states=None, states_mask=None, negative=None)
        read = source.assistant.decoders.prefill(weights.assistant, beside, strategy.room, 1)
        state = state._replace(helper=(read["window"], read["cache"]))
    all_are_ids = source.past is None and prompt.embeds is None and prompt.negative is None
    if not all_are_ids or set(INSIDE) & set(strategy.records):
        return model.decoders.begin(params, prompt, state, strategy, request.new_tokens, options, source.past), 1
    if request.config.sliding_window:
        return state, 0
    return state._replace(**model.decoders.prefill(params, prompt, strategy.room, strategy.rows)), 0


def states_of(
    model: Any, source: Source, request: Request, strategy: Sampling, part: tuple[Prompt, Options], stride: int
) -> Iterator[State]:
    """The states after every `stride` tokens or more, and where a window is full, which slides and is read anew.

    Once `max_time` is over, beams are finished by one step more. Where nothing stops it, nothing waits for the device.
    """
    config, new, longest, since = request.config, request.new_tokens, model.config.n_positions, monotonic()
    prompt, options = part
    weights = weights_of(model, source, strategy, prompt, stride > 1)
    sliding, room = config.sliding_window, min(max(longest // 2, 1), new)
    state, step = started(model, weights, source, request, strategy, prompt, options)
    first, until = stride if config.max_time is None else 1, 0 if sliding else new
    if step:
        yield state
    while step < new:
        if step == until:
            window = slide(prompt.repeated(strategy.rows), state, longest)
            until = min(step + min(longest + 1 - int(window.mask.sum(-1).max()), room), new)
            state = state._replace(**model.decoders.prefill(source.params, window, bucket(room), 1))
        reached = min(step + (stride if step else first), until)
        state = model.decoders.decode(weights, state, strategy, reached, new, options)
        yield state
        if reached == new or not strategy.is_open(state):
            return
        step = int(state.step)
        if config.max_time is not None and monotonic() - since >= config.max_time:
            new = until = step + 1 if config.num_beams > 1 else step


@jax.jit
def log_probs_of(logits: Array, ids: Array) -> tuple[Array, Array]:
    """The log-probability of each id (B, T) by its logits (B, T, V), and whether none is likelier."""
    likeliest, logits = logits.argmax(-1) == ids, upcast(logits)
    return jnp.take_along_axis(logits, ids[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1), likeliest
