"""Beam search and beam sampling in Flax, as transformers 4.57 has them: one compiled loop.

B prompts, K beams of each, C candidates of each, V vocabulary, N new tokens that there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpt2_multi.flax.attention import KVCache, widened
from gpt2_multi.flax.generation.cpu_kernels import prepared
from gpt2_multi.flax.generation.decoding import Plan, Prompt, State, View, begin, follow, recorded, written
from gpt2_multi.flax.generation.rules import Options, ended, gumbel, process
from gpt2_multi.flax.params import Tree


class Paths(NamedTuple):
    """How texts came about, token by token; X is K or more."""

    tokens: Array  # (B, X, N), filling after the last
    log_probs: Array  # (B, X, N), of each token; 0 after the last
    beams: Array  # (B, X, N), the row that each token was chosen in, among all B * K; -1 after the last

    def taken(self, index: Array) -> Paths:
        """Some of the paths: index (B, X)"""
        return Paths(*(jnp.take_along_axis(x, index[..., None], 1) for x in self))

    def joined(self, others: Paths) -> Paths:
        """These, and others after them."""
        return Paths(*(jnp.concatenate(pair, 1) for pair in zip(self, others, strict=True)))


class Found(NamedTuple):
    """Finished texts, the best first; where there is none yet, the score is -inf."""

    scores: Array  # (B, K)
    paths: Paths

    def best(self, several: int, fill: int) -> Paths:
        """The paths of so many texts of each prompt, (B * several, N); nothing but filling where there is none."""
        none = (self.scores[:, :several] == -jnp.inf).reshape(-1, 1)
        paths = (x[:, :several].reshape(-1, x.shape[-1]) for x in self.paths)
        return Paths(*(jnp.where(none, empty, x) for x, empty in zip(paths, (fill, 0, -1), strict=True)))


class Search(NamedTuple):
    """What the loop carries from one token to the next."""

    state: State
    scores: Array  # (B, K), of the running beams, the best first
    running: Paths
    found: Found
    is_open: Array  # (B,), whether a prompt's texts may yet become better


def search(
    module: Any, params: Tree, prompt: Prompt, plan: Plan, new: Any, options: Options
) -> tuple[Found, Array, dict[str, Array]]:
    """The texts that are found, after how many steps, and the records."""
    view, state = begin(module, params, prompt, plan)
    params, context = prepared(module, params, len(state.ids), plan.room)

    def going(hunt: Search) -> Array:
        return (hunt.state.step < new) & hunt.is_open.any()

    def once(hunt: Search) -> Search:
        logits, cache = follow(module, params, view, hunt.state, hunt.state.ids[:, :0])
        hunt = hunt._replace(state=hunt.state._replace(cache=cache))
        return widen(view, hunt, logits[:, 0], new, options)

    with context:
        hunt = lax.while_loop(going, once, started(module, plan, state, options))
    return hunt.found, hunt.state.step, hunt.state.records


def started(module: Any, plan: Plan, state: State, options: Options) -> Search:
    """The search before the first token: of each prompt one beam counts, since all are the same yet."""
    batch, dtype = len(state.ids) // plan.rows, jnp.promote_types(module.dtype, jnp.float32)
    scores = jnp.full((batch, plan.rows), -jnp.inf, dtype)
    shape = (*scores.shape, plan.room)
    tokens = jnp.full(shape, options.fill, jnp.int32)
    paths = Paths(tokens, jnp.zeros(shape, dtype), jnp.full(shape, -1, jnp.int32))
    return Search(state, scores.at[:, 0].set(0), paths, Found(scores, paths), jnp.ones(batch, bool))


def widen(view: View, hunt: Search, logits: Array, new: Any, options: Options) -> Search:
    """The search one token further, by the model's logits (B * K, V)."""
    state, step = hunt.state, hunt.state.step
    place = view.mask.shape[1] + step
    keep = written(view.mask, step, state.ids.shape[1])
    processed = process(jax.nn.log_softmax(widened(logits)), state.ids, keep, place, step, options)
    records = recorded(state, logits, processed, state.ids[:, 0])
    values, beam, token = candidates(processed, hunt.scores, step, options)  # (B, C)
    stop = jnp.take_along_axis(state.stop.reshape(hunt.scores.shape), beam, 1)
    over, stop = ended(options, token, stop)
    over |= step + 1 == new
    more = partial(extended, hunt.running, processed, step)
    reached = values / jnp.asarray(step + 1, values.dtype) ** options.length_penalty
    found = updated(hunt.found, more, beam, token, jnp.where(over & hunt.is_open[:, None], reached, -jnp.inf))
    scores, best = lax.top_k(jnp.where(over, -jnp.inf, values), hunt.scores.shape[1])  # (B, K)
    is_open = hunt.is_open & can_improve(scores[:, 0], found, step + 1, new, options)
    running = more(*(jnp.take_along_axis(x, best, 1) for x in (beam, token)))
    state = state._replace(records=records, stop=jnp.take_along_axis(stop, best, 1).reshape(-1))
    return Search(continued(view, state, running, place), scores, running, found, is_open)


