"""Prompt-lookup decoding in TensorFlow: greedy choice in fewer steps, where a text repeats itself.

What followed the last tokens when they were there before is read together with them, and kept as far as the model would
have chosen it (Saxena 2023). One row; S places (prompt and room), N guesses, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from gpt2_multi.tf.attention import KVCache, sizes, widened
from gpt2_multi.tf.generation.decoding import Prompt, State, accept, follow, written
from gpt2_multi.tf.generation.rules import Options, choose, process

if TYPE_CHECKING:
    from gpt2_multi.tf.heads import TFGPT2LMHeadModel


def speculate(
    model: TFGPT2LMHeadModel,
    prompt: Prompt,
    state: State,
    until: tf.Tensor,
    new: tf.Tensor,
    options: Options,
    guesses: int,
) -> State:
    """Read on until at least `until` tokens of `new` are made, or the row is finished."""

    def going(state: State) -> tf.Tensor:
        return (state.step < until) & ~state.finished[0]

    def once(state: State) -> tuple[State]:
        tokens, count = guessed(prompt, state, new, options, guesses)
        logits, cache = read(model, prompt, state, tokens, count)
        return (kept(prompt, state._replace(cache=cache), logits, tokens[1:], count, options),)

    return tf.while_loop(going, once, (state,))[0]


def guessed(
    prompt: Prompt, state: State, new: tf.Tensor, options: Options, guesses: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The last token, and what followed the longest n-gram that the text ends with when it was there before: (1 + N,)

    That is the latest time that N tokens followed, or else the first, which the most followed. And how many of these
    guesses count: as many as are known, and as there is room for.
    """
    ids, keep = state.ids[0], written(prompt.mask, state.ids, state.step)[0]  # (S,)
    last, place = sizes(prompt.ids)[1] + state.step - 1, tf.range(sizes(ids)[0])

    def longer(back: tf.Tensor, is_same: tf.Tensor, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        before = tf.maximum(place - back, 0)
        is_same &= (tf.gather(ids, before) == ids[last - back]) & tf.gather(keep, before) & (place >= back)
        return back + 1, is_same, size + tf.cast(is_same, tf.int32)

    start = (tf.constant(0), place < last, tf.zeros_like(place))
    longest = tf.minimum(options.longest_match, last)
    size = tf.while_loop(lambda back, is_same, _: (back < longest) & tf.reduce_any(is_same), longer, start)[2]
    known = size * (guesses + 1) + tf.minimum(last - place, guesses)
    end = tf.argmax(known * sizes(ids)[0] + place, output_type=tf.int32)  # of the n-gram
    count = tf.where(size[end] > 0, tf.minimum(tf.minimum(guesses, last - end), new - state.step - 1), 0)
    following = tf.gather(ids, tf.minimum(end + 1 + tf.range(guesses), sizes(ids)[0] - 1))
    return tf.concat([ids[last][None], following], 0), count


def read(
    model: TFGPT2LMHeadModel, prompt: Prompt, state: State, tokens: tf.Tensor, count: tf.Tensor
) -> tuple[tf.Tensor, KVCache]:
    """The logits (1 + N, V) after the last token and its guesses; where none counts, the others are not read."""

    def alone() -> tuple[tf.Tensor, KVCache]:
        logits, cache = follow(model, prompt, state.cache, tokens[None, :1])
        return tf.pad(logits, [(0, sizes(tokens)[0] - 1), (0, 0)]), cache

    return tf.cond(count > 0, lambda: follow(model, prompt, state.cache, tokens[None]), alone)


def kept(
    prompt: Prompt, state: State, logits: tf.Tensor, guesses: tf.Tensor, count: tf.Tensor, options: Options
) -> State:
    """The state with the first token after what is certain, and with one more for each guess that was right."""
    length = sizes(prompt.ids)[1]

    def going(place: tf.Tensor, right: tf.Tensor, state: State) -> tf.Tensor:
        return right & ~state.finished[0]

    def once(place: tf.Tensor, _: tf.Tensor, state: State) -> tuple[tf.Tensor, tf.Tensor, State]:
        keep = written(prompt.mask, state.ids, state.step)
        row = widened(tf.gather(logits, [place]))
        processed = process(row, state.ids, keep, length + state.step, state.step, options)
        chosen = choose(processed, state.step, options)
        right = (place < count) & (chosen[0] == guesses[tf.minimum(place, sizes(guesses)[0] - 1)])
        return place + 1, right, accept(state, chosen, length + state.step, options)

    state = tf.while_loop(going, once, (tf.constant(0), tf.constant(True), state))[2]
    layers, cross = state.cache.layers, state.cache.cross
    return state._replace(cache=KVCache(layers, cross, length + state.step - 1))
