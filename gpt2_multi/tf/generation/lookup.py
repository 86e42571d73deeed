"""Decoding in fewer steps in TensorFlow: guesses are read together with the last token, several at once.

They are kept as far as the model would have chosen them, so that the tokens are the same as without. A guess is what
followed the last tokens when they were there before (prompt lookup, Saxena 2023), or what a smaller model chooses
(Leviathan et al. 2023). S places (prompt and room), N guesses, V vocabulary.
"""

from __future__ import annotations

import tensorflow as tf

from gpt2_multi.generation.options import Options
from gpt2_multi.tf.attention import KVCache
from gpt2_multi.tf.generation.decoding import Prompt, Proposed, Sampling, State, decode_step, written
from gpt2_multi.tf.layers import sizes


class Lookup(Sampling):
    """One row, several tokens at a time."""

    def propose(self, state: State, options: Options) -> tuple[State, Proposed | None]:
        """What followed before: (1, N)"""
        tokens, count = guess(state.ids[0], written(state)[0], state.length, self.guesses, options)
        return state, (tokens[None], tf.minimum(count, self.room - state.step - 1))

    def update(
        self, state: State, logits: tf.Tensor, proposed: Proposed | None, new: tf.Tensor, options: Options
    ) -> State:
        """Go on as far as the proposed tokens are what is chosen, and by one token more: logits (1, 1 + N, V)"""
        if proposed is None:
            return super().update(state, logits, None, new, options)
        tokens, count = proposed
        assert count is not None

        def going(place: tf.Tensor, is_right: tf.Tensor, state: State) -> tf.Tensor:
            return is_right & self.is_open(state)

        def once(place: tf.Tensor, _: tf.Tensor, state: State) -> tuple[tf.Tensor, tf.Tensor, State]:
            row = tf.gather(logits, [place], axis=1)
            after = Sampling.update(self, state, row, None, new, options)
            guessed = tokens[0, tf.minimum(place, self.guesses - 1)]
            return place + 1, (place < count) & (after.ids[0, state.length] == guessed), after

        alone = state._replace(cache=KVCache(), helper=())
        after = tf.while_loop(going, once, (tf.constant(0), tf.constant(True), alone))[2]
        cache = KVCache(state.cache.layers, state.cache.cross, after.length - 1)  # without the wrong ones
        return after._replace(cache=cache, helper=state.helper)


class Assisted(Lookup):
    """One row, of which an assistant guesses the next tokens by the same rules and the same noise.

    The caller's functions are asked for the model's own choice alone, once for each token, as without an assistant.
    """

    def propose(self, state: State, options: Options) -> tuple[State, Proposed | None]:
        """What the assistant chooses next: (1, N)

        It reads two tokens first: what was kept of all its guesses is followed by one more, and it never read the last.
        """
        (cache, keep, *types), length, longest = state.helper, state.length, self.assistant.config.n_positions
        prompt = Prompt(state.ids, state.mask, None, None, state.number, state.unseen, *types)
        known = tf.math.count_nonzero(written(state), dtype=tf.int32)
        count = tf.minimum(tf.minimum(self.guesses, self.room - state.step - 1), longest - known)
        choosing = Sampling(self.room, 1, ())
        back = KVCache(cache.layers, cache.cross, length - 2)
        text = state._replace(length=length - 1, cache=back, keep=keep, records={}, helper=())
        second = tf.gather(state.ids, [length - 1], axis=1), None  # (1, 1)

        def read(text: State, proposed: Proposed | None) -> State:
            logits, cache, _ = decode_step(self.assistant, prompt, text, proposed)
            text = text._replace(cache=cache, length=length + text.step - state.step)
            return choosing.update(text, logits[:, -1:], None, text.step, options)

        def guessed() -> tuple[tf.Tensor, KVCache]:
            after = tf.while_loop(
                lambda text: text.step < state.step + count, lambda text: (read(text, None),), (read(text, second),)
            )[0]
            return after.ids, after.cache

        ids, cache = tf.cond(count > 0, guessed, lambda: (state.ids, cache))
        tokens = tf.gather(ids, tf.minimum(length + tf.range(self.guesses), sizes(ids)[1] - 1), axis=1)
        return state._replace(helper=(cache, keep, *types)), (tokens, count)


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
