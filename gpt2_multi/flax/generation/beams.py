"""Beam search and beam sampling in Flax, as transformers 4.57 has them.

B prompts, K beams of each, C candidates of each, V vocabulary, N new tokens that there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt2_multi.flax.attention import KVCache, upcast
from gpt2_multi.flax.generation.decoding import Prompt, Sampling, State, guided, own_ends, own_rules, put, record
from gpt2_multi.flax.generation.rules import ends, gumbel, process
from gpt2_multi.generation.options import Options

COLUMNS = 8  # of a cache, which move at once; of which a bucket is a multiple


class Paths(NamedTuple):
    """How texts came about, token by token; X is K or more."""

    tokens: Array  # (B, X, N), filling after the last
    log_probs: Array  # (B, X, N), of each token; 0 after the last
    beams: Array  # (B, X, N), the row that each token was chosen in, among all B * K; -1 after the last

    def gather(self, index: Array) -> Paths:
        """Some of the paths: index (B, X)"""
        return Paths(*(jnp.take_along_axis(x, index[..., None], 1) for x in self))

    def concat(self, others: Paths) -> Paths:
        """These, and others after them."""
        return Paths(*(jnp.concatenate(pair, 1) for pair in zip(self, others, strict=True)))


class Hypotheses(NamedTuple):
    """Finished texts, the best first; where there is none yet, the score is -inf."""

    scores: Array  # (B, K)
    paths: Paths

    def best(self, several: int, fill: int) -> Paths:
        """The paths of so many texts of each prompt, (B * several, N); nothing but filling where there is none."""
        none = (self.scores[:, :several] == -jnp.inf).reshape(-1, 1)
        paths = (x[:, :several].reshape(-1, x.shape[-1]) for x in self.paths)
        return Paths(*(jnp.where(none, empty, x) for x, empty in zip(paths, (fill, 0, -1), strict=True)))


class BeamState(NamedTuple):
    """What a search carries besides the rows of its beams."""

    scores: Array  # (B, K), of the running beams, the best first
    running: Paths
    found: Hypotheses
    is_open: Array  # (B,), whether a prompt's texts may yet become better


@dataclass(frozen=True)
class BeamSearch(Sampling):
    """The likeliest texts, by way of the K likeliest beginnings of each prompt, one in each of its rows."""

    def start(self, model: Any, prompt: Prompt, options: Options) -> State:
        """The state before the first token: of each prompt one beam counts, since all are the same yet."""
        batch, dtype = len(prompt.ids), np.promote_types(model.dtype, np.float32)
        scores = jnp.full((batch, self.rows), -jnp.inf, dtype)
        shape = (*scores.shape, self.room)
        tokens = jnp.full(shape, options.fill, jnp.int32)
        paths = Paths(tokens, jnp.zeros(shape, dtype), jnp.full(shape, -1, jnp.int32))
        beams = BeamState(scores.at[:, 0].set(0), paths, Hypotheses(scores, paths), jnp.ones(batch, bool))
        return super().start(model, prompt, options)._replace(beams=beams)

    def is_open(self, state: State) -> Array:
        """Whether a prompt's texts may yet become better, ()."""
        return state.beams.is_open.any()  # type: ignore[no-any-return]

    def update(self, state: State, logits: Array, proposed: Array, new: Any, options: Options) -> State:
        """The state one token further, by the logits (B * K, 1, V) after the last one."""
        beams, step = state.beams, state.step
        log_probs = jax.nn.log_softmax(upcast(logits[:, 0])).astype(beams.scores.dtype)
        log_probs, own = guided(state, log_probs, options), own_rules(self, state)
        processed = process(log_probs, state.ids, state.mask, state.length, step, options, own).logits
        values, beam, token = candidates(processed, beams.scores, step, options)  # (B, C)
        stop = jnp.take_along_axis(state.stop.reshape(beams.scores.shape), beam, 1)
        over, stop = ends(token, stop, options)
        over |= step + 1 == new
        if self.callbacks.criteria:
            over |= self.ends(state, processed, beam, token)
        more = partial(extend, beams.running, processed, step)
        reached = values / jnp.asarray(step + 1, values.dtype) ** options.length_penalty
        reached = jnp.where(over & beams.is_open[:, None], reached, -jnp.inf)
        found = add_finished(beams.found, more, beam, token, reached)
        scores, best = lax.top_k(jnp.where(over, -jnp.inf, values), self.rows)  # (B, K)
        is_open = beams.is_open & can_improve(scores[:, 0], found, step + 1, new, options)
        running = more(*(jnp.take_along_axis(x, best, 1) for x in (beam, token)))
        state = record(state, logits[:, 0], processed, state.ids[:, 0])._replace(
            beams=BeamState(scores, running, found, is_open), stop=jnp.take_along_axis(stop, best, 1).reshape(-1)
        )
        rows, chosen = running.beams[..., step].reshape(-1), running.tokens[..., step].reshape(-1)
        return state._replace(
            step=step + 1,
            length=state.length + 1,
            ids=put(state.ids[rows], chosen, state.length),
            mask=put(state.mask, jnp.ones_like(state.finished), state.length),
            cache=reorder(state.cache, rows, state.cache.capacity - self.room),
        )

    def ends(self, state: State, processed: Array, beam: Array, token: Array) -> Array:
        """Which candidates, rows of their own, are over by the caller's criteria: beam, token (B, C) -> (B, C)"""
        rows = (beam + self.rows * jnp.arange(len(beam), dtype=beam.dtype)[:, None]).reshape(-1)
        ids = put(state.ids[rows], token.reshape(-1), state.length)
        after = state._replace(ids=ids, length=state.length + 1)
        return own_ends(self.callbacks, after, processed[rows]).reshape(beam.shape)


