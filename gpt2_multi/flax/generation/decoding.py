"""Decoding in Flax: a model that reads texts into a cache, and the compiled loop that goes on with them.

How it goes on, by choice after choice, in beams or by guesses, is a strategy, which is compiled in. B prompts, R rows
(each prompt in several), T prompt length, W window length, S ids (prompt and room), V vocabulary, N new tokens that
there is room for, G tokens that are proposed. Guided rows are read twice, with what they are led away from after them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt2_multi.errors import InputError
from gpt2_multi.flax.attention import KVCache, positions, upcast
from gpt2_multi.flax.generation.cpu_kernels import Kernels, multiplied_first
from gpt2_multi.flax.generation.rules import choose, ends, guide, process, without
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import NO_CALLBACKS, Given, Request, order_of
from gpt2_multi.generation.rules import bucket, window_start
from gpt2_multi.model import inputs

INSIDE = ("hidden_states", "attentions")  # records of what the model shows besides logits


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: Any  # (B, T) int32
    mask: Any  # (B, T) bool
    states: Any  # (B, encoder length, E), or None
    states_mask: Any  # (B, encoder length), or None
    types: Any = None  # (B, T) int32, or None
    embeds: Any = None  # (B, T, E), which are read in the place of ids, or None
    negative: Any = None  # ids and mask (B, T) each of what is guided away from, or None
    seen: Any = None  # (B, W) bool, of a cache's columns and of those read after them which count; None is `mask`
    number: Any = None  # (B,) int32, which of the prompts each is
    unseen: Any = None  # (B,) int32, how many columns at the left are no part of the caller's text

    @classmethod
    def of(cls, request: Request, given: Given, past: KVCache | None) -> Prompt:
        """The rows of a request, up to their bucket's length."""
        encoder, embeds = (given.encoder_hidden_states, given.encoder_attention_mask), given.inputs_embeds
        rows, length = request.ids.shape
        types = None if request.types is None else request.types.astype(np.int32)
        if embeds is not None:
            embeds = jnp.take_along_axis(embeds, jnp.asarray(request.order)[..., None], 1)
        unseen = bucket(length) - min(length, request.given.shape[1]) if request.callbacks.see_ids else 0
        prompt = cls(
            request.ids.astype(np.int32), request.mask, *encoder, types, embeds, request.negative,
            number=np.arange(rows, dtype=np.int32), unseen=np.full(rows, unseen, np.int32),
        ).bucketed()  # fmt: skip
        return prompt if past is None else prompt.after(request, past.capacity)

    def after(self, request: Request, capacity: int) -> Prompt:
        """Prompts of which a cache holds the first columns; the rest of them is read, up to its bucket's length."""
        length, held = request.ids.shape[1], request.past or 0
        mask = np.asarray(request.mask)
        told = np.pad(mask[:, :held], [(0, 0), (0, capacity - held)])
        rest = np.pad(mask[:, held:], [(0, 0), (bucket(length - held) - (length - held), 0)])
        return self._replace(seen=np.concatenate([told, rest], 1))

    def repeated(self, rows: int) -> Prompt:
        """Each row so many times."""
        return self if rows == 1 else jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), self)

    def doubled(self) -> Prompt:
        """All that is read: after the rows, those that they are guided away from."""
        if self.negative is None:
            return self
        twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), self._replace(negative=None))
        pairs = zip((self.ids, self.mask), self.negative, strict=True)
        ids, mask = (jnp.concatenate([x, jnp.asarray(other, x.dtype)]) for x, other in pairs)
        return twice._replace(ids=ids, mask=mask)

    def row(self, row: int) -> Prompt:
        """One row alone."""
        return jax.tree.map(lambda x: x[row : row + 1], self)

    def bucketed(self, least: int = 1) -> Prompt:
        """With padding before it, up to the length of a bucket, `least` or more."""
        length = self.ids.shape[1]
        more = bucket(max(length, least)) - length

        def filled(x: Any) -> Any:
            pad: Any = np.pad if isinstance(x, np.ndarray) else jnp.pad
            return pad(x, [(0, 0), (more, 0)] + [(0, 0)] * (x.ndim - 2))

        whole = (self.ids, self.mask, self.types, self.embeds, self.negative)
        names = ("ids", "mask", "types", "embeds", "negative")
        return self._replace(**dict(zip(names, jax.tree.map(filled, whole), strict=True)))


