"""Prompt-lookup decoding in Flax: greedy choice in fewer steps, where a text repeats itself.

What followed the last tokens when they were there before is read together with them, and kept as far as the model would
have chosen it (Saxena 2023). One row at a time; G guesses, S ids (prompt and room), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from gpt2_multi.flax.generation.decoding import Sampling, State
from gpt2_multi.generation.options import Options


@dataclass(frozen=True)
class Lookup(Sampling):
    """Greedy choice of one row, with guesses that are read together with the last token."""

    def propose(self, state: State, new: Any, options: Options) -> Array:
        """What followed the end of the text before, but no more than is wanted: (1, G), -1 where there is nothing."""
        guessed = guess(state, options.max_matching_ngram_size, self.guesses)
        return jnp.where(jnp.arange(self.guesses) < new - state.step - 1, guessed, -1)

    def update(self, state: State, logits: Array, proposed: Array, new: Any, options: Options) -> State:
        """The state with the tokens that are chosen, up to the first that was not proposed."""
        expected = jnp.pad(proposed[0], (0, 1), constant_values=-1)  # (1 + G,)

        def once(carried: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
            state, place, _ = carried
            here = lax.dynamic_slice_in_dim(logits, place, 1, axis=1)
            after = Sampling.update(self, state, here, proposed, new, options)
            was_expected = after.ids[0, state.length] == expected[place]
            return after, place + 1, was_expected & ~after.finished[0]

        start = (state._replace(cache=None), jnp.int32(0), jnp.asarray(True))
        after, *_ = lax.while_loop(lambda carried: carried[2], once, start)
        return after._replace(cache=replace(state.cache, length=after.length - 1))


def guess(state: State, longest: Any, guesses: int) -> Array:
    """What followed the longest n-gram that the text ends with when it was there before: (1, G), -1 after its end.

    That is the latest time that G tokens followed, or else the first, which the most followed.
    """
    ids, keep, last, size = state.ids[0], state.mask[0], state.length - 1, state.ids.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)

    def narrowed(back: Array, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        same, lengths = carried
        before = jnp.maximum(index - back, 0)
        same &= (ids[before] == ids[last - back]) & keep[before] & (index >= back)
        return same, lengths + same

    none = jnp.zeros(size, jnp.int32)
    _, lengths = lax.fori_loop(0, jnp.minimum(longest, size), narrowed, (index < last, none))
    known = lengths * (guesses + 1) + jnp.minimum(last - index, guesses)
    start = jnp.argmax(jnp.where(lengths > 0, known * size + index, -1)).astype(jnp.int32) + 1
    count = jnp.where(lengths.max() > 0, last + 1 - start, 0)
    place = jnp.arange(guesses)
    return jnp.where(place < count, ids[jnp.minimum(start + place, size - 1)], -1)[None]