def candidates(processed: Array, scores: Array, step: Any, options: Options) -> tuple[Array, Array, Array]:
    """The likeliest continuations of all beams, or samples without replacement (Kool et al. 2019), best first: (B, C)

    processed: (B * K, V). scores: (B, K). Returns the scores, the beams that they continue, and the tokens. C is the
    number for as many end tokens as the table has room for; those beyond the number that is asked for have score -inf.
    """
    (batch, beams), vocab = scores.shape, processed.shape[1]
    values = (processed.reshape(batch, beams, vocab) + scores[..., None]).reshape(batch, -1)  # (B, K * V)

    def noisy(values: Array) -> Array:
        return values + gumbel(options.streams, step, jnp.arange(vocab, dtype=jnp.int32), values.dtype).reshape(
            values.shape
        )

    rank = lax.cond(options.do_sample, noisy, lambda x: x, values)
    count = min(max(2, 1 + len(options.ends)) * beams, beams * vocab)
    _, index = lax.top_k(rank, count)
    values = jnp.where(
        jnp.arange(count, dtype=jnp.int32) < options.candidates, jnp.take_along_axis(values, index, 1), -jnp.inf
    )
    index = jnp.where(values == -jnp.inf, 0, index)  # there are fewer than C
    return values, index // vocab, index % vocab


def extend(running: Paths, processed: Array, step: Any, beam: Array, token: Array) -> Paths:
    """The paths of some candidates: beam, token (B, X) -> (B, X, N)"""
    batch, beams, _ = running.tokens.shape
    row = beam + beams * jnp.arange(batch, dtype=beam.dtype)[:, None]
    new = (token, processed[row, token], row)
    return Paths(*(path.at[..., step].set(x) for path, x in zip(running.gather(beam), new, strict=True)))


def add_finished(found: Hypotheses, more: Callable[..., Paths], beam: Array, token: Array, scores: Array) -> Hypotheses:
    """The best of what was found and of the first K candidates (B, C); those that are not finished have score -inf."""
    first = slice(found.scores.shape[1])
    together = jnp.concatenate([found.scores, scores[:, first]], 1)
    best, index = lax.top_k(together, found.scores.shape[1])
    return Hypotheses(best, found.paths.concat(more(beam[:, first], token[:, first])).gather(index))


def can_improve(score: Array, found: Hypotheses, made: Any, new: Any, options: Options) -> Array:
    """Whether the best running beam of each prompt may yet be better than the worst text that was found: (B,)"""
    worst, penalty = found.scores[:, -1], options.length_penalty
    hopeful = (options.early_stopping == 2) & (penalty > 0)
    length = jnp.where(hopeful, new, made).astype(score.dtype)
    enough = (worst == -jnp.inf) & (score > -jnp.inf)
    return jnp.where(options.early_stopping == 1, enough, score / length**penalty > worst)


def reorder(cache: KVCache, rows: Array, start: int) -> KVCache:
    """The cache of these rows (R,), each of which shares what is before `start` with the one that it replaces.

    Only columns that hold a token move, and none where every row keeps its own. Guided rows have as many after them,
    which move with them.
    """
    every = (cache.layers if cache.stacked else cache.layers[0])[0].shape[-4]
    are_kept = (rows == jnp.arange(len(rows), dtype=rows.dtype)).all()
    rows = jnp.concatenate([rows + first for first in range(0, every, len(rows))])
    count = jnp.where(are_kept, 0, -((start - cache.length) // COLUMNS))

    def moved(number: Array, layers: Any) -> Any:
        place = start + number * COLUMNS

        def one(x: Array) -> Array:
            made = lax.dynamic_slice_in_dim(x, place, COLUMNS, axis=x.ndim - 2)
            made = jnp.take(made, rows, axis=x.ndim - 4, mode="clip")
            return lax.dynamic_update_slice_in_dim(x, made, place, axis=x.ndim - 2)

        return jax.tree.map(one, layers)

    return KVCache(lax.fori_loop(0, count, moved, cache.layers), cache.cross, cache.length)
