"""Decoding in Flax: a model that reads texts into a cache, and the compiled loop that goes on with them.

How it goes on, by choice after choice, in beams or by guesses, is a strategy, which is compiled in. B prompts, R rows
(each prompt in several), T prompt length, W window length, S ids (prompt and room), V vocabulary, N new tokens that
there is room for, G tokens that are proposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt2_multi.flax.attention import KVCache, positions, upcast
from gpt2_multi.flax.generation.cpu_kernels import Kernels, multiplied_first
from gpt2_multi.flax.generation.rules import choose, ends, process
from gpt2_multi.flax.layers import as_array
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Request, aligned
from gpt2_multi.generation.rules import bucket, window_start


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: Any  # (B, T) int32
    mask: Any  # (B, T) bool
    states: Any  # (B, encoder length, E), or None
    states_mask: Any  # (B, encoder length), or None

    @classmethod
    def of(cls, request: Request, states: Any, states_mask: Any) -> Prompt:
        """The rows of a request, up to their bucket's length."""
        states, states_mask = as_array("encoder_hidden_states", states), as_array("encoder_attention_mask", states_mask)
        return cls(request.ids.astype(np.int32), request.mask, states, states_mask).bucketed()

    def repeated(self, rows: int) -> Prompt:
        """Each row so many times."""
        return self if rows == 1 else Prompt(*(None if x is None else jnp.repeat(x, rows, axis=0) for x in self))

    def row(self, row: int) -> Prompt:
        """One row alone."""
        return Prompt(*(None if x is None else x[row : row + 1] for x in self))

    def bucketed(self, least: int = 1) -> Prompt:
        """With padding before it, up to the length of a bucket, `least` or more."""
        pad = np.pad if isinstance(self.ids, np.ndarray) else jnp.pad
        length = self.ids.shape[1]
        more = [(0, 0), (bucket(max(length, least)) - length, 0)]
        return self._replace(ids=pad(self.ids, more), mask=pad(self.mask, more))


