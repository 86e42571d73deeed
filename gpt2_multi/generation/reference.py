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
from gpt2_multi.generation.rules import guide, gumbel, process, window_start
from gpt2_multi.generation.stopping import FOUND
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.reference import Weights, forward, lm_logits

Array = np.ndarray[Any, Any]
LogitsOf = Callable[[Sequence[int]], Array]  # the logits (V,) after these ids


@dataclass
class Decoding:
    """What texts are made by: the options, the stop strings' table (S, V), and how many tokens may follow.

    The caller may bring rules of his own, from ids and logits to logits, and an end, from the ids so far. apart: the
    logits after what was made, without the prompt, which `guidance_scale` leads away from.
    """

    config: GenerationConfig
    stops: Array
    new_tokens: int
    own: Callable[[Array, Array], Array] | None = None
    is_over: Callable[[Sequence[int]], bool] | None = None
    apart: LogitsOf | None = None

    def ends(self, prompt: Sequence[int], made: Sequence[int]) -> bool:
        """Whether a text is over: at an end token or stop string, at the length, or where the caller says so."""
        state = 0
        for token in made:
            state = self.stops[state, token] if state != FOUND else FOUND
        if self.is_over is not None and self.is_over([*prompt, *made]):
            return True
        return state == FOUND or made[-1] in self.config.eos_token_ids or len(made) == self.new_tokens

    def processed(self, logits: Array, prompt: Sequence[int], made: Sequence[int]) -> Array:
        """What is chosen by, of the logits (V,) after a prompt and what was made, or log-probabilities."""
        if self.apart is not None:
            logits = guide(logits, self.apart(made), self.config.guidance_scale or 1)
        return process(logits, np.array([*prompt, *made], np.int64), len(made), self.config, self.own)


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
    while len(made) < decoding.new_tokens and not (made and decoding.ends(prompt, made)):
        logits = decoding.processed(logits_of(prompt + made), prompt, made)
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
        over = [decoding.ends(prompt, made) for _, made in found]
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
        scores.append(decoding.processed(log_probs, prompt, made) + score)
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
