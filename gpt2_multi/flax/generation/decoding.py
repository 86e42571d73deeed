"""Decoding in Flax: a model that reads texts into a cache, and the compiled loop that chooses token after token.

B prompts, R rows (each prompt in several), T prompt length, W window length, S ids (prompt and room), V vocabulary, N
new tokens that there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt2_multi.flax.attention import KVCache, positions, widened
from gpt2_multi.flax.generation.cpu_kernels import prepared
from gpt2_multi.flax.generation.rules import Options, choose, ended, process
from gpt2_multi.flax.params import Tree
from gpt2_multi.generation.rules import bucket, window_start

if TYPE_CHECKING:
    from gpt2_multi.flax.heads import FlaxGPT2LMHeadModel


class Plan(NamedTuple):
    """What is compiled anew where it changes, besides shapes."""

    room: int  # for how many tokens
    rows: int  # of each prompt
    records: tuple[str, ...]  # what is kept of each step; see `GenerationConfig.records`


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: Any  # (B, T) int32
    mask: Any  # (B, T) bool
    states: Array | None  # (B, encoder length, E)
    states_mask: Array | None  # (B, encoder length)


class View(NamedTuple):
    """Which tokens count: for the rules, which see all of them, and for the model, which may see a window."""

    mask: Array  # (R, T), of the prompts
    window: Array  # (R, W), of what was there when the cache was filled; the prompts, where nothing slides
    start: Any  # () int32, how many tokens were made by then
    states_mask: Array | None  # (R, encoder length)


class State(NamedTuple):
    """What the loop carries from one token to the next."""

    step: Array  # () int32, how many tokens were made
    ids: Array  # (R, S) int32, the prompt and what was made
    finished: Array  # (R,) bool
    lengths: Array  # (R,) int32, how many tokens were made until a row was finished
    stop: Array  # (R,) int32, the state of the stop strings
    records: dict[str, Array]  # log_probs (R, N); scores and logits (N, R, V)
    cache: Any  # a KVCache, which holds all but the last token of each row


def bucketed(prompt: Prompt) -> Prompt:
    """The prompt with padding before it, up to its bucket's length."""
    pad = np.pad if isinstance(prompt.ids, np.ndarray) else jnp.pad
    more = [(0, 0), (bucket(prompt.ids.shape[1]) - prompt.ids.shape[1], 0)]
    return prompt._replace(ids=pad(prompt.ids, more), mask=pad(prompt.mask, more))


def repeated(tree: Any, rows: int) -> Any:
    """Each row so many times; the rows are the first axis, but of stacked layers."""
    if rows == 1:
        return tree
    return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=max(x.ndim - 4, 0)) if x.ndim else x, tree)


def decode(
    module: Any, params: Tree, prompt: Prompt, plan: Plan, new: Any, options: Options
) -> tuple[Array, Array, dict[str, Array]]:
    """Up to `new` tokens after each prompt: (R, N) ids, how many were made, and the records."""
    view, state = begin(module, params, prompt, plan)
    params, context = prepared(module, params, len(state.ids), plan.room)
    with context:
        state = advance(module, params, view, state, new, options)
    return shown(view, state, options), state.step, state.records


def begin(module: Any, params: Tree, prompt: Prompt, plan: Plan) -> tuple[View, State]:
    """The prompts as they are read up to the last token, which is the first that the loop feeds."""
    cache = read(module, params, prompt, plan.room)
    state = fresh(module, prompt, plan)._replace(cache=repeated(cache, plan.rows))
    return viewed(prompt, plan.rows), state


def viewed(prompt: Prompt, rows: int) -> View:
    """The prompts as they are."""
    mask = repeated(prompt.mask, rows)
    return View(mask, mask, 0, repeated(prompt.states_mask, rows))


def fresh(module: Any, prompt: Prompt, plan: Plan) -> State:
    """The state before the first token, with nothing in a cache yet."""
    ids = repeated(jnp.pad(prompt.ids, [(0, 0), (0, plan.room)]), plan.rows)
    rows, wide = len(ids), jnp.promote_types(module.dtype, jnp.float32)
    shape = (plan.room, rows, module.config.vocab_size)
    kinds = {"log_probs": ((rows, plan.room), wide), "scores": (shape, wide), "logits": (shape, module.dtype)}
    records = {name: jnp.zeros(*kinds[name]) for name in plan.records}
    none = jnp.zeros(rows, jnp.int32)
    return State(jnp.int32(0), ids, jnp.zeros(rows, bool), none, none, records, None)


def read(module: Any, params: Tree, prompt: Prompt, room: int) -> KVCache:
    """A cache of the prompts up to their last tokens, with room for more."""
    batch, length = prompt.ids.shape
    outputs = module.apply(
        {"params": params},
        prompt.ids[:, :-1],
        jnp.pad(prompt.mask, [(0, 0), (0, room)]),
        positions(prompt.ids, prompt.mask, 0)[:, :-1],
        prompt.states,
        prompt.states_mask,
        module.empty_cache(batch, length + room),
        logits_to_keep=1,
    )
    return outputs.past_key_values  # type: ignore[no-any-return]


def advance(module: Any, params: Tree, view: View, state: State, until: Any, options: Options) -> State:
    """Feed the last token of each row and choose the next, until `until` are made or no row goes on."""

    def going(state: State) -> Array:
        return (state.step < until) & ~state.finished.all()

    def once(state: State) -> State:
        logits, cache = follow(module, params, view, state, state.ids[:, :0])
        return pick(view, state._replace(cache=cache), logits[:, 0], options)

    return lax.while_loop(going, once, state)