class State(NamedTuple):
    """What the loop carries from one token to the next."""

    step: Array  # () int32, how many tokens were made
    length: Array  # () int32, of the prompt and what was made
    ids: Array  # (R, S) int32, the prompt and what was made
    mask: Array  # (R, S) bool, which of them are there and count
    shown: Array  # (R, N) int32, what the caller sees of what was made: filling where a row is finished
    finished: Array  # (R,) bool
    stop: Array  # (R,) int32, the state of the stop strings
    records: dict[str, Any]  # log_probs (R, N); scores and logits (N, R, V); of INSIDE, of each layer (N, R, ...)
    number: Any = None  # (R,) int32, which of the prompts each row continues
    unseen: Any = None  # (R,) int32, how many columns at the left are no part of the caller's text
    beams: Any = None  # a BeamState, where beams are searched
    window: Any = None  # a Prompt of R rows without ids, or 2 R: what the cache was filled with
    cache: Any = None  # a KVCache, which holds all but the last token of each row
    helper: Any = None  # the window and the cache of an assistant


class Weights(NamedTuple):
    """What a loop multiplies by, and does not change."""

    params: Tree
    kernels: Kernels  # see `cpu_kernels`
    assistant: Any = None  # the assistant's parameters


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or a sample, one token of each row after the other; another value compiles the loop anew."""

    room: int  # for how many tokens
    rows: int = 1  # of each prompt
    records: tuple[str, ...] = ()  # what is kept of each step; see `GenerationConfig.records`
    guesses: int = 0  # how many tokens are proposed
    callbacks: Callbacks = NO_CALLBACKS

    def start(self, model: Any, prompt: Prompt, options: Options) -> State:
        """The state before the first token, with nothing in a cache yet."""
        if prompt.seen is not None:  # the columns stay where the cache has them, but no rule looks at holes in a text
            _, ids, mask = align(prompt.mask, prompt.ids, prompt.mask)
            prompt = prompt._replace(ids=ids, mask=mask)
        prompt = prompt.repeated(self.rows)
        rows, length = prompt.ids.shape
        more, wide = [(0, 0), (0, self.room)], np.promote_types(model.dtype, np.float32)
        shape = (self.room, rows, model.config.vocab_size)
        kinds = {"log_probs": ((rows, self.room), wide), "scores": (shape, wide), "logits": (shape, model.dtype)}
        return State(
            step=jnp.int32(0),
            length=jnp.int32(length),
            ids=jnp.pad(prompt.ids, more),
            mask=jnp.pad(prompt.mask, more),
            shown=jnp.full((rows, self.room), options.fill, jnp.int32),
            finished=jnp.zeros(rows, bool),
            stop=jnp.zeros(rows, jnp.int32),
            records={name: jnp.zeros(*kinds[name]) for name in self.records if name in kinds},
            number=prompt.number,
            unseen=prompt.unseen,
        )

    def is_open(self, state: State) -> Array:
        """Whether a row goes on, ()."""
        return ~state.finished.all()

    def propose(self, state: State, weights: Weights, new: Any, options: Options) -> tuple[State, Array]:
        """What is read after the last token of each row, in the hope that it is what will be chosen: (R, G)"""
        return state, state.ids[:, :0]

    def update(self, state: State, logits: Array, proposed: Array, new: Any, options: Options) -> State:
        """The state one token further, by the logits (R, 1, V) after the last one; of guided rows (2 R, 1, V)."""
        raw, own = upcast(logits[:, 0]), own_rules(self, state)
        raw = guided(state, raw, options)
        kept = process(raw, state.ids, state.mask, state.length, state.step, options, own)
        processed, chosen = kept.logits, choose(kept, state.step, options)
        is_word = options.fill < processed.shape[1]  # then what the cache holds is what the caller sees
        chosen = jnp.where(state.finished & is_word, options.fill, chosen)
        state = accept(record(state, logits[:, 0], processed, chosen), chosen, options)
        return state._replace(finished=state.finished | own_ends(self.callbacks, state, processed))


def own_rules(strategy: Sampling, state: State) -> Callable[[Array], Array] | None:
    """The caller's rules as a function of logits (R, V), or None where there are none."""
    return partial(changed, strategy.callbacks, state) if strategy.callbacks.are_rules else None


def changed(callbacks: Callbacks, state: State, logits: Array) -> Array:
    """Logits (R, V) after the caller's rules."""
    ids, length = text(state)
    if (allowed := callbacks.allowed) is not None:

        def may_follow(number: Array, row: Array) -> Array:
            return as_words(allowed(number, row, length), logits.shape[1])

        logits = without(logits, ~jax.vmap(may_follow)(state.number, ids))
    for processor in callbacks.processors:
        shape, logits = logits.shape, processor(ids, logits, length)
        inputs.check_shape("logits_processor", jnp.shape(logits), shape)
    return logits


