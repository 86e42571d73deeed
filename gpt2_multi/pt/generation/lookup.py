"""Decoding in fewer steps in PyTorch: guesses are read together with the last token, several at once.

They are kept as far as the model would have chosen them, so that the tokens are the same as without. A guess is what
followed the last tokens when they were there before (prompt lookup, Saxena 2023), or what a smaller model chooses
(Leviathan et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from gpt2_multi.generation.options import Options
from gpt2_multi.pt.attention import KVCache
from gpt2_multi.pt.generation.decoding import Prompt, Sampling, State, decode_step, prefill


@dataclass(frozen=True)
class Lookup(Sampling):
    """Greedy choice in one row without padding, several tokens at a time."""

    guesses: int = 0  # at most, of a step

    def propose(self, state: State, options: Options) -> Tensor:
        """What followed before, once the prompt is read: (1, N)"""
        count = min(self.guesses, self.room - state.step - 1) if state.cache is not None else 0
        return guess(state.ids[:, : state.length], options.max_matching_ngram_size, count)

    def update(self, state: State, logits: Tensor, proposed: Tensor, options: Options) -> None:
        """Go on as far as the proposed tokens are what is chosen, and by one token more: logits (1, 1 + N, V)"""
        for place in range(logits.shape[1]):
            super().update(state, logits[:, place : place + 1], proposed, options)
            was_guessed = place < proposed.shape[1] and bool(state.ids[0, state.length - 1] == proposed[0, place])
            if not was_guessed or not self.is_open(state):
                break
        state.cache.length = state.extra + state.length - 1  # type: ignore[union-attr]


@dataclass
class AssistedState(State):
    """What the loop carries from one token to the next, and what the assistant has read."""

    helper: State | None = None
    beside: Prompt | None = None  # what the assistant reads


@dataclass(frozen=True)
class Assisted(Lookup):
    """One row, of which an assistant guesses the next tokens by the same rules and the same noise.

    The caller's functions are asked for the model's own choice alone, once for each token, as without an assistant.
    """

    assistant: Any = None

    def start(self, prompt: Prompt, options: Options) -> AssistedState:
        """The state in which nothing is made."""
        state = AssistedState.of(prompt, self.rows, self.room, self.records, options.fill)
        state.beside = prompt._replace(states=None, states_mask=None, negative=None, negative_mask=None)
        state.helper = Sampling(self.room, self.rows, ()).start(state.beside, options)
        return state

    def propose(self, state: State, options: Options) -> Tensor:
        """What the assistant chooses next, once the prompt is read: (1, N)"""
        helper, longest = cast(State, cast(AssistedState, state).helper), self.assistant.config.n_positions
        count = min(self.guesses, self.room - state.step - 1, longest - state.length)
        if state.cache is None or count < 1:
            return state.ids[:, :0]
        catch_up(helper, state)
        choosing = Sampling(self.room, self.rows, ())
        while helper.length < state.length + count and not bool(helper.finished.all()):
            choosing.update(helper, self.read(helper, cast(AssistedState, state)), state.ids[:, :0], options)
        return helper.ids[:, state.length : helper.length]

    def read(self, helper: State, state: AssistedState) -> Tensor:
        """The assistant's logits (1, 1, V) of the next token."""
        if helper.cache is None:
            prefill(self.assistant, cast(Prompt, state.beside), helper)
        cache = cast(KVCache, helper.cache)
        return decode_step(self.assistant, helper, helper.ids[:, cache.length : helper.length], 1)


def catch_up(helper: State, state: State) -> None:
    """Bring an assistant to what the model has chosen by now."""
    helper.ids, helper.mask = state.ids.clone(), state.mask
    helper.step, helper.length = state.step, state.length
    helper.stop, helper.finished, helper.is_watched = state.stop, state.finished, state.is_watched
    if helper.cache is not None:
        helper.cache.length = min(helper.cache.length, state.length - 1)


def guess(ids: Tensor, longest: int, count: int) -> Tensor:
    """Up to `count` tokens that followed the longest n-gram that a text (1, T) ends with when it was there before.

    That is the latest time that so many followed, or else the first, which the most followed: (1, N)
    """
    for size in range(min(longest, ids.shape[1] - 1) if count else 0, 0, -1):
        windows = ids[0, :-1].unfold(0, size, 1)  # (T - size, size)
        after = (windows == ids[0, -size:]).all(-1).nonzero()[:, 0] + size
        if len(after):
            enough = after[after + count <= ids.shape[1]]
            start = int(enough[-1] if len(enough) else after[0])
            return ids[:, start : start + count]
    return ids[:, :0]
