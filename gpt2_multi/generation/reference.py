"""Generation on the oracle: the loops of the specification in NumPy, one prompt at a time, without a cache.

What every backend's `generate` is held to, token by token. A row is a list of ids, and gets a number for each option
that is on; nothing here is quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.rules import gumbel, process, window_start
from gpt2_multi.generation.stopping import FOUND
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.reference import Weights, forward, lm_logits

Array = np.ndarray[Any, Any]
LogitsOf = Callable[[Sequence[int]], Array]  # the logits (V,) after these ids


@dataclass
class Decoding:
    """What texts are made by: the options, the stop strings' table (S, V), and how many tokens may follow."""

    config: GenerationConfig
    stops: Array
    new_tokens: int

    def ends(self, made: Sequence[int]) -> bool:
        """Whether a text is over: at an end token, at the end of a stop string, or at the length."""
        state = 0
        for token in made:
            state = self.stops[state, token] if state != FOUND else FOUND
        return state == FOUND or made[-1] in self.config.eos_token_ids or len(made) == self.new_tokens


def generate(
    model: GPT2Config, weights: Weights, prompt: Sequence[int], config: GenerationConfig, stream: int, stops: Array
) -> list[list[int]]:
    """What follows a prompt, in each text to return, up to its end. stream: the noise of the first row."""
    logits_of = partial(logits_after, model, weights, config.sliding_window)
    decoding = Decoding(config, stops, config.total_length(len(prompt)) - len(prompt))
    if config.num_beams > 1:
        return beam_search(logits_of, decoding, list(prompt), stream)
    return [decode(logits_of, decoding, list(prompt), stream + row) for row in range(config.num_return_sequences)]


def logits_after(model: GPT2Config, weights: Weights, slides: bool, ids: Sequence[int]) -> Array:
    """The logits (V,) of the token after these."""
    start = window_start(len(ids), model.n_positions) if slides else 0
    hidden = forward(model, weights, np.array([ids[start:]])).last_hidden_state[0, -1]
    return lm_logits(model, weights, hidden)


def decode(logits_of: LogitsOf, decoding: Decoding, prompt: list[int], stream: int) -> list[int]:
    """Greedy choice, or samples under a stream of noise."""
    made: list[int] = []
    while len(made) < decoding.new_tokens and not (made and decoding.ends(made)):
        logits = process(logits_of(prompt + made), np.array(prompt + made), len(made), decoding.config)
        noise = gumbel(stream, 0, len(made), np.arange(len(logits))) if decoding.config.do_sample else 0
        made.append(int(np.argmax(logits + noise)))
    return made


def beam_search(logits_of: LogitsOf, decoding: Decoding, prompt: list[int], stream: int) -> list[list[int]]:
    """Beam search, or beam sampling, as transformers 4.57 has it."""
    config, penalty = decoding.config, decoding.config.length_penalty
    running: list[tuple[float, list[int]]] = [(0.0, [])]  # scores, and what was made
    finished: list[tuple[float, list[int]]] = []
    for step in range(decoding.new_tokens):
        found = candidates(logits_of, decoding, prompt, running, stream)
        over = [decoding.ends(made) for _, made in found]
        running = best([beam for beam, is_over in zip(found, over, strict=True) if not is_over], config.num_beams)
        first = zip(found[: config.num_beams], over, strict=False)
        new = [(score / (step + 1) ** penalty, made) for (score, made), is_over in first if is_over]
        finished = best([*finished, *new], config.num_beams)
        if not running or not can_improve(decoding, running[0][0], finished, step + 1):
            break
    nothing: list[list[int]] = [[]] * config.num_return_sequences  # where so many texts cannot be found
    return [*(made for _, made in finished), *nothing][: config.num_return_sequences]


def best(beams: list[tuple[float, list[int]]], count: int) -> list[tuple[float, list[int]]]:
    """The beams with the greatest scores, the earlier first among equals."""
    return sorted(beams, key=lambda beam: -beam[0])[:count]


def candidates(
    logits_of: LogitsOf, decoding: Decoding, prompt: list[int], running: list[tuple[float, list[int]]], stream: int
) -> list[tuple[float, list[int]]]:
    """The likeliest continuations by one token, or samples of them without replacement (Kool et al. 2019)."""
    scores, noises = [], []
    for row, (score, made) in enumerate(running):
        logits = logits_of(prompt + made)
        log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        scores.append(process(log_probs, np.array(prompt + made), len(made), decoding.config) + score)
        noises.append(gumbel(stream + row, 0, len(made), np.arange(len(logits))))
    flat, width = np.concatenate(scores), len(scores[0])
    rank = flat + np.concatenate(noises) if decoding.config.do_sample else flat
    order = [int(i) for i in np.argsort(-rank, kind="stable")[: decoding.config.candidates] if flat[i] > -math.inf]
    return [(float(flat[i]), [*running[i // width][1], i % width]) for i in order]


def can_improve(decoding: Decoding, score: float, finished: list[tuple[float, list[int]]], made: int) -> bool:
    """Whether the best running beam may yet be better than the worst finished one."""
    config = decoding.config
    if len(finished) < config.num_beams:
        return True
    if config.early_stopping is True:
        return False
    hopeful = config.early_stopping == "never" and config.length_penalty > 0
    return bool(score / (decoding.new_tokens if hopeful else made) ** config.length_penalty > finished[-1][0])
