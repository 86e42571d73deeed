"""Texts that come and go in TensorFlow: rows of one batch, each with its prompt, options and noise, and a token a step.

All rows end in the same column, and begin where their length says; a mask hides what is before that. A prompt is read
alone, but for its last token, which the next step reads with the newest of the others. Steps are graphs that are traced
once, for any number of rows and columns, as XLA would compile for longer than it takes to write a text: so there are as
many rows as texts, and as many columns as the longest needs, or those that have left needed.

R rows, T prompt length, C columns, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count as counter
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import PER_ROW, Options, PromptScore, Row, Step
from gpt2_multi.model import inputs
from gpt2_multi.tf.attention import KVCache, Pair, upcast
from gpt2_multi.tf.generation.decoders import Decoders
from gpt2_multi.tf.generation.decoding import forward
from gpt2_multi.tf.generation.rules import as_tensors, choose, process
from gpt2_multi.tf.layers import sizes

Array = np.ndarray[Any, Any]
CHUNK = 128  # tokens of prompts that are read between two steps, so that many do not stop the others
NOBODY = Row(GenerationConfig())


class Reading(NamedTuple):
    """A prompt that is to be read."""

    slot: int
    row: Row
    ids: Array  # (T,) int32


class Place(NamedTuple):
    """A row of the batch, which begins in a column."""

    slot: int
    row: Row
    start: int


class State(NamedTuple):
    """The rows."""

    layers: tuple[Pair, ...]  # (R, H, C, D) each, of all tokens but the newest
    ids: tf.Tensor  # (R, C + 1) int32
    mask: tf.Tensor  # (R, C + 1) bool, which of them are there
    made: tf.Tensor  # (R, 1) int32, how many of them were made


class Own(NamedTuple):
    """The options of rows, in few tensors: each takes TensorFlow time at every call."""

    numbers: tf.Tensor  # (R, N) float64, those of `PER_ROW`
    ends: tf.Tensor
    phrases: tf.Tensor
    biases: tf.Tensor
    streams: tf.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Own:
        """Those of these rows."""
        options = Options.stacked(rows, 1)
        numbers = np.concatenate([getattr(options, name) for name in PER_ROW], 1, dtype=np.float64)
        return cls(tf.constant(numbers), *(tf.constant(getattr(options, name)) for name in cls._fields[1:]))

    def opened(self) -> Options:
        """As the rules take them."""
        columns = zip(PER_ROW.items(), tf.split(self.numbers, len(PER_ROW), 1), strict=True)
        numbers = {name: tf.cast(x, tf.as_dtype(kind)) for (name, kind), x in columns}  # (R, 1) each
        return as_tensors(Options.stacked([NOBODY], 1))._replace(
            **numbers, **dict(zip(self._fields[1:], self[1:], strict=True))
        )


class Functions(NamedTuple):
    """What is traced of a model, for any number of rows and columns."""

    prefill: Any
    arrange: Any
    step: Any
    score: Any

    @classmethod
    def of(cls, model: keras.Model) -> Functions:
        """Those of a model, which are traced when they are first called."""
        ids, rows, number = (tf.TensorSpec(shape, tf.int32) for shape in ((1, None), (None,), ()))
        state, own = of_any_size(model)

        def traced(function: Any, *specs: Any) -> Any:
            return tf.function(function, autograph=False, input_signature=specs)

        return cls(
            traced(partial(prefill, model), ids),
            traced(arrange, state, rows, number, state),
            traced(partial(next_tokens, model), state, own, number),
            traced(partial(scores, model), ids, number),
        )


class Slots:
    """Rows of a model, at most `count`, that join and leave between steps; the model is not to change meanwhile.

    A row's tokens are those of `generate` with its prompt, options and stream alone. How long it gets is its caller's
    to see to, who takes it out at its end, within the model's context.
    """

    def __init__(self, model: keras.Model, count: int) -> None:
        self.model, self.count = model, count
        self.readings: list[Reading] = []
        self.places: list[Place] = []
        self.gone: set[int] = set()  # slots of places whose rows are still in the state
        self.names = counter()
        self.known: tuple[Array, tuple[Pair, ...]] | None = None  # the prompt that was read last, and its cache
        self.length = 0  # how many columns there are before that of the next key
        self.functions: Functions = Decoders.of(model, False).kept.setdefault("slots", Functions.of(model))
        self.state = blank(model, 0)
        self.own: Any = None  # the options of the rows of the state

    @property
    def free(self) -> int:
        """How many more rows may join."""
        return self.count - len(self.readings) - len(self.places) + len(self.gone)

    def join(self, ids: Sequence[int] | Array, row: Row) -> int:
        """Take in a prompt (T,), which the next steps read: its slot, a number that no other row has or had.

        InputError where there is no slot, and for a prompt or options that the model cannot continue by.
        """
        prompt = np.asarray(ids)
        row.check(prompt, self.model.config, self.free)
        self.readings.append(Reading(next(self.names), row, prompt.astype(np.int32)))
        return self.readings[-1].slot

    def leave(self, slot: int) -> None:
        """Have a row gone, in whatever state it is."""
        self.readings = [reading for reading in self.readings if reading.slot != slot]
        self.gone |= {slot} & {place.slot for place in self.places}

    def step(self) -> Step:
        """Read what is new, prompts of up to `CHUNK` tokens or one, and a token of each row: its next token."""
        ready = self._read_prompts()
        if ready or self.gone:
            self._settle(ready)
        if not self.places:
            return Step([], np.zeros(0, np.int64), np.zeros(0, np.float32), *nothing(0))
        longest = max(self.length - place.start for place in self.places)
        inputs.check_positions(0, longest, self.model.config.n_positions)
        tops = [place.row.top for place in self.places if place.row.top is not None]
        asked = min(max(tops), self.model.config.vocab_size) if tops else -1
        self.state, chosen, *others = self.functions.step(self.state, self.own, tf.constant(asked))
        self.length += 1
        return Step([place.slot for place in self.places], chosen.numpy().astype(np.int64), *in_numpy(others))

    def score(self, ids: Sequence[int] | Array, top: int) -> PromptScore:
        """How likely each token of a prompt (T,) but the first is, and the `top` likeliest in its place."""
        given, config = np.asarray(ids), self.model.config
        inputs.check_ids("ids", inputs.Facts.of(given), config.vocab_size)
        inputs.check_positions(0, len(given) - 1, config.n_positions)
        found = self.functions.score(tf.constant(given[None], tf.int32), tf.constant(min(top, config.vocab_size)))
        return PromptScore(*in_numpy(found))

    def warm(self) -> bool:
        """Where there is no row, trace what rows will need; False where there is nothing to do."""
        if self.functions.step.experimental_get_tracing_count() or self.free < self.count:
            return False
        slot = self.join([0, 0][: self.model.config.n_positions - 1], NOBODY)
        self.step()
        self.leave(slot)
        self.functions.score.get_concrete_function()
        return True

    def _read_prompts(self) -> list[tuple[Reading, tuple[Pair, ...]]]:
        """Read prompts of up to `CHUNK` tokens, or one: those that are read, with their keys and values."""
        budget, ready = CHUNK, list[tuple[Reading, tuple[Pair, ...]]]()
        while self.readings and (not ready or len(self.readings[0].ids) <= budget):
            reading = self.readings.pop(0)
            budget -= len(reading.ids)
            if self.known is None or not np.array_equal(self.known[0], reading.ids):
                ids = tf.constant(reading.ids[None])
                read = self.functions.prefill(ids) if len(reading.ids) > 1 else blank(self.model, 1).layers
                self.known = reading.ids, read
            ready.append((reading, self.known[1]))
        return ready

    def _settle(self, ready: Sequence[tuple[Reading, tuple[Pair, ...]]]) -> None:
        """Have new rows after those that are still there, and no more columns than they need."""
        kept = [row for row, place in enumerate(self.places) if place.slot not in self.gone]
        there = [self.places[row] for row in kept]
        self.gone.clear()
        needed = [self.length - place.start for place in there] + [len(reading.ids) - 1 for reading, _ in ready]
        length = max(needed, default=0)
        self.places = [place._replace(start=place.start + length - self.length) for place in there]
        self.places += [Place(reading.slot, reading.row, length + 1 - len(reading.ids)) for reading, _ in ready]
        self.length = length
        new = together(blank(self.model, 0), ready, length)
        self.state = self.functions.arrange(self.state, tf.constant(kept, tf.int32), tf.constant(length), new)
        if self.places:
            self.own = Own.of([place.row for place in self.places])


def blank(model: keras.Model, rows: int) -> State:
    """Rows without a token."""
    config, kind = model.config, tf.as_dtype(model.compute_dtype)
    shapes = [(rows, len(config.heads(layer)), 0, config.n_embd // config.n_head) for layer in range(config.n_layer)]
    layers = tuple((tf.zeros(shape, kind), tf.zeros(shape, kind)) for shape in shapes)
    ids = tf.zeros((rows, 1), tf.int32)
    return State(layers, ids, ids > 0, ids)


def of_any_size(model: keras.Model) -> tuple[State, Own]:
    """What the state and the options of any rows may be."""
    spec, own = tf.TensorSpec, Own.of([NOBODY])
    layers = tf.nest.map_structure(
        lambda x: spec((None, x.shape[1], None, x.shape[3]), x.dtype), blank(model, 0).layers
    )
    state = State(layers, spec((None, None), tf.int32), spec((None, None), tf.bool), spec((None, 1), tf.int32))
    fixed = {"numbers": len(PER_ROW), "streams": 2}
    sizes = [(None, fixed[name]) if name in fixed else [None] * x.shape.rank for name, x in own._asdict().items()]
    return state, Own(*(spec(size, x.dtype) for size, x in zip(sizes, own, strict=True)))


def prefill(model: keras.Model, ids: tf.Tensor) -> tuple[Pair, ...]:
    """The keys and values of a prompt's tokens (1, T) but the last, each (1, H, T - 1, D)."""
    read = ids[:, :-1]
    found: tuple[Pair, ...] = forward(model, read, tf.ones_like(read, tf.bool), ()).past_key_values.layers
    return found


