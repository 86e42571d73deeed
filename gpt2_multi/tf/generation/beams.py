"""Beam search and beam sampling in TensorFlow, as transformers 4.57 has them: a strategy of the loop.

B prompts, K beams of each, C candidates of each, V vocabulary, N new tokens (room).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import NO_CALLBACKS
from gpt2_multi.tf.attention import KVCache, Pair, flat, of_rows, upcast
from gpt2_multi.tf.generation.decoding import (
    Prompt,
    Proposed,
    Records,
    Sampling,
    State,
    guided,
    own_ends,
    own_rules,
    put,
    record,
    written,
)
from gpt2_multi.tf.generation.rules import ends, gumbel, process, without
from gpt2_multi.tf.layers import sizes

COLUMNS = 8  # of a cache, which move at once


class Paths(NamedTuple):
    """How texts came about, token by token; X is K or C."""

    tokens: tf.Tensor  # (B, X, N) int32, filling after the last
    log_probs: tf.Tensor  # (B, X, N), of each token; 0 after the last
    beams: tf.Tensor  # (B, X, N) int32, the row that each token was chosen in, among all B * K; -1 after the last

    def gather(self, index: tf.Tensor) -> Paths:
        """Some of the paths: index (B, X)"""
        return Paths(*(tf.gather(x, index, axis=1, batch_dims=1) for x in self))

    def concat(self, others: Paths) -> Paths:
        """These, and others after them."""
        return Paths(*(tf.concat(pair, 1) for pair in zip(self, others, strict=True)))


class Hypotheses(NamedTuple):
    """Finished texts, the best first; where there is none yet, the score is -inf."""

    scores: tf.Tensor  # (B, K)
    paths: Paths

    def best(self, several: int, fill: int) -> Paths:
        """The paths of so many texts of each prompt, (B * several, N); nothing but filling where there is none."""
        none = tf.reshape(self.scores[:, :several], (-1, 1)) == -float("inf")
        paths = (tf.reshape(x[:, :several], (-1, sizes(x)[-1])) for x in self.paths)
        empty = (tf.constant(value, x.dtype) for value, x in zip((fill, 0, -1), self.paths, strict=True))
        return Paths(*(tf.where(none, value, x) for value, x in zip(empty, paths, strict=True)))


class BeamState(NamedTuple):
    """What the loop carries from one token to the next; the rows are the beams of all prompts."""

    step: tf.Tensor  # () int32, how many tokens were made
    length: tf.Tensor  # () int32, how many of the ids are there
    ids: tf.Tensor  # (B * K, S) int32, the prompts and what was made
    mask: tf.Tensor  # (B * K, S) bool, which of them count
    stop: tf.Tensor  # (B * K,) int32, of the stop strings
    records: Records
    number: tf.Tensor  # (B * K,) int32, which of the prompts each row continues
    unseen: tf.Tensor  # (B * K,) int32, how many columns at the left are no part of the caller's text
    cache: KVCache
    keep: tf.Tensor  # (B * K, the cache's capacity) bool, which of its keys count; of guided rows twice as many
    scores: tf.Tensor  # (B, K), of the running beams, the best first
    running: Paths
    found: Hypotheses
    is_open: tf.Tensor  # (B,) bool, whether better texts may yet be found


class BeamSearch(NamedTuple):
    """The likeliest texts, or a sample of them."""

    room: Any  # for how many tokens
    rows: int  # of each prompt, its beams
    records: tuple[str, ...]  # what is kept of each step
    is_guided: bool = False  # whether there are rows that these are led away from
    callbacks: Callbacks = NO_CALLBACKS
    guesses: int = 0  # none

    def start(self, model: keras.Model, prompt: Prompt, options: Options) -> BeamState:
        """The state in which nothing is made; of a prompt's beams, which are all the same, one counts."""
        given = Sampling(*self).start(model, prompt, options)
        own = {name: getattr(given, name) for name in BeamState._fields if name in State._fields}
        batch, kind = sizes(given.ids)[0] // self.rows, upcast(tf.zeros((), model.compute_dtype)).dtype
        none, shape = tf.fill((batch, self.rows), tf.constant(-float("inf"), kind)), (batch, self.rows, self.room)
        running = Paths(tf.fill(shape, options.fill), tf.zeros(shape, kind), tf.fill(shape, -1))
        scores = put(none, tf.zeros(batch, kind), tf.constant(0))
        found = Hypotheses(none, running)
        return BeamState(scores=scores, running=running, found=found, is_open=none[:, 0] < 0, **own)

    def is_open(self, state: BeamState) -> tf.Tensor:
        """Whether anything is to follow."""
        return tf.reduce_any(state.is_open)

    def finish(self, state: BeamState, options: Options) -> BeamState:
        """The state in which the running beams are texts that were found, as there is no time for more."""
        reached = without(state.scores / power(state.step, options, state.scores.dtype), ~state.is_open[:, None])
        found = add_finished(state.found, state.running, reached)
        return state._replace(found=found, is_open=tf.zeros_like(state.is_open))

    def propose(self, state: BeamState, options: Options) -> tuple[BeamState, Proposed | None]:
        """What is read together with the last token, as it may follow: nothing."""
        return state, None

    def update(
        self, state: BeamState, logits: tf.Tensor, proposed: Proposed | None, new: tf.Tensor, options: Options
    ) -> BeamState:
        """Go on by one token, from the logits (B * K, 1, V) of the next."""
        (logits, led), made = guided(logits[:, 0], options, self.is_guided), state.step + 1
        log_probs, own = led if self.is_guided else tf.nn.log_softmax(led), own_rules(self, state)
        processed = process(log_probs, state.ids, written(state), state.length, state.step, options, own).logits
        values, beam, token = candidates(processed, state, options)  # (B, C)
        stop = tf.gather(tf.reshape(state.stop, tf.shape(state.scores)), beam, batch_dims=1)
        ended, stop = ends(token, stop, options)
        ended |= made == new
        if self.callbacks.criteria:
            ended |= self.ends(state, processed, beam, token)
        first, reached = slice(0, self.rows), values / power(made, options, values.dtype)
        paths = extend(state.running, processed, beam[:, first], token[:, first], state.step)
        reached = without(reached, ~(ended & state.is_open[:, None]))[:, first]
        found = add_finished(state.found, paths, reached)
        scores, best = tf.math.top_k(without(values, ended), self.rows)  # (B, K)
        beam, token, stop = (tf.gather(x, best, batch_dims=1) for x in (beam, token, stop))
        state = state._replace(
            records=record(state, logits, processed),
            stop=tf.reshape(stop, [-1]),
            scores=scores,
            running=extend(state.running, processed, beam, token, state.step),
            found=found,
            is_open=state.is_open & can_improve(scores[:, 0], found, made, new, options),
        )
        return reorder(state, beam, token, self.is_guided)

    def ends(self, state: BeamState, processed: tf.Tensor, beam: tf.Tensor, token: tf.Tensor) -> tf.Tensor:
        """Which candidates are over by the caller's criteria: beam, token (B, C) -> (B, C)"""
        rows = tf.reshape(beam + self.rows * tf.range(sizes(beam)[0])[:, None], [-1])  # (B * C,)
        ids = put(tf.gather(state.ids, rows), tf.reshape(token, [-1]), state.length)
        after = state._replace(length=state.length + 1)
        return tf.reshape(own_ends(self.callbacks, ids, tf.gather(processed, rows), after), tf.shape(beam))


