"""Prompt-lookup decoding in Flax: greedy choice in fewer steps, where a text repeats itself.

What followed the last tokens when they were there before is read together with them, and kept as far as the model would
have chosen it (Saxena 2023). One row at a time; G guesses, S ids (prompt and room), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt2_multi.flax.attention import KVCache
from gpt2_multi.flax.generation.cpu_kernels import prepared
from gpt2_multi.flax.generation.decoding import Plan, Prompt, State, View, begin, follow, pick, shown, written
from gpt2_multi.flax.generation.rules import Options
from gpt2_multi.flax.params import Tree

if TYPE_CHECKING:
    from gpt2_multi.flax.heads import FlaxGPT2LMHeadModel


def lookup(
    module: Any, params: Tree, prompt: Prompt, plan: Plan, new: Any, options: Options, guesses: int
) -> tuple[Array, Array, Array]:
    """Up to `new` tokens (1, N) after a prompt, how many were made, and in how many steps."""
    view, state = begin(module, params, prompt, plan)
    params, context = prepared(module, params, 1 + guesses, plan.room)
    with context:
        state, left = speculate(module, params, view, state, new, new, options, guesses)
    return shown(view, state, options), state.step, new - left


def speculate(
    module: Any, params: Tree, view: View, state: State, new: Any, steps: Any, options: Options, guesses: int
) -> tuple[State, Array]:
    """Go on for so many steps, or to the end: the state, and how many steps are left."""

    def going(carried: tuple[State, Array]) -> Array:
        state, left = carried
        return (state.step < new) & ~state.finished.all() & (left > 0)

    def once(carried: tuple[State, Array]) -> tuple[State, Array]:
        state, left = carried
        guess, count = guessed(view, state, options.longest_ngram, guesses)
        count = jnp.minimum(count, new - state.step - 1)
        logits, cache = read_on(module, params, view, state, guess, count)
        kept = compared(view, state._replace(cache=None), logits, guess, count, options)
        length = jnp.int32(view.mask.shape[1] - 1) + kept.step
        return kept._replace(cache=replace(cache, length=length)), left - 1

    return lax.while_loop(going, once, (state, jnp.asarray(steps, jnp.int32)))


def guessed(view: View, state: State, longest: Any, guesses: int) -> tuple[Array, Array]:
    """What followed the longest n-gram that the text ends with when it was there before: (1, G), and how much there is.

    That is the latest time that G tokens followed, or else the first, which the most followed.
    """
    ids, size = state.ids[0], state.ids.shape[1]
    keep, index = written(view.mask, state.step, size)[0], jnp.arange(size, dtype=jnp.int32)
    last = jnp.asarray(view.mask.shape[1], jnp.int32) + state.step - 1

    def narrowed(back: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        same, lengths = carried
        before = jnp.maximum(index - back, 0)
        same &= (ids[before] == ids[last - back]) & keep[before] & (index >= back)
        return same, lengths + same

    none = jnp.zeros(size, jnp.int32)
    _, lengths = lax.fori_loop(0, jnp.minimum(longest, size), narrowed, (index < last, none))
    most = lengths.max()
    known = lengths * (guesses + 1) + jnp.minimum(last - index, guesses)
    start = jnp.argmax(jnp.where(lengths > 0, known * size + index, -1)).astype(jnp.int32) + 1
    guess = ids[jnp.minimum(start + jnp.arange(guesses), size - 1)]
    return guess[None], jnp.where(most > 0, last + 1 - start, 0).clip(max=guesses)


def read_on(module: Any, params: Tree, view: View, state: State, guess: Array, count: Array) -> tuple[Array, KVCache]:
    """The logits (1, 1 + G, V) after the last token and the guess, which is not read where there is none."""

    def with_guess() -> tuple[Array, KVCache]:
        return follow(module, params, view, state, guess)

    def alone() -> tuple[Array, KVCache]:
        logits, cache = follow(module, params, view, state, guess[:, :0])
        return jnp.pad(logits, [(0, 0), (0, guess.shape[1]), (0, 0)]), cache

    return lax.cond(count > 0, with_guess, alone)


def compared(view: View, state: State, logits: Array, guess: Array, count: Array, options: Options) -> State:
    """The state with the tokens that are chosen, up to the first that was not guessed."""

    def once(carried: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        state, place, _ = carried
        after = pick(view, state, lax.dynamic_index_in_dim(logits, place, 1, keepdims=False), options)
        chosen = after.ids[0, view.mask.shape[1] + state.step]
        was_guessed = (place < count) & (chosen == guess[0, jnp.minimum(place, guess.shape[1] - 1)])
        return after, place + 1, was_guessed & ~after.finished[0]

    return lax.while_loop(lambda carried: carried[2], once, (state, jnp.int32(0), jnp.asarray(True)))[0]


def row(prompt: Prompt, options: Options, number: int) -> tuple[Prompt, Options]:
    """One prompt, and the options for it."""
    part = slice(number, number + 1)
    alone = Prompt(*(None if x is None else x[part] for x in prompt))  # type: ignore[arg-type]
    return alone, options._replace(streams=options.streams[part])


def looked_up(
    model: FlaxGPT2LMHeadModel, params: Tree, prompt: Prompt, plan: Plan, new: int, options: Options, guesses: int
) -> Array:
    """The tokens (B, new) of all prompts, one after the other."""
    made, longest = [], 0
    for number in range(len(prompt.ids)):
        alone, own = row(prompt, options, number)
        tokens, count, _ = model.decoders["lookup"](params, alone, plan, new, own, guesses)
        made.append(tokens)
        longest = max(longest, int(count))
    return jnp.concatenate(made)[:, :longest]


def columns(
    model: FlaxGPT2LMHeadModel, params: Tree, prompt: Prompt, plan: Plan, new: int, options: Options, guesses: int
) -> Iterator[Array]:
    """The tokens (B,) of all prompts, one of each after the other."""
    rows = [row(prompt, options, number) for number in range(len(prompt.ids))]
    texts = [tokens(model, params, alone, plan, new, own, guesses) for alone, own in rows]
    return (jnp.asarray(column, jnp.int32) for column in zip_longest(*texts, fillvalue=options.fill))


def tokens(
    model: FlaxGPT2LMHeadModel, params: Tree, prompt: Prompt, plan: Plan, new: int, options: Options, guesses: int
) -> Iterator[int]:
    """The tokens after one prompt, as many at a time as a step gives."""
    view, state = model.decoders["begin"](params, prompt, plan)
    step = 0
    while step < new and not state.finished.all():
        state, _ = model.decoders["speculate"](params, view, state, new, 1, options, guesses)
        made = np.asarray(shown(view, state, options))[0, step : int(state.step)]
        step += len(made)
        yield from made.tolist()
