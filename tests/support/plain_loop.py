"""The specification's loops over any model, as a function of ids without a cache: what `generate` has to give too."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.reference import Decoding, beam_search, decode
from gpt2_multi.generation.rules import window_start
from gpt2_multi.model.config import GPT2Config

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 7, "temperature": 1.5, "seed": 3, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, sampled": {"num_beams": 2, "do_sample": True, "top_k": 0, "seed": 5},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "sliding": {"sliding_window": True, "max_new_tokens": 24},
}


def plain(
    logits_of: Callable[[Sequence[int]], Any],
    model: GPT2Config,
    prompts: Sequence[Sequence[int]],
    own: Callable[[int, Any, Any], Any] | None = None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
    apart: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> Any:
    """New tokens (B * n, N) after each prompt, filled up; `logits_of` gives those (V,) after ids.

    own: rules of the caller, from the prompt's number, ids and logits. is_over: his end; there is no other. apart: what
    `guidance_scale` leads away from, for each prompt.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options that change nothing
        config = GenerationConfig.of(model).with_options({"max_new_tokens": 6, "eos_token_id": None, **options})
    stops, rows = np.zeros((1, model.vocab_size), np.int32), []

    def shown(ids: Sequence[int]) -> Any:
        start = window_start(len(ids), model.n_positions) if config.sliding_window else 0
        return np.asarray(logits_of(ids[start:]), np.float64)

    for number, prompt in enumerate(prompts):
        decoding = Decoding(config, stops, config.total_length(len(prompt)) - len(prompt), is_over=is_over)
        decoding.own = own and functools.partial(own, number)
        decoding.apart = apart and functools.partial(lambda before, made: shown([*before, *made]), apart[number])
        stream = (config.seed or 0) + number * config.rows
        if config.num_beams > 1:
            rows += beam_search(shown, decoding, list(prompt), stream)
        else:
            rows += [decode(shown, decoding, list(prompt), stream + i) for i in range(config.num_return_sequences)]
    width = max(map(len, rows))
    return np.array([[*row, *[config.fill_token_id] * (width - len(row))] for row in rows])