def candidates(processed: Array, scores: Array, step: Any, options: Options) -> tuple[Array, Array, Array]:
    """The likeliest continuations of all beams, or samples without replacement (Kool et al. 2019), best first: (B, C)

    processed: (B * K, V). scores: (B, K). Returns the scores, the beams that they continue, and the tokens. C is the
    number for as many end tokens as the table has room for; those beyond the number that is asked for have score -inf.
    """
    (batch, beams), vocab = scores.shape, processed.shape[1]
    values = (processed.reshape(batch, beams, vocab) + scores[..., None]).reshape(batch, -1)  # (B, K * V)

    def noisy(values: Array) -> Array:
        return values + gumbel(options.streams, step, jnp.arange(vocab), values.dtype).reshape(values.shape)

    rank = lax.cond(options.do_sample, noisy, lambda x: x, values)
    count = min(max(2, 1 + len(options.ends)) * beams, beams * vocab)
    _, index = lax.top_k(rank, count)
    values = jnp.where(jnp.arange(count) < options.candidates, jnp.take_along_axis(values, index, 1), -jnp.inf)
    index = jnp.where(values == -jnp.inf, 0, index)  # there are fewer than C
    return values, index // vocab, index % vocab


def extended(running: Paths, processed: Array, step: Any, beam: Array, token: Array) -> Paths:
    """The paths of some candidates: beam, token (B, X) -> (B, X, N)"""
    batch, beams, _ = running.tokens.shape
    row = beam + beams * jnp.arange(batch, dtype=beam.dtype)[:, None]
    new = (token, processed[row, token], row)
    return Paths(*(path.at[..., step].set(x) for path, x in zip(running.taken(beam), new, strict=True)))


def updated(found: Found, more: Callable[..., Paths], beam: Array, token: Array, scores: Array) -> Found:
    """The best of what was found and of the first K candidates (B, C); those that are not finished have score -inf."""
    first = slice(found.scores.shape[1])
    together = jnp.concatenate([found.scores, scores[:, first]], 1)
    best, index = lax.top_k(together, found.scores.shape[1])
    return Found(best, found.paths.joined(more(beam[:, first], token[:, first])).taken(index))


def can_improve(score: Array, found: Found, made: Any, new: Any, options: Options) -> Array:
    """Whether the best running beam of each prompt may yet be better than the worst text that was found: (B,)"""
    worst, penalty = found.scores[:, -1], options.length_penalty
    hopeful = (options.early_stopping == 2) & (penalty > 0)
    length = jnp.where(hopeful, new, made).astype(score.dtype)
    enough = (worst == -jnp.inf) & (score > -jnp.inf)
    return jnp.where(options.early_stopping == 1, enough, score / length**penalty > worst)


def continued(view: View, state: State, running: Paths, place: Any) -> State:
    """The state with the running beams' rows, and their last tokens at `place`."""
    rows, chosen = running.beams[..., state.step].reshape(-1), running.tokens[..., state.step].reshape(-1)
    ids = lax.dynamic_update_slice_in_dim(state.ids[rows], chosen[:, None], place, axis=1)
    cache = reordered(state.cache, rows, view.mask.shape[1])
    return state._replace(step=state.step + 1, ids=ids, cache=cache)


def reordered(cache: KVCache, rows: Array, start: int) -> KVCache:
    """The cache of these rows (R,), each of which shares what is before `start` with the one that it replaces."""

    def moved(x: Array) -> Array:
        made = jnp.take(x[..., start:, :], rows, axis=x.ndim - 4)
        return lax.dynamic_update_slice_in_dim(x, made, start, axis=x.ndim - 2)

    return KVCache(jax.tree.map(moved, cache.layers), cache.cross, cache.length)
