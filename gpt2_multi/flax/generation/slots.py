"""Texts that come and go in JAX: rows of one batch, each with its prompt, options and noise, and a token a step.

All rows end in the same column, and begin where their length says; a mask hides what is before that. So a step writes
one column, and a row joins wherever it has room. A prompt is read alone, but for its last token, which the next step
reads with the newest of the others. What is compiled is the step for each power of two of rows and a few numbers of
columns, and the rules for each number of rows; small compiled functions move rows from one to another. While a step is
computed, its caller sees to the tokens of the one before. Rows are not cut over several devices.

R rows, T prompt length, C columns that there is room for, W columns at most, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count as counter
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt2_multi.flax.attention import KVCache, upcast
from gpt2_multi.flax.generation import decoding
from gpt2_multi.flax.generation.cpu_kernels import ROWS, are_worthwhile, multiplied_first
from gpt2_multi.flax.generation.decoding import Prompt, Weights, forward, put
from gpt2_multi.flax.generation.rules import choose, process
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options, PromptScore, Row, Step
from gpt2_multi.generation.request import NO_CALLBACKS
from gpt2_multi.generation.rules import bucket
from gpt2_multi.model import inputs

NumPyArray = np.ndarray[Any, Any]
CHUNK = 128  # tokens of prompts that are read between two steps, so that many do not stop the others
LEAST = 64  # columns that there is room for
COLUMNS = 16  # which are copied at once; of which every room and every bucket is a multiple
TOP = 8  # likeliest tokens that are looked for where any are, or a power of two that is enough


class Reading(NamedTuple):
    """A prompt that is to be read."""

    slot: int
    row: Row
    ids: NumPyArray  # (T,) int32


class Place(NamedTuple):
    """A row of the batch, which begins in a column."""

    slot: int
    row: Row
    start: int


class Made(NamedTuple):
    """A step that is computed."""

    there: list[tuple[int, Place]]
    found: Array  # see `likelihoods`


class Texts(NamedTuple):
    """What rules look at, for which it does not matter how many columns of keys there are."""

    ids: Array  # (R, W + 1) int32
    mask: Array  # (R, W + 1) bool, which of them are there
    made: Array  # (R, 1) int32, how many of them were made


class State(NamedTuple):
    """The rows on the device."""

    cache: KVCache  # (R, H, C, D) each, of all tokens but the newest
    texts: Texts


class Functions(NamedTuple):
    """What is compiled of a model; what changes a state writes over it, but for `gather` and `refit`."""

    prefill: Callable[..., Any]
    enter: Callable[..., State]
    gather: Callable[..., State]
    shift: Callable[..., State]
    refit: Callable[..., State]
    read: Callable[..., tuple[Array, State]]
    choose: Callable[..., tuple[Array, Texts]]
    score: Callable[..., Array]

    @classmethod
    def of(cls, model: Any) -> Functions:
        """Those of a model, which are compiled when they are first called."""
        return cls(
            jax.jit(partial(prefill, model), static_argnums=2),
            jax.jit(enter, donate_argnums=0),
            jax.jit(gather),
            jax.jit(shift, donate_argnums=0),
            jax.jit(refit, static_argnums=2),
            jax.jit(partial(read, model), donate_argnums=1),
            jax.jit(next_tokens, static_argnums=5, donate_argnums=1),
            jax.jit(partial(scores, model), static_argnums=2),
        )


class Slots:
    """Rows of a model, at most `count`, that join and leave between steps; the model is not to change meanwhile.

    A row's tokens are those of `generate` with its prompt, options and stream alone. How long it gets is its caller's
    to see to, who takes it out at its end, within the model's context.
    """

    def __init__(self, model: Any, count: int) -> None:
        self.model, self.count = model, count
        self.readings: list[Reading] = []
        self.places: list[Place | None] = []  # of each row of the state
        self.names = counter()
        self.known: tuple[NumPyArray, Any] | None = None  # the prompt that was read last, and its cache
        self.length = 0  # how many columns there are before that of the next key
        self.rooms = rooms(model.config.n_positions)
        model.renew(NO_CALLBACKS, None)
        self.functions: Functions = model.decoders.kept.setdefault("slots", Functions.of(model))
        self.state: Any = None
        self.options: Any = None  # of the rows of the state; None where they are others now
        self.made: Made | None = None  # the step whose tokens are to be given next
        params = model.fitting(None)
        self.device = device_of(params)
        is_quicker = are_worthwhile(model, max(ROWS), model.config.n_positions)
        self.weights = Weights(params, model.decoders.transposed(params) if is_quicker and count > 1 else {})
        self.unused = self._unused()

    @property
    def free(self) -> int:
        """How many more rows may join."""
        return self.count - len(self.readings) - len(self._there())

    def join(self, ids: Sequence[int] | NumPyArray, row: Row) -> int:
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
        self.places = [None if place is not None and place.slot == slot else place for place in self.places]

    def step(self) -> Step:
        """Read what is new, prompts of up to `CHUNK` tokens or one, and a token of each row: the last step's tokens.

        So a row has no token in the first step that it is in.
        """
        self._settle()
        self._read_prompts()
        there, last, self.made = self._there(), self.made, None
        if there:
            self._make_room()
            self.made = Made(there, self._read(likeliest(self._top(there), self.model.config.vocab_size)))
        if last is None:
            return Step([], np.zeros(0, np.int64), np.zeros(0, np.float32), *nothing(0))
        taken = {place.slot for _, place in there}
        rows = [(row, place) for row, place in last.there if place.slot in taken]
        tokens, *others = unpacked(np.asarray(last.found)[[row for row, _ in rows]])
        return Step([place.slot for _, place in rows], tokens, *asked(others, self._top(rows)))

    def score(self, ids: Sequence[int] | NumPyArray, top: int) -> PromptScore:
        """How likely each token of a prompt (T,) but the first is, and the `top` likeliest in its place."""
        given, config = np.asarray(ids), self.model.config
        inputs.check_ids("ids", inputs.Facts.of(given), config.vocab_size)
        inputs.check_context(len(given), 0, config.n_positions)
        prompt = np.zeros((1, min(bucket(len(given)), config.n_positions)), np.int32)
        prompt[0, : len(given)] = given
        found = np.asarray(self.functions.score(self.weights.params, prompt, likeliest(top, config.vocab_size)))
        _, *others = unpacked(found[: max(len(given) - 1, 0)])
        return PromptScore(*asked(others, top))

    def warm(self) -> bool:
        """Compile one function more of those that rows will need; False where there is nothing to do."""
        function, *given = next(self.unused, (None,))
        if function is not None:
            function.lower(*given).compile()
        return function is not None

    def _unused(self) -> Iterator[tuple[Any, ...]]:
        """Each function with what it is called with, of which shapes are enough; what one text needs first."""
        if not are_together(params := self.weights.params):
            return  # of arrays that several devices have, nobody knows the shapes yet
        sizes = sorted({bucket(length) for length in range(1, self.model.config.n_positions)})
        ids = [np.zeros(size, np.int32) for size in sizes]
        counts = [1 << i for i in range((self.count - 1).bit_length() + 1)]
        for count, room in product(counts, self.rooms):
            if count == 1:
                blank(self.model, 1, room, self.rooms[-1], 0)  # of which JAX compiles parts
                fitting = [one for one in ids if self._room(len(one)) == room]
                yield from ((self.functions.prefill, params, prompt_of(one), room) for one in fitting)
            yield from self._unused_by(self._shape(count, room), {2 * count, count // 4} & {*counts})
        top = likeliest(None, self.model.config.vocab_size)
        yield from ((self.functions.score, params, one[None], top) for one in ids)

    def _unused_by(self, state: State, others: Iterable[int]) -> Iterator[tuple[Any, ...]]:
        """Those that are called with a state of this shape, of which so many rows may become others."""
        functions, number, (rows, columns) = self.functions, np.int32(0), state.texts.ids.shape
        text, weights = (np.zeros((1, columns), np.int32), np.zeros((1, columns), bool)), self._weights(rows)
        for room in self.rooms[: self.rooms.index(state.cache.capacity) + 1]:
            yield functions.enter, state, self._shape(1, room).cache.layers, *text, number, number
        yield functions.read, weights, state
        if state.cache.capacity == self.rooms[0]:  # the rules do not see it
            logits = self._placed(jax.eval_shape(functions.read, weights, state)[0])
            given = as_arrays([NOBODY] * rows), np.bool_(False), likeliest(None, self.model.config.vocab_size)
            yield functions.choose, logits, state.texts, state.cache.length, *given
        yield from ((functions.gather, state, np.zeros(count, np.int32)) for count in others)
        yield functions.shift, state, number
        yield from ((functions.refit, state, number, room) for room in self.rooms)

    def _room(self, columns: int) -> int:
        """The least room for so many columns."""
        return next(room for room in self.rooms if room >= columns)

    def _shape(self, rows: int, room: int) -> State:
        """The shapes of so many rows with room for so many columns."""
        shape: State = self._placed(jax.eval_shape(lambda: blank(self.model, rows, room, self.rooms[-1], 0)))
        return shape

    def _placed(self, shapes: Any) -> Any:
        """Shapes of what is on the device of the parameters."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.device), shapes)

    def _top(self, rows: Sequence[tuple[int, Place]]) -> int | None:
        """Of how many of the likeliest tokens any of these rows asks for log-probabilities; None where none does."""
        return max((place.row.top for _, place in rows if place.row.top is not None), default=None)

    def _there(self) -> list[tuple[int, Place]]:
        """The rows in which there is a text, and who it is."""
        return [(row, place) for row, place in enumerate(self.places) if place is not None]

    def _read_prompts(self) -> None:
        """Read prompts of up to `CHUNK` tokens, or one."""
        budget = CHUNK
        while self.readings and (budget == CHUNK or bucket(len(self.readings[0].ids)) <= budget):
            self._put(self.readings[0])
            budget -= bucket(len(self.readings.pop(0).ids))

    def _settle(self) -> None:
        """Have a quarter of the rows where no more are needed."""
        there, waiting = self._there(), len(self.readings)
        if not there:
            self.places, self.state, self.length = [], None, 0
        elif 4 * (len(there) + waiting) <= len(self.places):
            self._have_rows(len(self.places) // 4, [row for row, _ in there])

    def _have_rows(self, count: int, kept: Sequence[int]) -> None:
        """Go on with these rows of the state, and as many that are free as make so many."""
        index = np.resize(np.array(kept, np.int32), count)  # free ones are any
        self.places = [self.places[row] for row in kept] + [None] * (count - len(kept))
        self.state, self.options = self.functions.gather(self.state, index), None

    def _put(self, reading: Reading) -> None:
        """Have a prompt in a row, of which all but the last token is read."""
        there, size = len(self._there()), len(reading.ids)
        prompt = prompt_of(reading.ids).bucketed()
        if self.known is None or not np.array_equal(self.known[0], reading.ids):
            room = self._room(prompt.ids.shape[1])
            self.known = reading.ids, self.functions.prefill(self.weights.params, prompt, room)
        self._make_room(-(-size // COLUMNS) * COLUMNS - 1)
        if there == len(self.places):
            self._have_rows(2 * there, range(there))
        row, start = self.places.index(None), self.length + 1 - size
        ids, mask = np.zeros((1, self.rooms[-1] + 1), np.int32), np.zeros((1, self.rooms[-1] + 1), bool)
        ids[0, start : self.length + 1], mask[0, start : self.length + 1] = reading.ids, True
        self.state = self.functions.enter(self.state, self.known[1], ids, mask, np.int32(row), np.int32(size))
        self.places[row], self.options = Place(reading.slot, reading.row, start), None

    def _make_room(self, before: int = 0) -> None:
        """Have a column for the next keys, after so many others at least: rows move, and there may be more columns."""
        room = 0 if self.state is None else self.state.cache.capacity
        if before <= self.length < room:
            return
        longest = self.length - min((place.start for _, place in self._there()), default=self.length)
        by = (self.length - max(longest, before)) // COLUMNS * COLUMNS
        self.length -= by
        fitting = next(room for room in self.rooms if room - self.length > room // 8 or room == self.rooms[-1])
        if self.state is None:
            self.state, self.places = blank(self.model, 1, fitting, self.rooms[-1], self.length), [None]
            self.state = jax.device_put(self.state, self.device)
        elif fitting == room and by > 0:
            self.state = self.functions.shift(self.state, np.int32(by))
        else:
            self.state = self.functions.refit(self.state, np.int32(by), fitting)
        self.places = [place and place._replace(start=place.start - by) for place in self.places]

    def _read(self, top: int) -> Array:
        """Read the newest tokens and choose the next: see `likelihoods`."""
        longest = max(self.length - place.start for _, place in self._there())
        inputs.check_positions(0, longest, self.model.config.n_positions)
        logits, state = self.functions.read(self._weights(len(self.places)), self.state)
        is_asked = any(place is not None and place.row.top is not None for place in self.places)
        given = logits, state.texts, state.cache.length, self._arranged(), np.bool_(is_asked), top
        found, texts = self.functions.choose(*given)
        self.state = State(state.cache, texts)
        self.length += 1
        return found

    def _weights(self, rows: int) -> Weights:
        """What so many rows are multiplied by."""
        return self.weights if rows in ROWS else self.weights._replace(kernels={})

    def _arranged(self) -> Options:
        """The options of the rows of the state, on the device."""
        if self.options is None:
            self.options = as_arrays([NOBODY if place is None else place.row for place in self.places])
        return self.options


NOBODY = Row(GenerationConfig())


def rooms(n_positions: int) -> list[int]:
    """For how many columns there may be room: a quarter more than the longest row needs, half of that, and so on."""
    sizes = [n_positions + max(n_positions // 4, COLUMNS)]
    while sizes[0] // 2 >= LEAST:
        sizes.insert(0, sizes[0] // 2)
    return [-(-size // COLUMNS) * COLUMNS for size in sizes]


def device_of(params: Any) -> Any:
    """Where parameters were put, if that is one device; None where they are just there, as what is made by itself.

    JAX compiles a function anew for an array that was put somewhere.
    """
    placed = [x for x in jax.tree.leaves(params) if x.committed]
    return placed[0].sharding if placed and are_together(params) else None


def are_together(params: Any) -> bool:
    """Whether parameters are on one device."""
    return all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(params))


def prompt_of(ids: NumPyArray) -> Prompt:
    """A prompt of these ids (T,)."""
    return Prompt(ids[None], np.ones((1, len(ids)), bool), None, None)


def as_arrays(rows: Sequence[Row]) -> Options:
    """The options of rows, on the device."""
    options: Options = jax.device_put(Options.stacked(rows, 1)._replace(stops=None))
    return options


def blank(model: Any, rows: int, room: int, most: int, length: int) -> State:
    """Rows without a text, of which the next key goes into the column `length`."""
    layers = KVCache.empty(model.config, rows, room, model.dtype, model.scan_layers).layers
    ids = jnp.zeros((rows, most + 1), jnp.int32)
    return State(KVCache(layers, None, jnp.int32(length)), Texts(ids, ids > 0, jnp.zeros((rows, 1), jnp.int32)))


def prefill(model: Any, params: Any, prompt: Prompt, room: int) -> Any:
    """The layers of a cache of a prompt's tokens but the last, whose column is the last of so many."""
    layers = decoding.prefill(model, params, prompt, 0, 1)["cache"].layers

    def wider(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(room - x.shape[-2], 0), (0, 0)])

    return jax.tree.map(wider, layers)


def enter(state: State, layers: Any, ids: Array, mask: Array, row: Array, size: Array) -> State:
    """The rows with a new one, ids and mask (1, W + 1), of which `layers` have the keys and values of `size` tokens."""
    end = state.cache.length + 1

    def copied(chunk: Array, into: Any) -> Any:
        back = (chunk + 1) * COLUMNS

        def one(x: Array, new: Array) -> Array:
            piece = lax.dynamic_slice_in_dim(new, new.shape[-2] - back, COLUMNS, new.ndim - 2)
            place = [jnp.int32(0)] * x.ndim
            place[-4], place[-2] = row, end - back
            return lax.dynamic_update_slice(x, piece, place)

        return jax.tree.map(one, into, layers)

    whole = lax.fori_loop(0, -(-size // COLUMNS), copied, state.cache.layers)
    new = Texts(ids, mask, jnp.zeros((1, 1), jnp.int32))
    texts = (lax.dynamic_update_slice(x, own, (row, jnp.int32(0))) for x, own in zip(state.texts, new, strict=True))
    return State(KVCache(whole, None, state.cache.length), Texts(*texts))


def gather(state: State, index: Array) -> State:
    """The state of these rows (N,)."""
    layers = jax.tree.map(lambda x: jnp.take(x, index, axis=x.ndim - 4), state.cache.layers)
    texts = Texts(*(jnp.take(x, index, axis=0) for x in state.texts))
    return State(KVCache(layers, None, state.cache.length), texts)


def shift(state: State, by: Array) -> State:
    """The state with all rows so many columns further left, a multiple of `COLUMNS`, in place."""
    length = state.cache.length

    def moved(chunk: Array, layers: Any) -> Any:
        place = chunk * COLUMNS

        def one(x: Array) -> Array:
            piece = lax.dynamic_slice_in_dim(x, place + by, COLUMNS, x.ndim - 2)
            return lax.dynamic_update_slice_in_dim(x, piece, place, x.ndim - 2)

        return jax.tree.map(one, layers)

    layers = lax.fori_loop(0, -(-(length - by) // COLUMNS), moved, state.cache.layers)
    return turned(state, KVCache(layers, None, length - by), by)


def refit(state: State, by: Array, room: int) -> State:
    """The same with room for so many columns, and also to the right."""

    def moved(x: Array) -> Array:
        more = max(room - x.shape[-2], 0)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])
        return jnp.roll(x, -by, x.ndim - 2)[..., :room, :]

    return turned(state, KVCache(jax.tree.map(moved, state.cache.layers), None, state.cache.length - by), by)


def turned(state: State, cache: KVCache, by: Array) -> State:
    """The state with a cache in which all is so many columns further left."""
    ids, mask, made = state.texts
    return State(cache, Texts(jnp.roll(ids, -by, 1), jnp.roll(mask, -by, 1), made))


def read(model: Any, weights: Weights, state: State) -> tuple[Array, State]:
    """Read the newest tokens: the logits of the next (R, V)."""
    cache, texts, most = *state, model.config.n_positions - 1
    place = texts.mask.sum(-1, dtype=jnp.int32, keepdims=True) - 1
    with multiplied_first(weights.kernels):
        output = forward(
            model,
            lax.dynamic_slice_in_dim(texts.ids, cache.length, 1, axis=1),
            attention_mask=texts.mask[:, : cache.capacity],
            position_ids=jnp.clip(place, 0, most),  # beyond it are rows that nobody has
            params=weights.params,
            past_key_values=cache,
        )
    return upcast(output.logits[:, 0]), State(output.past_key_values, texts)


def next_tokens(
    logits: Array, texts: Texts, length: Array, options: Options, is_asked: Any, count: int
) -> tuple[Array, Texts]:
    """The next tokens by logits (R, V), in the texts of this length, and beside how likely they are: `likelihoods`."""
    ids, mask, made = texts
    chosen = choose(process(logits, ids, mask, length, made, options), made, options)
    texts = Texts(put(ids, chosen, length), put(mask, jnp.ones(len(ids), bool), length), made + 1)
    blank = jnp.zeros((len(ids), 2 + 2 * count), jnp.int32).at[:, 0].set(chosen)
    return lax.cond(is_asked, lambda: likelihoods(logits, chosen, count), lambda: blank), texts


def scores(model: Any, params: Any, ids: Array, count: int) -> Array:
    """How likely each token of a prompt (1, T) but the first is: (T - 1, 2 + 2 K) int32"""
    logits = upcast(forward(model, ids, params=params).logits[0, :-1])
    return likelihoods(logits, ids[0, 1:], count)


def likelihoods(logits: Array, chosen: Array, count: int) -> Array:
    """Tokens (R,), the bits of their log-probabilities, the likeliest ids and theirs: (R, 2 + 2 K) int32"""
    whole = jax.nn.logsumexp(logits, -1, keepdims=True)
    top, ids = lax.top_k(logits, count)
    found = jnp.concatenate([jnp.take_along_axis(logits, chosen[:, None], 1), top], 1) - whole
    bits = lax.bitcast_convert_type(found.astype(jnp.float32), jnp.int32)
    return jnp.concatenate([chosen[:, None], bits[:, :1], ids, bits[:, 1:]], 1)


def likeliest(top: int | None, vocab_size: int) -> int:
    """How many of the likeliest tokens are looked for: a few numbers, as each is compiled."""
    return min(1 << max((top or 0) - 1, TOP - 1).bit_length(), vocab_size)


def unpacked(found: NumPyArray) -> tuple[NumPyArray, NumPyArray, NumPyArray, NumPyArray]:
    """What `likelihoods` gives, (R, 2 + 2 K): tokens, log-probabilities, the likeliest ids and theirs."""
    count, numbers = found.shape[1] // 2 - 1, found.view(np.float32)
    return (
        found[:, 0].astype(np.int64),
        numbers[:, 1],
        found[:, 2 : 2 + count].astype(np.int64),
        numbers[:, 2 + count :],
    )


def asked(found: Sequence[NumPyArray], top: int | None) -> tuple[NumPyArray, ...]:
    """What is asked for of log-probabilities (R,), and of the likeliest ids and theirs (R, K)."""
    log_probs, ids, of_top = found
    if top is None:
        return np.full(len(log_probs), np.nan, np.float32), *nothing(len(log_probs))
    return log_probs, ids[:, :top], of_top[:, :top]


def nothing(rows: int) -> tuple[NumPyArray, NumPyArray]:
    """No likeliest ids, (R, 0), and no log-probabilities of them."""
    return np.zeros((rows, 0), np.int64), np.zeros((rows, 0), np.float32)