def follow(module: Any, params: Tree, view: View, state: State, guess: Array) -> tuple[Array, KVCache]:
    """Read the last token of each row, and a guess (R, G) after it: the logits (R, 1 + G, V), and the cache.

    What has no position any more gets the last one; it is not looked at.
    """
    last = lax.dynamic_slice_in_dim(state.ids, view.mask.shape[1] + state.step - 1, 1, axis=1)  # (R, 1)
    made, more = state.step - view.start, jnp.arange(1 + guess.shape[1], dtype=jnp.int32)
    places = view.window.sum(-1, dtype=jnp.int32)[:, None] + made - 1 + more  # (R, 1 + G)
    outputs = module.apply(
        {"params": params},
        jnp.concatenate([last, guess], 1),
        written(view.window, made + guess.shape[1], state.cache.capacity),
        jnp.minimum(places, module.config.n_positions - 1),
        None,
        view.states_mask,
        state.cache,
    )
    return outputs.logits, outputs.past_key_values


def pick(view: View, state: State, logits: Array, options: Options) -> State:
    """The state with the next token in each row, chosen by the model's logits (R, V)."""
    place = view.mask.shape[1] + state.step
    keep = written(view.mask, state.step, state.ids.shape[1])
    processed = process(widened(logits), state.ids, keep, place, state.step, options)
    chosen = choose(processed, state.step, options)
    state = state._replace(records=recorded(state, logits, processed, chosen))
    return accept(state, chosen, place, options)


def recorded(state: State, logits: Array, processed: Array, chosen: Array) -> dict[str, Array]:
    """The records with one more step; filling has the log-probability 0."""
    records = dict(state.records)
    for name, value in (("logits", logits), ("scores", processed)):
        if name in records:
            records[name] = records[name].at[state.step].set(value)
    if "log_probs" in records:
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(processed), chosen[:, None], -1)[:, 0]
        log_probs = jnp.where(state.finished, 0, log_probs)
        records["log_probs"] = records["log_probs"].at[:, state.step].set(log_probs)
    return records


def accept(state: State, chosen: Array, place: Array, options: Options) -> State:
    """The state with one more token in each row (R,), at `place`."""
    over, stop = ended(options, chosen, state.stop)
    return state._replace(
        step=state.step + 1,
        ids=lax.dynamic_update_slice_in_dim(state.ids, chosen[:, None], place, axis=1),
        finished=state.finished | over,
        lengths=state.lengths + ~state.finished,
        stop=stop,
    )


def shown(view: View, state: State, options: Options) -> Array:
    """What the caller sees of the tokens that there is room for, filled after a row's end, (R, N)"""
    tokens = state.ids[:, view.mask.shape[1] :]
    return jnp.where(jnp.arange(tokens.shape[1]) < state.lengths[:, None], tokens, options.fill)


def written(mask: Array, made: Any, size: int) -> Array:
    """Which of so many ids are there and count, (R, size): those that a mask (R, T) says, and what was made."""
    there = jnp.arange(size - mask.shape[1]) < made
    return jnp.concatenate([mask, jnp.broadcast_to(there, (len(mask), len(there)))], 1)


def tokenwise(
    model: FlaxGPT2LMHeadModel, params: Tree, prompt: Prompt, plan: Plan, new: int, options: Options
) -> Iterator[tuple[View, State]]:
    """The states after each token; the next one takes the memory of the last."""
    view, state = model.decoders["begin"](params, prompt, plan)
    for step in range(1, new + 1):
        state = model.decoders["advance"](params, view, state, step, options)
        yield view, state
        if state.finished.all():
            return


def sliding(
    model: FlaxGPT2LMHeadModel, params: Tree, prompt: Prompt, plan: Plan, new: int, options: Options, stride: int
) -> Iterator[tuple[View, State]]:
    """The states after every `stride` tokens, or fewer, where the model sees a window; see `sampling.window_start`."""
    state, step, until = model.decoders["fresh"](prompt, plan), 0, 0
    wide, longest = Prompt(*(repeated(x, plan.rows) for x in prompt)), model.config.n_positions
    room = min(max(longest // 2, 1), new)
    while step < new and not state.finished.all():
        if step == until:
            window = slid(wide, state, longest)
            until = min(step + min(longest + 1 - int(window.mask.sum(-1).max()), room), new)
            state = state._replace(cache=model.decoders["read"](params, window, bucket(room)))
            view = View(wide.mask, window.mask, np.int32(step), wide.states_mask)
        step = min(step + stride, until)
        state = model.decoders["advance"](params, view, state, step, options)
        yield view, state


def slid(prompt: Prompt, state: State, longest: int) -> Prompt:
    """What the window shows of each row, (R, W): W is the same for all texts that are longer than the window."""
    length = prompt.ids.shape[1] + int(state.step)
    ids, mask = np.asarray(state.ids)[:, :length], np.asarray(written(prompt.mask, state.step, length))
    counts = mask.cumsum(-1)  # (R, T)
    starts = [window_start(int(count), longest) for count in counts[:, -1]]
    ids, mask = aligned(ids, mask & (counts > np.array(starts)[:, None]))
    window = slice(-min(length, longest), None)
    return bucketed(prompt._replace(ids=ids[:, window], mask=mask[:, window]))


def aligned(ids: Any, mask: Any) -> tuple[Any, Any]:
    """Ids and mask (B, T) with padding on the left."""
    library = np if isinstance(ids, np.ndarray) else jnp
    order = library.argsort(mask, axis=-1, stable=True)  # hidden tokens first
    return library.take_along_axis(ids, order, 1), library.take_along_axis(mask, order, 1)
