"""The options of a generation as plain numbers: what the loop of every framework is given.

Sizes come in few steps, so that another value rarely compiles anything. B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.rules import phrase_table

Array = np.ndarray[Any, Any]
PHRASES, STOPS, ENDS = 128, 16, 32  # the least numbers of rows that tables have


class Options(NamedTuple):
    """The options of `GenerationConfig` as numbers and NumPy's arrays, or a framework's own in their place."""

    do_sample: Any
    temperature: Any
    top_k: Any  # 0 is off
    top_p: Any
    min_p: Any  # 0 is off
    typical_p: Any  # 1 is off
    guidance_scale: Any
    least_kept: Any
    repetition_penalty: Any
    no_repeat_ngram_size: Any  # 0 is off
    min_length: Any
    min_new_tokens: Any
    length_penalty: Any
    early_stopping: Any  # 0 is False, 1 True, 2 "never"
    candidates: Any
    max_matching_ngram_size: Any
    fill: Any  # what a finished row is filled with
    ends: Any  # (at least 32,) int32, the end tokens; -1 is none
    phrases: Any  # (at least 128, L) int32, filled up with -1 on the left; see `rules.phrase_table`
    biases: Any  # (at least 128,) float32; 0 where there is no phrase
    stops: Any  # (at least 16, V) int32, of the stop strings; see `stopping.stop_table`
    streams: Any  # (B, 2) uint32, the low and the high word of each row's noise

    @classmethod
    def of(cls, config: GenerationConfig, stops: Array, streams: Sequence[int]) -> Options:
        """The numbers of a configuration, of its stop strings' table (S, V), and of each row's stream of noise."""
        phrases, biases = phrase_table(config.biases)
        return cls(
            do_sample=config.do_sample,
            temperature=float(config.temperature),
            top_k=within(config.top_k or 0),
            top_p=float(config.top_p),
            min_p=float(config.min_p or 0),
            typical_p=float(config.typical_p or 1),
            guidance_scale=float(config.guidance_scale or 1),
            least_kept=within(config.least_kept),
            repetition_penalty=float(config.repetition_penalty),
            no_repeat_ngram_size=within(config.no_repeat_ngram_size),
            min_length=within(config.min_length),
            min_new_tokens=within(config.min_new_tokens or 0),
            length_penalty=float(config.length_penalty),
            early_stopping=[False, True, "never"].index(config.early_stopping),
            candidates=within(config.candidates),
            max_matching_ngram_size=within(config.max_matching_ngram_size),
            fill=within(config.fill_token_id),
            ends=end_table(config.eos_token_ids),
            phrases=filled(phrases, PHRASES),
            biases=filled(biases, PHRASES),
            stops=filled(stops, STOPS) if config.stops else no_stops(stops.shape[1]),
            streams=np.array([[s & 0xFFFFFFFF, s >> 32] for s in streams], np.uint32).reshape(-1, 2),
        )

    def row(self, row: int) -> Options:
        """Those of one row alone."""
        return self._replace(streams=self.streams[row : row + 1])


def within(number: int) -> int:
    """A number that int32 holds; what is beyond it means what the greatest means: all, never, no token."""
    return min(int(number), np.iinfo(np.int32).max)


def end_table(ends: Sequence[int]) -> Array:
    """The end tokens, filled up with -1 to a power of two."""
    table = np.full(1 << max(len(ends) - 1, ENDS - 1).bit_length(), -1, np.int32)
    table[: len(ends)] = [within(token) for token in ends]
    return table


def filled(table: Array, rows: int) -> Array:
    """A table with so many rows at least, those that are added being 0."""
    whole = np.zeros((max(rows, len(table)), *table.shape[1:]), table.dtype)  # np.pad takes ten times as long
    whole[: len(table)] = table
    return whole


@lru_cache(maxsize=2)
def no_stops(vocab_size: int) -> Array:
    """The table of no stop string, which no token leaves the first state of."""
    return np.zeros((STOPS, vocab_size), np.int32)
