"""Prompt-lookup decoding in TensorFlow: greedy choice in fewer steps, where a text repeats itself.

What followed the last tokens when they were there before is read together with them, and kept as far as the model would
have chosen it (Saxena 2023). S places (prompt and room), N guesses, V vocabulary.
"""

from __future__ import annotations

import tensorflow as tf

from gpt2_multi.generation.options import Options
from gpt2_multi.tf.attention import KVCache
from gpt2_multi.tf.generation.decoding import Proposed, Sampling, State, written
from gpt2_multi.tf.layers import sizes


class Lookup(Sampling):
    """Greedy choice in one row, several tokens at a time."""

    def propose(self, state: State, options: Options) -> Proposed:
        """What followed before: (1, N)"""
        tokens, count = guess(state.ids[0], written(state)[0], state.length, self.guesses, options)
        return tokens[None], tf.minimum(count, self.room - state.step - 1)

    def update(
        self, state: State, logits: tf.Tensor, proposed: Proposed | None, until: tf.Tensor, options: Options
    ) -> State:
        """Go on as far as the proposed tokens are what is chosen, and by one token more: logits (1, 1 + N, V)"""
        assert proposed is not None
        tokens, count = proposed

        def going(place: tf.Tensor, is_right: tf.Tensor, state: State) -> tf.Tensor:
            return is_right & self.is_open(state)

        def once(place: tf.Tensor, _: tf.Tensor, state: State) -> tuple[tf.Tensor, tf.Tensor, State]:
            row = tf.gather(logits, [place], axis=1)
            after = Sampling.update(self, state, row, None, until, options)
            guessed = tokens[0, tf.minimum(place, self.guesses - 1)]
            return place + 1, (place < count) & (after.ids[0, state.length] == guessed), after

        state = tf.while_loop(going, once, (tf.constant(0), tf.constant(True), state))[2]
        cache = KVCache(state.cache.layers, state.cache.cross, state.length - 1)  # without the wrong ones
        return state._replace(cache=cache)


def guess(
    ids: tf.Tensor, keep: tf.Tensor, length: tf.Tensor, guesses: int, options: Options
) -> tuple[tf.Tensor, tf.Tensor]:
    """What followed the longest n-gram that a text, ids (S,) up to `length`, ends with when it was there before: (N,)

    That is the latest time that N tokens followed, or else the first, which the most followed. And how many of these
    guesses are known, ().
    """
    last, place = length - 1, tf.range(sizes(ids)[0])

    def longer(back: tf.Tensor, is_same: tf.Tensor, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        before = tf.maximum(place - back, 0)
        is_same &= (tf.gather(ids, before) == ids[last - back]) & tf.gather(keep, before) & (place >= back)
        return back + 1, is_same, size + tf.cast(is_same, tf.int32)

    start = (tf.constant(0), place < last, tf.zeros_like(place))
    longest = tf.minimum(options.max_matching_ngram_size, last)
    size = tf.while_loop(lambda back, is_same, _: (back < longest) & tf.reduce_any(is_same), longer, start)[2]
    known = size * (guesses + 1) + tf.minimum(last - place, guesses)
    end = tf.argmax(known * sizes(ids)[0] + place, output_type=tf.int32)  # of the n-gram
    count = tf.where(size[end] > 0, tf.minimum(guesses, last - end), 0)
    return tf.gather(ids, tf.minimum(end + 1 + tf.range(guesses), sizes(ids)[0] - 1)), count