def candidates(processed: tf.Tensor, state: BeamState, options: Options) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The likeliest continuations of all beams, or samples without replacement (Kool et al. 2019), best first: (B, C)

    processed: (B * K, V). Returns the scores, the beams that they continue, and the tokens. C is for as many end tokens
    as `options.ends` has room for; those beyond `options.candidates` are ruled out.
    """
    (batch, beams), vocab = sizes(state.scores), sizes(processed)[-1]
    values = tf.reshape(processed + tf.reshape(state.scores, (-1, 1)), (batch, beams * vocab))

    def noisy() -> tf.Tensor:
        noise = gumbel(options.streams, state.step, tf.range(vocab), values.dtype)
        return values + tf.reshape(noise, tf.shape(values))

    rank = tf.cond(options.do_sample, noisy, lambda: values)
    count = tf.minimum((1 + sizes(options.ends)[0]) * beams, beams * vocab)
    _, index = tf.math.top_k(rank, count)  # the first of equals
    values = tf.gather(values, index, batch_dims=1)
    values = without(values, tf.range(sizes(index)[1]) >= options.candidates)
    index = tf.where(values == -float("inf"), 0, index)  # there are fewer
    return values, index // vocab, index % vocab


def extend(running: Paths, processed: tf.Tensor, beam: tf.Tensor, token: tf.Tensor, step: tf.Tensor) -> Paths:
    """The paths of candidates: beam, token (B, X) -> (B, X, N)"""
    batch, beams, _ = sizes(running.tokens)
    row = beam + beams * tf.range(batch)[:, None]
    log_probs = tf.gather_nd(processed, tf.stack([row, token], -1))
    return Paths(*(put(*pair, step) for pair in zip(running.gather(beam), (token, log_probs, row), strict=True)))


def add_finished(found: Hypotheses, paths: Paths, scores: tf.Tensor) -> Hypotheses:
    """The best of what was found and of candidates: scores (B, K), -inf where one is not finished."""
    best, index = tf.math.top_k(tf.concat([found.scores, scores], 1), sizes(found.scores)[1])
    return Hypotheses(best, found.paths.concat(paths).gather(index))


def can_improve(score: tf.Tensor, found: Hypotheses, made: tf.Tensor, new: tf.Tensor, options: Options) -> tf.Tensor:
    """Whether the best running beam of each prompt may yet be better than the worst text that was found: (B,)"""
    worst, none = found.scores[:, -1], -float("inf")
    hopeful = (options.early_stopping == 2) & (options.length_penalty > 0)
    attainable = score / power(tf.where(hopeful, new, made), options, score.dtype)
    return tf.where(options.early_stopping == 1, (worst == none) & (score > none), attainable > worst)


def power(length: tf.Tensor, options: Options, dtype: tf.DType) -> tf.Tensor:
    """By what the score of a text of this length is divided, ()"""
    return tf.cast(tf.cast(length, tf.float64) ** options.length_penalty, dtype)


def reorder(state: BeamState, beam: tf.Tensor, token: tf.Tensor, is_guided: bool) -> BeamState:
    """Go on with the rows of these beams (B, K), each with its token; of the cache only what came after the prompt."""
    batch, beams, room = sizes(state.running.tokens)
    prompt = sizes(state.keep)[1] - room  # which the beams of a text share
    rows = tf.reshape(beam + beams * tf.range(batch)[:, None], [-1])  # (B * K,)
    moving = tf.concat([rows, rows + batch * beams], 0) if is_guided else rows

    def moved(buffer: tf.Tensor) -> tf.Tensor:
        return tf.concat([buffer[:, :, :prompt], tf.gather(buffer[:, :, prompt:], moving)], 2)

    if state.cache.is_flat:
        layers = moved_in_place(state.cache, moving, prompt, room)
    else:
        layers = tuple((moved(key), moved(value)) for key, value in state.cache.layers)
    ids = put(tf.gather(state.ids, rows), tf.reshape(token, [-1]), state.length)
    cache = KVCache(layers, state.cache.cross, state.cache.filled)
    return state._replace(step=state.step + 1, length=state.length + 1, ids=ids, cache=cache)


def moved_in_place(cache: KVCache, rows: tf.Tensor, first: int, room: int) -> tuple[Pair, ...]:
    """The layers of a flat cache with these rows (R,) of the columns from `first` on, as far as they are filled.

    A few columns at a time: they stay in the processor's caches between being read and being written.
    """
    width = math.gcd(room, COLUMNS)

    def move(buffer: tf.Tensor, at: tf.Tensor) -> tf.Tensor:
        every, _, size = sizes(buffer)
        piece = of_rows(tf.slice(buffer, (0, at, 0), (every, width, size)), sizes(rows)[0])
        return keras.ops.slice_update(buffer, (0, at, 0), flat(tf.gather(piece, rows)))

    def once(at: tf.Tensor, layers: tuple[Pair, ...]) -> tuple[Any, ...]:
        return at + width, tuple((move(key, at), move(value, at)) for key, value in layers)

    return tf.while_loop(lambda at, _: at < cache.filled, once, (tf.constant(first), cache.layers))[1]
