"""The options of a generation as plain numbers: what the loop of every framework is given.

Either one call's, or those of rows that come and go, each with options of its own, as a server has them (`Row`, `Step`,
and `Slots` of each framework). Sizes come in few steps, so that another value rarely compiles anything. B rows,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.rules import phrase_table
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config

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
    presence: Any = 0.0  # see `rules.discourage`
    frequency: Any = 0.0

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

    @classmethod
    def stacked(cls, rows: Sequence[Row], vocab_size: int) -> Options:
        """Those of rows that each have their own: `PER_ROW` as (R, 1) arrays, ends (R, E), phrases (R, P, L).

        A greedy row is one that keeps its likeliest token alone, and is to get no noise; there are no stop strings.
        """
        each = [row.options for row in rows]
        table = np.array([[getattr(one, name) for name in PER_ROW] for one in each], np.float64)
        numbers: dict[str, Any] = {name: table[:, [at]].astype(kind) for at, (name, kind) in enumerate(PER_ROW.items())}
        tables = {name: stack([getattr(one, name) for one in each], none) for name, none in TABLES.items()}
        streams = np.concatenate([one.streams for one in each])
        return each[0]._replace(**numbers, **tables, streams=streams, fill=0, stops=no_stops(vocab_size))

    def row(self, row: int) -> Options:
        """Those of one row alone."""
        return self._replace(streams=self.streams[row : row + 1])


# What `stacked` gives row by row, and what stands in tables that are filled up.
PER_ROW: Mapping[str, type] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"), np.float64),
    **dict.fromkeys(("presence", "frequency"), np.float64),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens"), np.int32),
    "do_sample": np.bool_,
}
TABLES = {"ends": -1, "phrases": -1, "biases": 0}
GREEDY = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
# What a row that comes and goes cannot have: name -> the value that is off. How long it gets, its caller decides.
REFUSED: Mapping[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1, "prompt_lookup_num_tokens": None,
    "sliding_window": False, "stop_strings": None, "max_time": None, "return_dict_in_generate": False,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Row:
    """How the tokens are chosen of one text among others that come and go.

    stream: the 64-bit stream of its noise, as of `rules.noise_streams`. bias: added to tokens' logits. presence and
    frequency: see `rules.discourage`. top: None where nobody asks for log-probabilities, or of how many of the
    likeliest tokens.
    """

    config: GenerationConfig
    stream: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    top: int | None = None

    def __post_init__(self) -> None:
        for name, off in REFUSED.items():
            if (found := getattr(self.config, name)) not in (None, off):
                raise InputError(f"{name}: expected {off!r} for one text among others, found {found!r}; leave it out")

    def check(self, ids: Array, model: GPT2Config, free: int) -> None:
        """InputError where a model has no slot free, or cannot continue a prompt (T,) by it."""
        if free < 1:
            raise InputError("slots: all are taken; wait until a text leaves, or make more of them")
        inputs.check_shape("ids", ids.shape, (None,))
        inputs.check_prompts(len(ids))
        inputs.check_ids("ids", inputs.Facts.of(ids), model.vocab_size)
        inputs.check_context(len(ids), 1, model.n_positions)
        self.config.check_vocabulary(model.vocab_size)
        if self.bias:
            inputs.check_vocabulary("bias", min(self.bias), max(self.bias), model.vocab_size)

    @cached_property
    def options(self) -> Options:
        """Its options, of which there are no stop strings."""
        own = Options.of(self.config, no_stops(1), [self.stream])
        if self.bias:
            phrases, biases = phrase_table([*self.config.biases, *(((i,), x) for i, x in self.bias.items())])
            own = own._replace(phrases=filled(phrases, PHRASES), biases=filled(biases, PHRASES))
        own = own._replace(presence=float(self.presence), frequency=float(self.frequency))
        return own if own.do_sample else own._replace(**GREEDY)


class Step(NamedTuple):
    """One token of each row that is there, and how likely it was before any option changed that.

    slots: which row each is of, as `Slots.join` named it; none where prompts are still read. Log-probabilities are nan
    where no row asks for them. K is the greatest number of likeliest tokens that a row asks for, or the vocabulary's.
    """

    slots: Sequence[int]
    tokens: Array  # (R,) int64
    log_probs: Array  # (R,) float32, of the tokens
    top_ids: Array  # (R, K) int64, the likeliest first
    top_log_probs: Array  # (R, K) float32


class PromptScore(NamedTuple):
    """How likely each token of a prompt (T,) but the first is after those before it, as `Slots.score` gives it."""

    log_probs: Array  # (T - 1,) float32
    top_ids: Array  # (T - 1, K) int64, the likeliest first
    top_log_probs: Array  # (T - 1, K) float32


def stack(tables: Sequence[Array], none: int) -> Array:
    """Tables of several rows as one, (R, N) or (R, N, L), the smaller filled up; phrases stand on the right."""
    if len({table.shape for table in tables}) == 1:
        return np.stack(tables)
    whole = np.full((len(tables), *np.max([table.shape for table in tables], axis=0)), none, tables[0].dtype)
    if whole.ndim == 3:
        whole[..., -1] = 0  # some token's, to which 0 is added
    for row, table in enumerate(tables):
        whole[row, : len(table)][..., -table.shape[-1] :] = table
    return whole


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
