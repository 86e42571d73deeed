"""Texts that come and go in PyTorch: rows of one batch, each with its prompt, options and noise, and a token a step.

All rows end in the same column, and begin where their length says; a mask hides what is before that. So a step writes
one column, and a row joins wherever it has room. A prompt is read alone, but for its last token, which the next step
reads with the newest of the others: every row goes on from a token, and its keys and values are copied once.

R rows, T prompt length, C columns with room, N those that are filled, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as counter
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor

from gpt2_multi.generation.options import Options, PromptScore, Row, Step
from gpt2_multi.pt.attention import KVCache, causal_bias, key_bias, upcast
from gpt2_multi.pt.generation.cpu_kernels import Kernels, is_own
from gpt2_multi.pt.generation.packing import borrow
from gpt2_multi.pt.generation.rules import as_tensors, choose, process
from gpt2_multi.pt.layers import to_numpy

Array = np.ndarray[Any, Any]
CHUNK = 128  # tokens of prompts that are read between two steps, so that the others wait for no long one
SHARE = 2**25  # bytes of weights that a core has to read to be worth it
LEAST = 64  # columns that there is room for


@dataclass(eq=False)
class Reading:
    """A prompt, of which the cache has what was read; all of it are all tokens but the last."""

    slot: int
    row: Row
    ids: Array  # (T,)
    cache: KVCache | None = None


@dataclass(eq=False)
class Place:
    """A row of the batch: in which column it begins, and at which step it came."""

    slot: int
    row: Row
    start: int
    came: int


class Group(NamedTuple):
    """Rows whose tokens are chosen at once: which, None where all are, and their options."""

    rows: Tensor | None
    options: Options


@dataclass(frozen=True, eq=False)
class Reader:
    """What reads tokens into a cache: the model, or where nobody would see that, quicker calls."""

    model: Any
    kernels: Kernels | None

    @classmethod
    def of(cls, model: Any, rows: int) -> Self:
        """That of a model, for so many rows."""
        return cls(model, Kernels.of(model, borrow(model, rows, model.config.n_positions)) if is_own(model) else None)

    def read(self, tokens: Tensor, cache: KVCache) -> None:
        """Read a part of a prompt, (1, T)."""
        if self.kernels is None:
            self.model.transformer(tokens, past_key_values=cache, return_dict=True)
            cache.length += tokens.shape[1]
            return
        body, past, end = self.model.transformer, cache.length, cache.length + tokens.shape[1]
        x = body.embed(tokens, torch.arange(past, end)[None])
        self.kernels.store(x, cache, causal_bias(end - past, end, None, x.dtype, x.device))

    def next(self, tokens: Tensor, places: Tensor, cache: KVCache, keep: Tensor | None, bias: Tensor | None) -> Tensor:
        """Read the newest token of each row, (R, 1), at its place: the logits of the next (R, V)

        keep: (R, N + 1), which keys count, and bias (R, 1, 1, N + 1), that of the scores; None where all do.
        """
        if self.kernels is not None:
            return self.kernels.step(tokens, places, cache, bias)
        logits = self.model(tokens, past_key_values=cache, attention_mask=keep, return_dict=True).logits[:, -1]
        cache.length += 1
        return logits


class Slots:
    """Rows of a model, at most `count`, that join and leave between steps; the model is not to change meanwhile.

    A row's tokens are those of `generate` with its prompt, options and stream alone. How long it gets is up to its
    caller, who takes it out at its end, within the model's context.
    """

    def __init__(self, model: Any, count: int) -> None:
        self.model, self.count = model.eval(), count
        self.readings: list[Reading] = []
        self.places: list[Place] = []
        self.gone: set[int] = set()  # slots of places that somebody else may have
        self.names, self.steps = counter(), 0
        self.known: Reading | None = None  # the prompt that was read last
        self.length = 0  # how many columns there are before that of the next key
        self.most = model.config.n_positions + model.config.n_positions // 2  # columns
        self.room = KVCache([(k[:0], v[:0]) for k, v in model.init_cache(1, 1).layers])
        self.ids = torch.zeros(0, 2, dtype=torch.long, device=model.device)  # (R, C + 1), the next token to read too
        self.reader: Reader | None = None
        self._arrange()

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
        self.readings.append(Reading(next(self.names), row, prompt.astype(np.int64)))
        return self.readings[-1].slot

    def leave(self, slot: int) -> None:
        """Have a row gone, in whatever state it is."""
        self.readings = [reading for reading in self.readings if reading.slot != slot]
        self.gone |= {slot} & {place.slot for place in self.places}

    @torch.no_grad()
    def step(self) -> Step:
        """Read what is new, up to `CHUNK` tokens of prompts and one of each row that is there: its next token."""
        if not (self.readings or self.places):
            self.reader = None
        elif self.reader is None:
            self.reader = Reader.of(self.model, self.count)
        ready = self._read_prompts()
        if ready or self.gone:
            self._settle(ready)
        if self.places and self.cache.length == self.cache.capacity:
            self._make_room()
        if not self.places:
            return Step([], np.zeros(0, np.int64), np.zeros(0, np.float32), *nothing(0))
        logits = upcast(self._read())
        chosen = self._choose(logits)
        self.tokens[:, self.cache.length] = chosen
        self.made += 1
        self.steps, self.length = self.steps + 1, self.length + 1
        tops = [place.row.top for place in self.places if place.row.top is not None]
        return Step([place.slot for place in self.places], to_numpy(chosen), *likelihoods(logits, chosen, tops))

    @torch.no_grad()
    def score(self, ids: Sequence[int] | Array, top: int) -> PromptScore:
        """How likely each token of a prompt (T,) but the first is, and the `top` likeliest in its place."""
        given = torch.as_tensor(np.asarray(ids, np.int64), device=self.model.device)
        parts, cache = [], self.model.init_cache(1, len(given))
        for start in range(0, len(given) - 1, CHUNK):
            chunk = given[start : min(start + CHUNK, len(given) - 1)]
            logits = self.model(chunk[None], past_key_values=cache, return_dict=True).logits[0]
            parts.append(likelihoods(upcast(logits), given[start + 1 : start + 1 + len(chunk)], [top]))
        if not parts:
            return PromptScore(*likelihoods(torch.zeros(0, self.model.config.vocab_size), given[1:], [top]))
        return PromptScore(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def _read_prompts(self) -> list[Reading]:
        """Read up to `CHUNK` tokens of prompts: those that are read through."""
        budget, ready = CHUNK, []
        while self.readings and budget > 0:
            reading = self.readings[0]
            reading.cache = cache = self._begun(reading.ids) if reading.cache is None else reading.cache
            chunk = reading.ids[cache.length : min(cache.length + budget, len(reading.ids) - 1)]
            if len(chunk):
                cast(Reader, self.reader).read(torch.from_numpy(chunk[None]).to(self.model.device), cache)
            budget -= len(chunk)
            if cache.length == len(reading.ids) - 1:
                self.known = reading
                ready.append(self.readings.pop(0))
        return ready

    def _begun(self, ids: Array) -> KVCache:
        """A cache for a prompt, with what it begins with like the last one that was read."""
        cache = self._empty(1, len(ids) - 1)
        if self.known is not None:
            cache.length = shared(self.known.ids[:-1], ids[:-1])
            for pair, known in zip(cache.layers, cast(KVCache, self.known.cache).layers, strict=True):
                for own, other in zip(pair, known, strict=True):
                    own[:, :, : cache.length] = other[:, :, : cache.length]
        return cache

    def _settle(self, ready: list[Reading]) -> None:
        """Have new rows where others were, or after all; the last rows move to where still nobody is."""
        holes = [row for row, place in enumerate(self.places) if place.slot in self.gone]
        self.gone.clear()
        if len(holes) == len(self.places):
            self.places, self.length, holes = [], 0, []
        for reading in ready:
            self._put(holes.pop(0) if holes else len(self.places), reading)
        for hole in reversed(holes):
            last = self.places.pop()
            if hole < len(self.places):
                self.places[hole] = last
                for x in self._tensors():
                    x[hole] = x[len(self.places)]
        self._arrange()

    def _put(self, row: int, reading: Reading) -> None:
        """Have a prompt that was read in a row, with its last token to be read next."""
        cache = cast(KVCache, reading.cache)
        self._reserve(row + 1, max(self.length, cache.length))
        if cache.length > self.length:
            self._shift(cache.length - self.length)
        start = self.length - cache.length
        for pair, read in zip(self.room.layers, cache, strict=True):
            for own, new in zip(pair, read, strict=True):
                own[row, :, start : self.length] = new[0]
        self.ids[row, start : self.length + 1] = torch.from_numpy(reading.ids)
        self.places[row : row + 1] = [Place(reading.slot, reading.row, start, self.steps)]

    def _tensors(self) -> list[Tensor]:
        """All that has rows: keys and values (R, H, C, D), and ids (R, C + 1)."""
        return [self.ids, *(x for pair in self.room.layers for x in pair)]

    def _reserve(self, rows: int, columns: int) -> None:
        """Have room for so much, at least twice as much as there was, so that it is seldom moved."""
        have, room = self.ids.shape[0], self.ids.shape[1] - 1
        if rows <= have and columns <= room:
            return
        rows = max(have, min(1 << (rows - 1).bit_length(), self.count))
        columns = max(room, min(1 << (max(columns, LEAST) - 1).bit_length(), self.most))
        old, self.room = self._tensors(), self._empty(rows, columns)
        self.ids = self.ids.new_zeros(rows, columns + 1)
        for x, had in zip(self._tensors(), old, strict=True):
            x[tuple(slice(size) for size in had.shape)] = had

    def _empty(self, rows: int, columns: int) -> KVCache:
        """A cache that the model can read into."""
        keys = [k for k, _ in self.room.layers]
        shapes = [(rows, k.shape[1], columns, k.shape[3]) for k in keys]
        cache = KVCache.empty(shapes, keys[0].dtype, [k.device for k in keys])
        cache.trusted = True
        return cache

    def _shift(self, by: int) -> None:
        """Move all rows to later columns, or to earlier ones."""
        rows, first, end = len(self.places), min((place.start for place in self.places), default=0), self.length
        for x in self._tensors() if rows else ():
            moved = x[:rows].movedim(-1 if x.dim() == 2 else 2, 0)  # (C, ...)
            size = end + (x.dim() == 2)
            moved[first + by : size + by] = moved[first:size].clone()
        for place in self.places:
            place.start += by
        self.length += by

    def _make_room(self) -> None:
        """Have a column for the next keys: by more of them while most are in use, or by moving all to the left."""
        if 2 * self.cache.length > self.ids.shape[1] and self.ids.shape[1] <= self.most:
            self._reserve(len(self.places), self.length + 1)
        else:
            self._shift(-min(place.start for place in self.places))
        self._arrange()

    def _arrange(self) -> None:
        """What steps use until rows come or go: views of what is in use, and the rows' options."""
        starts = [place.start for place in self.places]
        rows, first, device = len(starts), min(starts, default=0), self.ids.device
        layers = [(k[:rows, :, first:], v[:rows, :, first:]) for k, v in self.room.layers]
        self.cache = KVCache(layers, self.length - first, preallocated=True, trusted=True)
        self.tokens = self.ids[:rows, first:]  # (R, N + 1)
        columns = torch.arange(first, self.ids.shape[1] - 1, device=device)
        self.keep = columns >= torch.tensor(starts, dtype=torch.long, device=device)[:, None]  # (R, N)
        is_even = all(start == first for start in starts)
        self.bias = None if is_even else key_bias(self.keep, self.model.dtype)
        self.ends = torch.tensor([[self.length - start] for start in starts], device=device)  # (R, 1), the next places
        self.made = torch.tensor([[self.steps - place.came] for place in self.places], device=device)  # (R, 1)
        self.groups = list(self._grouped())

    def _grouped(self) -> Iterator[Group]:
        """Those who choose among few tokens, and those who choose among all."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        configs = [place.row.config for place in self.places]
        wide = [one.do_sample and not (one.top_k or one.top_p < 1 or one.min_p) for one in configs]
        for kind in sorted(set(wide)):
            chosen = [row for row, is_wide in enumerate(wide) if is_wide == kind]
            options = Options.stacked([self.places[row].row for row in chosen], self.model.config.vocab_size)
            rows = None if len(chosen) == len(wide) else torch.tensor(chosen, device=self.ids.device)
            yield Group(rows, as_tensors(options, self.ids.device, dtype))

    def _read(self) -> Tensor:
        """Read the newest tokens: the logits of the next (R, V)."""
        cache, end = self.cache, self.cache.length + 1
        keep, bias = (None, None) if self.bias is None else (self.keep[:, :end], self.bias[..., :end])
        logits = cast(Reader, self.reader).next(self.tokens[:, end - 1 : end], self.ends, cache, keep, bias)
        self.ends += 1
        return logits

    def _choose(self, logits: Tensor) -> Tensor:
        """The next tokens (R,), by logits (R, V)."""
        given = logits, self.tokens[:, : self.cache.length], self.keep[:, : self.cache.length], self.made
        if len(self.groups) == 1:
            return chosen_by(self.groups[0].options, *given)
        chosen = self.ids.new_empty(len(logits))
        for rows, options in self.groups:
            chosen[rows] = chosen_by(options, *(x[rows] for x in given))
        return chosen


def chosen_by(options: Options, logits: Tensor, ids: Tensor, keep: Tensor, made: Tensor) -> Tensor:
    """The next tokens (R,) of rows with these options."""
    return choose(process(logits, ids, keep, made, options), made, options)


@contextmanager
def worthwhile_threads(model: Any) -> Iterator[None]:
    """Within it this thread uses no more cores than its model is worth: those of a small step wait for each other.

    With other programs beside it a step of the demo model on two cores takes ten times as long as on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, sum(x.nbytes for x in model.parameters()) // SHARE)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shared(a: Array, b: Array) -> int:
    """With how many equal ids two prompts begin."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def likelihoods(logits: Tensor, chosen: Tensor, tops: Sequence[int]) -> tuple[Array, Array, Array]:
    """The log-probabilities (R,) of tokens, and the likeliest ids (R, K) with theirs, where anybody asks for them."""
    if not tops:
        return np.full(len(chosen), np.nan, np.float32), *nothing(len(chosen))
    log_probs = logits.log_softmax(-1)
    top, ids = log_probs.topk(min(max(tops), logits.shape[-1]))
    found = log_probs.gather(-1, chosen[:, None]).squeeze(-1)
    return to_numpy(found.float()), to_numpy(ids), to_numpy(top.float())


def nothing(rows: int) -> tuple[Array, Array]:
    """No likeliest ids, (R, 0), and no log-probabilities of them."""
    return np.zeros((rows, 0), np.int64), np.zeros((rows, 0), np.float32)
