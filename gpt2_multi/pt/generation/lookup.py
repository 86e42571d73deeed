"""Prompt-lookup decoding in PyTorch: greedy choice in fewer steps, where a text repeats itself.

What followed the last tokens when they were there before is read together with them, and kept as far as the model would
have chosen it (Saxena 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpt2_multi.generation.options import Options
from gpt2_multi.pt.generation.decoding import Sampling, State


@dataclass(frozen=True)
class Lookup(Sampling):
    """Greedy choice in one row without padding, several tokens at a time."""

    guesses: int  # at most, of a step

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
        state.cache.length = state.length - 1  # type: ignore[union-attr]


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
