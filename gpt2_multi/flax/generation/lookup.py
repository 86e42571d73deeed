"""Speculative decoding in Flax: the same tokens in fewer steps, by reading guesses together with the last token.

A lookup guesses what followed the last tokens when they were there before (Saxena 2023); an assistant, which is a
smaller model, what it would choose itself (Leviathan et al. 2023). Guesses are kept as far as the model would have
chosen them. One row at a time; G guesses, S ids (prompt and room), V vocabulary.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from gpt2_multi.flax.generation.decoding import Sampling, State, Weights, decode_step
from gpt2_multi.generation.options import Options


@dataclass(frozen=True)
class Lookup(Sampling):
    """Choice after choice in one row, with guesses that are read together with the last token."""

    def propose(self, state: State, weights: Weights, new: Any, options: Options) -> tuple[State, Array]:
        """What followed the end of the text before, but no more than is wanted: (1, G), -1 where there is nothing."""
        guessed = guess(state, options.max_matching_ngram_size, self.guesses)
        return state, jnp.where(jnp.arange(self.guesses, dtype=jnp.int32) < new - state.step - 1, guessed, -1)

    def update(self, state: State, logits: Array, proposed: Array, new: Any, options: Options) -> State:
        """The state with the tokens that are chosen, up to the first that was not proposed."""
        expected = jnp.pad(proposed[0], (0, 1), constant_values=-1)  # (1 + G,)

        def once(carried: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
            state, place, _ = carried
            here = lax.dynamic_slice_in_dim(logits, place, 1, axis=1)
            after = Sampling.update(self, state, here, proposed, new, options)
            was_expected = after.ids[0, state.length] == expected[place]
            return after, place + 1, was_expected & ~after.finished[0]

        start = (state._replace(cache=None, helper=None), jnp.int32(0), jnp.asarray(True))
        after, *_ = lax.while_loop(lambda carried: carried[2], once, start)
        return after._replace(cache=replace(state.cache, length=after.length - 1), helper=state.helper)


@dataclass(frozen=True, eq=False)
class Assistant:
    """A model without its parameters; two with the same settings are equal, so that a compiled loop is found again."""

    model: Any
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, model: Any) -> Assistant:
        """That of a model, of which it keeps nothing that is large."""
        bare = copy(model)
        bare._params = None
        return cls(bare, model.settings())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assistant) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(type(self.model))


@dataclass(frozen=True)
class Assisted(Lookup):
    """The same with an assistant's guesses, by the rules and the noise that the model itself chooses by.

    The caller's functions are asked for the model's own choice alone, once for each token, as without an assistant.
    """

    assistant: Assistant | None = None

    def propose(self, state: State, weights: Weights, new: Any, options: Options) -> tuple[State, Array]:
        """What the assistant would choose, and the state with what it has read: (1, G), -1 beyond what is wanted."""
        choosing, count = Sampling(self.room), jnp.minimum(self.guesses, new - state.step - 1)
        (window, cache), none, length = state.helper, state.ids[:, :0], state.length

        def more(_: Any, text: State) -> State:
            output = decode_step(self.model, weights.assistant, text, none)
            return choosing.update(text._replace(cache=output.past_key_values), output.logits, none, new, options)

        # Two tokens are read first: what was kept of all guesses is followed by one more, and it has not read the last.
        back = state._replace(length=length - 1, cache=replace(cache, length=length - 2), window=window, records={})
        output = decode_step(self.model, weights.assistant, back, lax.dynamic_slice_in_dim(state.ids, length - 1, 1, 1))
        text = back._replace(length=length, cache=output.past_key_values, helper=None)
        text = choosing.update(text, output.logits[:, 1:], none, new, options)
        text = lax.fori_loop(1, count, more, text)
        guessed = lax.dynamic_slice_in_dim(text.ids, length, self.guesses, 1)
        helper = (window, text.cache)
        return state._replace(helper=helper), jnp.where(jnp.arange(self.guesses, dtype=jnp.int32) < count, guessed, -1)

    @property
    def model(self) -> Any:
        """The assistant, without its parameters."""
        assert self.assistant is not None
        return self.assistant.model


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
        return same, lengths + same.astype(jnp.int32)

    none = jnp.zeros(size, jnp.int32)
    _, lengths = lax.fori_loop(0, jnp.minimum(longest, size), narrowed, (index < last, none))
    known = lengths * (guesses + 1) + jnp.minimum(last - index, guesses)
    start = jnp.argmax(jnp.where(lengths > 0, known * size + index, -1)).astype(jnp.int32) + 1
    count = jnp.where(lengths.max() > 0, last + 1 - start, 0)
    place = jnp.arange(guesses, dtype=jnp.int32)
    return jnp.where(place < count, ids[jnp.minimum(start + place, size - 1)], -1)[None]
