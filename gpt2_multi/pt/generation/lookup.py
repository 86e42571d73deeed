"""Prompt-lookup decoding in PyTorch: greedy choice in fewer steps, where a text repeats itself.

What followed the last tokens when they were there before is read together with them, and kept as far as the model would
have chosen it (Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.pt.generation.decoding import Prompt, Reader
from gpt2_multi.pt.generation.rules import Rules
from gpt2_multi.pt.training import widened

if TYPE_CHECKING:
    from gpt2_multi.pt.heads import GPT2LMHeadModel


@torch.no_grad()
def speculate(
    model: GPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, rules: Rules, new: int
) -> Iterator[Tensor]:
    """The tokens (1,) of a greedy choice after one prompt without padding."""
    assert config.prompt_lookup_num_tokens is not None
    reader, step, guess = Reader(model, prompt, new), 0, prompt.ids[:, :0]
    logits = reader.begin()[:, None]  # (1, guesses + 1, V)
    while True:
        for place in range(logits.shape[1]):
            chosen = rules.choose(rules.process(widened(logits[:, place]), step), step)
            yield rules.accept(chosen, step)
            step += 1
            if step == new or rules.all_finished():
                return
            if place == guess.shape[1] or chosen != guess[:, place]:
                break
        reader.forget(guess.shape[1] - place)
        said = rules.ids[:, : rules.length + step]
        guess = guessed(said, config.max_matching_ngram_size, min(config.prompt_lookup_num_tokens, new - step - 1))
        logits = reader.follow(torch.cat([chosen[:, None], guess], 1))


def guessed(ids: Tensor, longest: int, count: int) -> Tensor:
    """Up to `count` tokens that followed the longest n-gram that a text (1, T) ends with when it was there before.

    That is the latest time that so many followed, or else the first, which the most followed: (1, N)
    """
    for size in range(min(longest, ids.shape[1] - 1), 0, -1):
        windows = ids[0, :-1].unfold(0, size, 1)  # (T - size, size)
        after = (windows == ids[0, -size:]).all(-1).nonzero()[:, 0] + size
        if len(after):
            enough = after[after + count <= ids.shape[1]]
            start = int(enough[-1] if len(enough) else after[0])
            return ids[:, start : start + count]
    return ids[:, :0]