def together(none: State, ready: Sequence[tuple[Reading, tuple[Pair, ...]]], length: int) -> State:
    """The rows of prompts that were read, after none, in so many columns and that of their last tokens."""
    ids, mask = np.zeros((len(ready), length + 1), np.int32), np.zeros((len(ready), length + 1), bool)
    for row, (reading, _) in enumerate(ready):
        start = length + 1 - len(reading.ids)
        ids[row, start:], mask[row, start:] = reading.ids, True

    def rows(*each: tf.Tensor) -> tf.Tensor:
        return tf.concat([tf.pad(x, [(0, 0), (0, 0), (length - x.shape[2], 0), (0, 0)]) for x in each], 0)

    layers = tf.nest.map_structure(rows, none.layers, *(read for _, read in ready))
    return State(layers, tf.constant(ids), tf.constant(mask), tf.zeros((len(ready), 1), tf.int32))


def arrange(state: State, kept: tf.Tensor, length: tf.Tensor, new: State) -> State:
    """These rows of a state (N,), with keys in so many columns, and new ones after them."""

    def joined(x: tf.Tensor, other: tf.Tensor, axis: int, columns: tf.Tensor) -> tf.Tensor:
        more = tf.maximum(columns - tf.shape(x)[axis], 0)
        x = tf.pad(tf.gather(x, kept), [(0, 0)] * axis + [(more, 0)] + [(0, 0)] * (x.shape.rank - axis - 1))
        last = tf.range(tf.shape(x)[axis] - columns, tf.shape(x)[axis])
        return tf.concat([tf.gather(x, last, axis=axis), other], 0)

    layers = tf.nest.map_structure(lambda x, other: joined(x, other, 2, length), state.layers, new.layers)
    ids, mask = (joined(x, other, 1, length + 1) for x, other in ((state.ids, new.ids), (state.mask, new.mask)))
    return State(layers, ids, mask, tf.concat([tf.gather(state.made, kept), new.made], 0))


