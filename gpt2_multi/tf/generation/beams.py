"""Beam search and beam sampling in TensorFlow, as transformers 4.57 has them, in one loop.

B prompts, K beams of each, C candidates of each, V vocabulary, N new tokens (room).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from gpt2_multi.tf.attention import KVCache, sizes, widened
from gpt2_multi.tf.generation.decoding import Prompt, Records, begin, blank, follow, noted, put, written
from gpt2_multi.tf.generation.rules import Options, gumbel, over, process, without

if TYPE_CHECKING:
    from gpt2_multi.tf.heads import TFGPT2LMHeadModel


class Paths(NamedTuple):
    """How texts came about, token by token; X is K or C."""

    tokens: tf.Tensor  # (B, X, N) int32, filling after the last
    log_probs: tf.Tensor  # (B, X, N), of each token; 0 after the last
    beams: tf.Tensor  # (B, X, N) int32, the row that each token was chosen in, among all B * K; -1 after the last

    def taken(self, index: tf.Tensor) -> Paths:
        """Some of the paths: index (B, X)"""
        return Paths(*(tf.gather(x, index, axis=1, batch_dims=1) for x in self))

    def joined(self, others: Paths) -> Paths:
        """These, and others after them."""
        return Paths(*(tf.concat(pair, 1) for pair in zip(self, others, strict=True)))


class Found(NamedTuple):
    """Finished texts, the best first; where there is none yet, the score is -inf."""

    scores: tf.Tensor  # (B, K)
    paths: Paths

    def best(self, several: int, fill: int) -> Paths:
        """The paths of so many texts of each prompt, (B * several, N); nothing but filling where there is none."""
        none = tf.reshape(self.scores[:, :several], (-1, 1)) == -float("inf")
        paths = (tf.reshape(x[:, :several], (-1, sizes(x)[-1])) for x in self.paths)
        empty = (tf.constant(value, x.dtype) for value, x in zip((fill, 0, -1), self.paths, strict=True))
        return Paths(*(tf.where(none, value, x) for value, x in zip(empty, paths, strict=True)))


class Candidates(NamedTuple):
    """Continuations of all beams by one token, best first."""

    scores: tf.Tensor  # (B, C)
    beam: tf.Tensor  # (B, C) int32, the beam of its prompt that each one continues
    token: tf.Tensor  # (B, C) int32

    def first(self, count: int) -> Candidates:
        """So many of them."""
        return Candidates(*(x[:, :count] for x in self))


class State(NamedTuple):
    """What the loop carries from one token to the next."""

    step: tf.Tensor  # () int32, how many tokens were made
    ids: tf.Tensor  # (B * K, S) int32, the prompts and what was made
    stop: tf.Tensor  # (B * K,) int32, of the stop strings
    scores: tf.Tensor  # (B, K), of the running beams
    running: Paths
    found: Found
    is_open: tf.Tensor  # (B,) bool, whether better texts may yet be found
    records: Records
    cache: KVCache


def search(
    model: TFGPT2LMHeadModel,
    prompt: Prompt,
    room: Any,
    until: tf.Tensor,
    options: Options,
    beams: int,
    wanted: tuple[str, ...],
) -> tuple[Found, tf.Tensor, Records]:
    """The texts that are found, how many steps that took, and what was recorded of each."""
    cache, prompt = begin(model, prompt, room, beams), prompt.repeated(beams)
    length = sizes(prompt.ids)[1]

    def going(state: State) -> tf.Tensor:
        return (state.step < until) & tf.reduce_any(state.is_open)

    def once(state: State) -> tuple[State]:
        logits, cache = follow(model, prompt, state.cache, tf.gather(state.ids, [length + state.step - 1], axis=1))
        keep = written(prompt.mask, state.ids, state.step)
        log_probs = tf.nn.log_softmax(widened(logits))
        processed = process(log_probs, state.ids, keep, length + state.step, state.step, options)
        records = noted(state.records, state.step, {"logits": logits, "scores": processed})
        return (chosen(state._replace(cache=cache, records=records), processed, length, until, options),)

    state = tf.while_loop(going, once, (start(model, prompt, room, options, beams, wanted, cache),))[0]
    return state.found, state.step, state.records


def start(
    model: TFGPT2LMHeadModel,
    prompt: Prompt,
    room: Any,
    options: Options,
    beams: int,
    wanted: tuple[str, ...],
    cache: KVCache,
) -> State:
    """The state in which nothing is made, and the beams of a prompt are the same; prompt: (B * K, T)"""
    rows = sizes(prompt.ids)[0]
    batch, kind = rows // beams, widened(tf.zeros((), model.compute_dtype)).dtype
    none = tf.fill((batch, beams), tf.constant(-float("inf"), kind))
    scores, shape = put(none, tf.zeros(batch, kind), tf.constant(0)), (batch, beams, room)
    running = Paths(tf.fill(shape, options.fill), tf.zeros(shape, kind), tf.fill(shape, -1))
    ids, is_open = tf.pad(prompt.ids, [(0, 0), (0, room)]), tf.ones(batch, tf.bool)
    records = blank(model, rows, room, [name for name in wanted if name != "log_probs"])
    stop = tf.zeros(rows, tf.int32)
    return State(tf.constant(0), ids, stop, scores, running, Found(none, running), is_open, records, cache)


def chosen(state: State, processed: tf.Tensor, length: Any, until: tf.Tensor, options: Options) -> State:
    """The state with one more token in each beam; processed: (B * K, V), length: of the prompts."""
    batch, beams = sizes(state.scores)
    made = state.step + 1
    drawn = candidates(processed, state, options)
    stop = tf.gather(tf.reshape(state.stop, (batch, beams)), drawn.beam, axis=1, batch_dims=1)
    ended, _ = over(drawn.token, stop, options)  # (B, C)
    ended |= made == until
    finished = (ended & state.is_open[:, None])[:, :beams]
    first = drawn.first(beams)
    paths = extended(state.running, processed, first, state.step)
    found = updated(state.found, paths, first.scores / powered(made, options, processed.dtype), finished)
    scores, best = tf.math.top_k(without(drawn.scores, ended), beams)  # (B, K)
    going = Candidates(*(tf.gather(x, best, axis=1, batch_dims=1) for x in drawn))
    running = extended(state.running, processed, going, state.step)
    is_open = state.is_open & can_improve(options, scores[:, 0], found, made, until)
    state = state._replace(step=made, scores=scores, running=running, found=found, is_open=is_open)
    return followed(state, going, length, options)


def candidates(processed: tf.Tensor, state: State, options: Options) -> Candidates:
    """The likeliest continuations of all beams, or samples without replacement (Kool et al. 2019).

    processed: (B * K, V). C is for as many end tokens as `options.ends` has room for; those beyond
    `options.candidates` are ruled out.
    """
    (batch, beams), vocab = sizes(state.scores), sizes(processed)[-1]
    values = tf.reshape(processed + tf.reshape(state.scores, (-1, 1)), (batch, beams * vocab))
    rank = tf.cond(options.do_sample, lambda: noisy(values, processed, state.step, options), lambda: values)
    count = tf.minimum((1 + sizes(options.ends)[0]) * beams, beams * vocab)
    _, index = tf.math.top_k(rank, count)  # the first of equals
    values = tf.gather(values, index, axis=1, batch_dims=1)
    values = without(values, tf.range(sizes(index)[1]) >= options.candidates)
    index = tf.where(values == -float("inf"), 0, index)  # there are fewer
    return Candidates(values, index // vocab, index % vocab)


def noisy(values: tf.Tensor, processed: tf.Tensor, step: tf.Tensor, options: Options) -> tf.Tensor:
    """The scores (B, K * V) with the noise of their rows (B * K, V)."""
    noise = gumbel(options.streams, step, tf.range(sizes(processed)[-1]), values.dtype)
    return values + tf.reshape(noise, tf.shape(values))


def extended(running: Paths, processed: tf.Tensor, new: Candidates, step: tf.Tensor) -> Paths:
    """The paths (B, X, N) of candidates (B, X)."""
    batch, beams = sizes(running.tokens)[:2]
    row = new.beam + beams * tf.range(batch)[:, None]
    log_probs = tf.gather_nd(processed, tf.stack([row, new.token], -1))
    steps = zip(running.taken(new.beam), (new.token, log_probs, row), strict=True)
    return Paths(*(put(path, value, step) for path, value in steps))


def updated(found: Found, paths: Paths, scores: tf.Tensor, finished: tf.Tensor) -> Found:
    """The best of what was found and of candidates, where they are finished: scores, finished (B, K)"""
    scores = tf.concat([found.scores, without(scores, ~finished)], 1)
    best, index = tf.math.top_k(scores, sizes(found.scores)[1])
    return Found(best, found.paths.joined(paths).taken(index))


def powered(length: tf.Tensor, options: Options, dtype: tf.DType) -> tf.Tensor:
    """By what the score of a text of this length is divided, ()"""
    return tf.cast(tf.cast(length, tf.float64) ** options.length_penalty, dtype)


def can_improve(options: Options, score: tf.Tensor, found: Found, made: tf.Tensor, until: tf.Tensor) -> tf.Tensor:
    """Whether the best running beam of each prompt may yet be better than the worst text that was found: (B,)"""
    worst, none = found.scores[:, -1], -float("inf")
    hopeful = (options.early_stopping == 2) & (options.length_penalty > 0)
    attainable = score / powered(tf.where(hopeful, until, made), options, score.dtype)
    return tf.where(options.early_stopping == 1, (worst == none) & (score > none), attainable > worst)


def followed(state: State, going: Candidates, length: Any, options: Options) -> State:
    """The rows in the order of their beams, each with its token; of the cache only what came after the prompt."""
    batch, beams = sizes(state.scores)
    rows = tf.reshape(going.beam + beams * tf.range(batch)[:, None], [-1])  # (B * K,)
    tokens = tf.reshape(going.token, [-1])
    ids = put(tf.gather(state.ids, rows), tokens, length + state.step - 1)
    _, stop = over(tokens, tf.gather(state.stop, rows), options)
    layers = tuple((reordered(k, rows, length), reordered(v, rows, length)) for k, v in state.cache.layers)
    cache = KVCache(layers, state.cache.cross, state.cache.filled)
    return state._replace(ids=ids, stop=stop, cache=cache)


def reordered(buffer: tf.Tensor, rows: tf.Tensor, length: Any) -> tf.Tensor:
    """Keys or values (B * K, H, S, D) of these rows, each of which shares its prompt with the one that it replaces."""
    return tf.concat([buffer[:, :, :length], tf.gather(buffer[:, :, length:], rows)], 2)