class State(NamedTuple):
    """What the loop carries from one token to the next."""

    step: Array  # () int32, how many tokens were made
    length: Array  # () int32, of the prompt and what was made
    ids: Array  # (R, S) int32, the prompt and what was made
    mask: Array  # (R, S) bool, which of them are there and count
    shown: Array  # (R, N) int32, what the caller sees of what was made: filling where a row is finished
    finished: Array  # (R,) bool
    stop: Array  # (R,) int32, the state of the stop strings
    records: dict[str, Array]  # log_probs (R, N); scores and logits (N, R, V)
    beams: Any = None  # a BeamState, where beams are searched
    window: Any = None  # a Prompt of R rows without ids: what the cache was filled with
    cache: Any = None  # a KVCache, which holds all but the last token of each row


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or a sample, one token of each row after the other; another value compiles the loop anew."""

    room: int  # for how many tokens
    rows: int = 1  # of each prompt
    records: tuple[str, ...] = ()  # what is kept of each step; see `GenerationConfig.records`
    guesses: int = 0  # how many tokens are proposed

    def start(self, model: Any, prompt: Prompt, options: Options) -> State:
        """The state before the first token, with nothing in a cache yet."""
        ids, mask, *_ = prompt.repeated(self.rows)
        rows, length = ids.shape
        more, wide = [(0, 0), (0, self.room)], jnp.promote_types(model.dtype, jnp.float32)
        shape = (self.room, rows, model.config.vocab_size)
        kinds = {"log_probs": ((rows, self.room), wide), "scores": (shape, wide), "logits": (shape, model.dtype)}
        return State(
            step=jnp.int32(0),
            length=jnp.int32(length),
            ids=jnp.pad(ids, more),
            mask=jnp.pad(mask, more),
            shown=jnp.full((rows, self.room), options.fill, jnp.int32),
            finished=jnp.zeros(rows, bool),
            stop=jnp.zeros(rows, jnp.int32),
            records={name: jnp.zeros(*kinds[name]) for name in self.records},
        )

    def is_open(self, state: State) -> Array:
        """Whether a row goes on, ()."""
        return ~state.finished.all()

    def propose(self, state: State, new: Any, options: Options) -> Array:
        """What is read after the last token of each row, in the hope that it is what will be chosen: (R, G)"""
        return state.ids[:, :0]

    def update(self, state: State, logits: Array, proposed: Array, new: Any, options: Options) -> State:
        """The state one token further, by the logits (R, 1, V) after the last one."""
        processed = process(upcast(logits[:, 0]), state.ids, state.mask, state.length, state.step, options)
        chosen = choose(processed, state.step, options)
        return accept(record(state, logits[:, 0], processed, chosen), chosen, options)


def prefill(model: Any, params: Tree, prompt: Prompt, room: int, rows: int) -> dict[str, Any]:
    """The window and the cache of a state: prompts up to the last token, which is the first that a step reads."""
    batch, length = prompt.ids.shape
    cache = model(
        prompt.ids[:, :-1],
        attention_mask=jnp.pad(prompt.mask, [(0, 0), (0, room)]),
        position_ids=positions(prompt.ids, prompt.mask, 0)[:, :-1],
        encoder_hidden_states=prompt.states,
        encoder_attention_mask=prompt.states_mask,
        params=params,
        past_key_values=KVCache.empty(model.config, batch, length + room, model.dtype, model.scan_layers),
        return_dict=True,
    ).past_key_values
    window = prompt._replace(ids=None, states=None).repeated(rows)
    return {"window": window, "cache": spread(cache, rows)}


def decode_step(model: Any, params: Tree, state: State, proposed: Array) -> tuple[Array, KVCache]:
    """The logits (R, 1 + G, V) after the last token of each row and after each that is proposed, and the cache.

    A proposed -1 is none; where all are, none is read. What has no position any more gets the last one; nobody looks.
    """
    window, cache = state.window, state.cache
    last = lax.dynamic_slice_in_dim(state.ids, state.length - 1, 1, axis=1)  # (R, 1)
    room, made = cache.capacity - window.mask.shape[1], cache.length - (window.mask.shape[1] - 1)

    def read(tokens: Array) -> tuple[Array, KVCache]:
        count = tokens.shape[1]
        there = jnp.broadcast_to(jnp.arange(room) < made + count - 1, (len(tokens), room))
        places = window.mask.sum(-1, dtype=jnp.int32)[:, None] + made - 1 + jnp.arange(count, dtype=jnp.int32)
        outputs = model(
            tokens,
            attention_mask=jnp.concatenate([window.mask, there], 1),
            position_ids=jnp.minimum(places, model.config.n_positions - 1),
            encoder_attention_mask=window.states_mask,
            params=params,
            past_key_values=cache,
            return_dict=True,
        )
        return outputs.logits, outputs.past_key_values

    def alone() -> tuple[Array, KVCache]:
        logits, after = read(last)
        return jnp.pad(logits, [(0, 0), (0, proposed.shape[1]), (0, 0)]), after

    if not proposed.shape[1]:
        return read(last)
    both = jnp.concatenate([last, jnp.maximum(proposed, 0)], 1)
    return lax.cond((proposed >= 0).any(), lambda: read(both), alone)


def decode(
    model: Any,
    params: Tree,
    state: State,
    strategy: Sampling,
    until: Any,
    new: Any,
    options: Options,
    kernels: Kernels,
) -> State:
    """Go on until `until` of `new` tokens are made, or the strategy has enough; see `cpu_kernels` for the last."""

    def is_open(state: State) -> Array:
        return (state.step < until) & strategy.is_open(state)

    def once(state: State) -> State:
        proposed = strategy.propose(state, new, options)
        logits, cache = decode_step(model, params, state, proposed)
        return strategy.update(state._replace(cache=cache), logits, proposed, new, options)

    with multiplied_first(kernels):
        return lax.while_loop(is_open, once, state)


def spread(cache: KVCache, rows: int) -> KVCache:
    """The cache with each row so many times; the rows are the first axis, but of stacked layers."""

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, rows, axis=x.ndim - 4)

    layers, cross = (cache.layers, cache.cross) if rows == 1 else jax.tree.map(repeated, (cache.layers, cache.cross))
    return KVCache(layers, cross, cache.length)


def record(state: State, logits: Array, processed: Array, chosen: Array) -> State:
    """The state with the records of one more step; filling has the log-probability 0."""
    records = dict(state.records)
    for name, value in (("logits", logits), ("scores", processed)):
        if name in records:
            records[name] = records[name].at[state.step].set(value.astype(records[name].dtype))
    if "log_probs" in records:
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(processed), chosen[:, None], -1)[:, 0]
        log_probs = jnp.where(state.finished, 0, log_probs).astype(records["log_probs"].dtype)
        records["log_probs"] = records["log_probs"].at[:, state.step].set(log_probs)
    return state._replace(records=records)


def accept(state: State, chosen: Array, options: Options) -> State:
    """The state with one more token in each row, (R,)."""
    over, stop = ends(chosen, state.stop, options)
    shown = jnp.where(state.finished, options.fill, chosen)
    return state._replace(
        step=state.step + 1,
        length=state.length + 1,
        ids=put(state.ids, chosen, state.length),
        mask=put(state.mask, jnp.ones_like(state.finished), state.length),
        shown=put(state.shown, shown, state.step),
        finished=state.finished | over,
        stop=stop,
    )


def put(rows: Array, values: Array, place: Array) -> Array:
    """Rows (R, S) with these values (R,) at a place."""
    return lax.dynamic_update_slice_in_dim(rows, values[:, None], place, axis=1)


def slide(prompt: Prompt, state: State, longest: int) -> Prompt:
    """What a window of so many tokens shows of each row, (R, W); W is the same for all texts that are longer."""
    length = int(state.length)
    ids, mask = np.asarray(state.ids)[:, :length], np.asarray(state.mask)[:, :length]
    counts = mask.cumsum(-1)  # (R, length)
    starts = np.array([window_start(int(count), longest) for count in counts[:, -1]])
    rows = aligned(ids, mask & (counts > starts[:, None]))
    return Prompt(*rows, prompt.states, prompt.states_mask).bucketed(min(length, longest))


def align(ids: Array, mask: Array) -> tuple[Array, Array]:
    """Ids and mask (B, T), whose values may not be known yet, with padding on the left."""
    order = jnp.argsort(mask, axis=-1, stable=True)  # hidden tokens first
    return jnp.take_along_axis(ids, order, 1), jnp.take_along_axis(mask, order, 1)