def next_tokens(model: keras.Model, state: State, own: Own, top: tf.Tensor) -> tuple[Any, ...]:
    """Read the newest tokens and choose the next: the state with them, and they (R,), and what `likelihoods` gives."""
    (layers, ids, mask, made), options = state, own.opened()
    output = forward(model, ids[:, -1:], mask, (), past_key_values=KVCache(layers))
    logits = upcast(output.logits[:, 0])
    chosen = choose(process(logits, ids, mask, sizes(ids)[1], made, options), made, options)
    ids = tf.concat([ids, chosen[:, None]], 1)
    state = State(output.past_key_values.layers, ids, tf.pad(mask, [(0, 0), (0, 1)], constant_values=True), made + 1)
    return state, chosen, *likelihoods(logits, chosen, top)


def scores(model: keras.Model, ids: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """How likely each token of a prompt (1, T) but the first is: see `likelihoods`."""
    logits = upcast(model(ids, use_cache=False, return_dict=True).logits[0, :-1])
    return likelihoods(logits, ids[0, 1:], top)


def likelihoods(logits: tf.Tensor, chosen: tf.Tensor, top: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The log-probabilities (R,) of tokens, and the likeliest ids (R, K) with theirs; nan and none if `top` is -1."""

    def found() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        log_probs = tf.nn.log_softmax(logits)
        values, ids = tf.math.top_k(log_probs, top)
        own = tf.gather(log_probs, chosen, batch_dims=1)
        return tf.cast(own, tf.float32), ids, tf.cast(values, tf.float32)

    def none() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        rows = sizes(logits)[0]
        return tf.fill((rows,), np.float32("nan")), tf.zeros((rows, 0), tf.int32), tf.zeros((rows, 0))

    own, ids, values = tf.cond(top >= 0, found, none)
    return own, ids, values


def in_numpy(found: Sequence[tf.Tensor]) -> tuple[Array, Array, Array]:
    """What `likelihoods` gives, in NumPy."""
    log_probs, ids, top = (x.numpy() for x in found)
    return log_probs, ids.astype(np.int64), top


def nothing(rows: int) -> tuple[Array, Array]:
    """No likeliest ids, (R, 0), and no log-probabilities of them."""
    return np.zeros((rows, 0), np.int64), np.zeros((rows, 0), np.float32)