def as_words(allowed: Any, vocab_size: int) -> Array:
    """What a function allows: of each word whether it may follow, (V,)."""
    found = jnp.asarray(allowed)
    if found.shape != (vocab_size,) or found.dtype != bool:
        raise InputError(
            f"prefix_allowed_tokens_fn: expected booleans ({vocab_size},), found {found.dtype}{list(found.shape)}; in "
            "JAX it says of each id whether it may follow"
        )
    return found


def own_ends(callbacks: Callbacks, state: State, processed: Array) -> Array:
    """Which rows are over by the caller's criteria, after a token that was chosen by these logits (R, V): (R,)"""
    over = jnp.zeros(len(state.ids), bool)
    for criterion in callbacks.criteria:
        ids, length = text(state)
        found = jnp.asarray(criterion(ids, processed, length))
        inputs.check_shape("stopping_criteria", found.shape, over.shape if found.ndim else ())
        over |= found.astype(bool)
    return over


def text(state: State) -> tuple[Array, Array]:
    """The ids (R, S) as the caller knows them, from his first column on, and how many there are."""
    first = state.unseen[0]
    return jnp.roll(state.ids, -first, axis=1), state.length - first


def guided(state: State, logits: Array, options: Options) -> Array:
    """The logits (R, V); of guided rows, (2 R, V), led away from the others."""
    rows = len(state.ids)
    return logits if len(logits) == rows else guide(logits[:rows], logits[rows:], options.guidance_scale)


def read(
    model: Any, params: Tree, prompt: Prompt, room: int, past: KVCache | None, whole: bool, records: tuple[str, ...]
) -> tuple[Any, Prompt]:
    """The output for prompts, or for all but their last tokens, with a cache with room for more; and what it is of."""
    prompt = prompt.doubled()
    seen = prompt.mask if prompt.seen is None else prompt.seen
    held, capacity = 0 if past is None else past.capacity, seen.shape[1] + room
    place = slice(prompt.ids.shape[1] - seen.shape[1] + held, None if whole else -1)
    own, types, embeds = (None if x is None else x[:, place] for x in (prompt.ids, prompt.types, prompt.embeds))
    empty = KVCache.empty(model.config, len(seen), capacity, model.dtype, model.scan_layers)
    output = forward(
        model,
        own if embeds is None else None,
        inputs_embeds=embeds,
        attention_mask=jnp.pad(seen, [(0, 0), (0, room)]),
        position_ids=positions(seen, seen, 0)[:, held : None if whole else -1],
        token_type_ids=types,
        encoder_hidden_states=prompt.states,
        encoder_attention_mask=prompt.states_mask,
        params=params,
        past_key_values=empty if past is None else roomy(past, capacity),
        **{f"output_{name}": True for name in INSIDE if name in records},
    )
    types = None if types is None else prompt.types[:, -1:]
    return output, Prompt(None, seen, None, prompt.states_mask, types)


def prefill(model: Any, params: Tree, prompt: Prompt, room: int, rows: int) -> dict[str, Any]:
    """The window and the cache of a state: prompts up to the last token, which is the first that a step reads."""
    output, window = read(model, params, prompt, room, None, False, ())
    return {"window": window.repeated(rows), "cache": spread(output.past_key_values, rows)}


def begin(
    model: Any,
    params: Tree,
    prompt: Prompt,
    state: State,
    strategy: Sampling,
    new: Any,
    options: Options,
    past: KVCache | None,
) -> State:
    """The state after the first token, where prompts are read to their end: embeddings, or after a cache, or shown."""
    output, window = read(model, params, prompt, strategy.room, past, True, strategy.records)
    cache = spread(output.past_key_values, strategy.rows)
    state = state._replace(window=window.repeated(strategy.rows), cache=cache)
    for name in (name for name in INSIDE if name in strategy.records):
        shapes = [(strategy.room, len(state.ids), *x.shape[1:-2], 1, x.shape[-1]) for x in output[name]]
        blank = tuple(jnp.zeros(shape, x.dtype) for shape, x in zip(shapes, output[name], strict=True))
        first = tuple(jnp.repeat(x[: len(prompt.ids)], strategy.rows, axis=0) for x in output[name])
        state = state._replace(records={**state.records, name: blank, f"first_{name}": first})
    logits = jnp.repeat(output.logits[:, -1:], strategy.rows, axis=0)
    return strategy.update(state, logits, state.ids[:, :0], new, options)


def roomy(past: KVCache, capacity: int) -> KVCache:
    """A cache as one with more room, in which the next token goes after all that there was room for."""

    def wider(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, capacity - x.shape[-2]), (0, 0)])

    return KVCache(jax.tree.map(wider, past.layers), past.cross, jnp.int32(past.capacity))


def decode_step(model: Any, params: Tree, state: State, proposed: Array) -> Any:
    """The output with the logits (R, 1 + G, V) after the last token of each row and after each that is proposed.

    A proposed -1 is none; where all are, none is read. What has no position any more gets the last one; nobody looks.
    Where rows are guided, there are 2 R.
    """
    window, cache, count = state.window, state.cache, len(state.window.mask)
    last = lax.dynamic_slice_in_dim(state.ids, state.length - 1, 1, axis=1)  # (R, 1)
    room, made = cache.capacity - window.mask.shape[1], cache.length - (window.mask.shape[1] - 1)

    def read(tokens: Array) -> Any:
        rows, length = tokens.shape
        there = jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32) < made + length - 1, (count, room))
        before = window.mask.sum(-1, dtype=jnp.int32)[:, None] + made - 1  # (R, 1)
        places = before + jnp.arange(length, dtype=jnp.int32)[None]
        types = None if window.types is None else jnp.broadcast_to(window.types, (count, length))
        return forward(
            model,
            jnp.tile(tokens, (count // rows, 1)),
            attention_mask=jnp.concatenate([window.mask, there], 1),
            position_ids=jnp.clip(places, 0, model.config.n_positions - 1),
            token_type_ids=types,
            encoder_attention_mask=window.states_mask,
            params=params,
            past_key_values=cache,
            **{f"output_{name}": True for name in INSIDE if name in state.records},
        )

    def alone() -> Any:
        output = read(last)
        return replace(output, logits=jnp.pad(output.logits, [(0, 0), (0, proposed.shape[1]), (0, 0)]))

    if not proposed.shape[1]:
        return read(last)
    both = jnp.concatenate([last, jnp.maximum(proposed, 0)], 1)
    return lax.cond((proposed >= 0).any(), lambda: read(both), alone)


def forward(model: Any, tokens: Any, **given: Any) -> Any:
    """What the model makes of tokens (R, T); one with a head for choices is given one of each row."""
    given = {name: x for name, x in given.items() if x is not None}
    if model.head != "double_heads":
        return model(tokens, return_dict=True, **given)
    whole = ("past_key_values", "params", *(f"output_{name}" for name in INSIDE))
    given = {name: x if name in whole else x[:, None] for name, x in given.items()}
    output = model(None if tokens is None else tokens[:, None], return_dict=True, **given)
    return replace(output, logits=output.logits[:, 0])


def see(state: State, output: Any) -> State:
    """The state with the records of what the model shows besides logits, as it read the last token."""
    rows, records = len(state.ids), dict(state.records)
    for name in (name for name in INSIDE if name in records):
        pairs = zip(records[name], output[name], strict=True)
        records[name] = tuple(kept.at[state.step].set(x[:rows]) for kept, x in pairs)
    return state._replace(records=records)


def decode(
    model: Any, weights: Weights, state: State, strategy: Sampling, until: Any, new: Any, options: Options
) -> State:
    """Go on until `until` of `new` tokens are made, or the strategy has enough."""

    def is_open(state: State) -> Array:
        return (state.step < until) & strategy.is_open(state)

    def once(state: State) -> State:
        state, proposed = strategy.propose(state, weights, new, options)
        output = decode_step(model, weights.params, state, proposed)
        state = see(state._replace(cache=output.past_key_values), output)
        return strategy.update(state, output.logits, proposed, new, options)

    with multiplied_first(weights.kernels):
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
            records[name] = records[name].at[state.step].set(value[: len(state.ids)].astype(records[name].dtype))
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
    mask = mask & (counts > starts[:, None])
    types = None if prompt.types is None else np.asarray(prompt.types)
    if types is not None:
        types = np.concatenate([types, types[:, -1:].repeat(length - types.shape[1], 1)], 1)
    order = order_of(mask)
    shown, keep, types = (None if x is None else np.take_along_axis(x, order, 1) for x in (ids, mask, types))
    return Prompt(shown, keep, prompt.states, prompt.states_mask, types).bucketed(min(length, longest))


def align(mask: Array, *rows: Array | None) -> tuple[Any, ...]:
    """Where columns stood when padding goes to the left, and rows (B, T) so ordered; values may not be known yet."""
    order = jnp.argsort(mask, axis=-1, stable=True)  # hidden tokens first
    return order, *(None if x is None else jnp.take_along_axis(x, order, 1) for x in rows)
