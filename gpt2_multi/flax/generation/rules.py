"""The rules that turn logits into the next token, in JAX: those of `gpt2_multi.generation.rules`, on batches.

Every option is traced, so that another value compiles nothing; it is one for all rows, (), or one for each, (R, 1).
What a row does not want changes nothing in it; what no row wants is not computed. R rows, S ids (prompt and room), V
vocabulary, K tokens, P phrases of L ids, E end tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpt2_multi.generation.options import Options
from gpt2_multi.generation.rules import PARITY, ROTATIONS
from gpt2_multi.generation.stopping import FOUND

FEW = 64  # tokens that are put in order, which is quick; what keeps more looks for its limit, bit by bit


class Kept(NamedTuple):
    """What a token is chosen among: all logits, -inf where ruled out, and the likeliest tokens in their order.

    All rules look at these first, so that nothing is put in order twice; where nothing is sampled, they are any.
    """

    logits: Array  # (R, V)
    tokens: Array  # (R, K)


def as_tensors(options: Options) -> Options:
    """The options with the stop strings' table on the device; numbers stay Python's, which `jit` traces as weak."""
    stops = options.stops
    return options._replace(stops=jnp.asarray(stops) if stops.any() else jnp.zeros(stops.shape, jnp.int32))


def process(
    logits: Array,
    ids: Array,
    keep: Array,
    length: Any,
    step: Any,
    options: Options,
    own: Callable[[Array], Array] | None = None,
) -> Kept:
    """What the tokens after the first `length` ids are chosen by, from the model's logits, or beams' log-probabilities.

    logits: (R, V). ids: (R, S), of which those count that `keep` (R, S) marks. step: how many tokens were made, () or
    (R, 1). own: the caller's rules.
    """
    penalty, size, phrases = options.repetition_penalty, options.no_repeat_ngram_size, options.phrases
    presence, frequency, biases = options.presence, options.frequency, jnp.asarray(options.biases)
    made = is_made(ids, length, step)
    logits = when(
        some(presence != 0) | some(frequency != 0),
        lambda x: discourage(x, ids, keep & made, presence, frequency),
        logits,
    )
    logits = when((biases != 0).any(), lambda x: add_biases(x, ids, keep, length, phrases, biases), logits)
    logits = when(some(penalty != 1), lambda x: penalise(x, ids, keep, penalty), logits)
    logits = when(some(size > 0), lambda x: ban_repeats(x, ids, keep, length, size), logits)
    short = (keep.sum(-1, keepdims=True) < options.min_length) | (step < options.min_new_tokens)  # (R, 1)
    logits = when(short.any(), lambda x: without(x, short & is_end(x, options)), logits)
    logits = logits if own is None else own(logits)
    blank = jnp.zeros((len(logits), few(logits)), jnp.int32)
    return lax.cond(some(options.do_sample), lambda x: warp(x, options), lambda x: Kept(x, blank), logits)


def choose(processed: Kept, step: Any, options: Options) -> Array:
    """The next token of each row, (R,)"""
    return lax.cond(
        some(options.do_sample),
        lambda: sample(processed, options.streams, step, options.do_sample),
        lambda: likeliest(processed.logits, every(processed.logits)),
    )


def likeliest(logits: Array, tokens: Array) -> Array:
    """The token of the greatest logit of each row, the lowest of several: (R, K) of tokens (K,) or (R, K) -> (R,)

    `argmax` does it one comparison after the other on a CPU.
    """
    is_first = (logits == logits.max(-1, keepdims=True)) | jnp.isnan(logits)
    tokens = jnp.broadcast_to(tokens, logits.shape)
    return jnp.where(is_first, tokens, jnp.iinfo(tokens.dtype).max).min(-1)


def ends(chosen: Array, stop: Array, options: Options) -> tuple[Array, Array]:
    """Which tokens end their rows, and the states of the stop strings after them; all of one shape."""
    stop = jnp.asarray(options.stops)[stop, chosen]
    each = jnp.asarray(options.ends, chosen.dtype)  # (E,), or (R, E) of rows
    each = each.reshape(*each.shape[:-1], *[1] * (chosen.ndim - each.ndim + 1), each.shape[-1])
    is_over = (chosen[..., None] == each).any(-1) | (stop == FOUND)
    return is_over, jnp.maximum(stop, 0)


def some(condition: Any) -> Array:
    """Whether a condition holds for any row, ()"""
    return jnp.any(condition)


def when(condition: Any, change: Callable[[Array], Array], logits: Array) -> Array:
    """The logits, changed if the condition holds; what is not needed is not computed."""
    return lax.cond(condition, change, lambda x: x, logits)


def without(logits: Array, gone: Array) -> Array:
    """The logits with some tokens ruled out."""
    return jnp.where(gone, -jnp.inf, logits)


def is_end(logits: Array, options: Options) -> Array:
    """Which ids of the vocabulary are end tokens, (1, V) or of each row (R, V)."""
    ends = jnp.atleast_2d(jnp.asarray(options.ends, jnp.int32))
    return mark(logits[: len(ends)], jnp.maximum(ends, 0), ends >= 0)


def add_biases(logits: Array, ids: Array, keep: Array, length: Any, phrases: Any, biases: Array) -> Array:
    """Add to the last id of each phrase, (P, L) or (R, P, L), that the first `length` ids of a row have begun."""
    phrases = jnp.asarray(phrases)
    before = length - jnp.arange(phrases.shape[-1] - 1, 0, -1, dtype=jnp.int32)  # (L - 1,)
    there = jnp.maximum(before, 0)
    said = jnp.where(keep[:, there] & (before >= 0)[None], ids[:, there], -2)  # (R, L - 1)
    starts = phrases[..., :-1].reshape(-1, *phrases.shape[-2:-1], phrases.shape[-1] - 1)  # (1 or R, P, L - 1)
    begun = ((starts == said[:, None]) | (starts < 0)).all(-1)  # (R, P)
    added = jnp.where(begun, jnp.atleast_2d(biases), 0).astype(logits.dtype)
    if phrases.ndim == 2:
        return logits.at[:, phrases[:, -1]].add(added)
    return logits.at[jnp.arange(len(logits), dtype=jnp.int32)[:, None], phrases[..., -1]].add(added)


def is_made(ids: Array, length: Any, step: Any) -> Array:
    """Which of the ids (R, S) were made, the last `step` of the first `length`: (1, S) or (R, S)"""
    place = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    return (place >= length - step) & (place < length)


def discourage(logits: Array, ids: Array, counts: Array, presence: Any, frequency: Any) -> Array:
    """Make less likely what was made: the ids (R, S) that count."""
    row = jnp.arange(len(ids), dtype=jnp.int32)[:, None]
    found = jnp.zeros_like(logits).at[row, ids].add(counts.astype(logits.dtype))
    presence, frequency = jnp.asarray(presence, logits.dtype), jnp.asarray(frequency, logits.dtype)
    return logits - frequency * found - presence * (found > 0).astype(logits.dtype)


def mark(logits: Array, ids: Array, marked: Array) -> Array:
    """Which tokens (R, V) are marked somewhere in a row: ids (R, S), marked (R, S) -> booleans."""
    row = jnp.arange(len(ids), dtype=jnp.int32)[:, None]
    return jnp.zeros(logits.shape, bool).at[row, ids].max(marked)


def penalise(logits: Array, ids: Array, keep: Array, penalty: Any) -> Array:
    """Make each token that a row has seen less likely (Keskar et al. 2019, section 4.1)."""
    penalty = jnp.asarray(penalty, logits.dtype)
    return jnp.where(mark(logits, ids, keep), jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeats(logits: Array, ids: Array, keep: Array, length: Any, size: Any) -> Array:
    """Rule out every token that would repeat an n-gram of its row's ids (R, S); windows over padding do not count."""
    place = jnp.arange(ids.shape[1], dtype=jnp.int32)

    def narrowed(back: Array, repeats: Array) -> Array:
        before = jnp.maximum(place - back, 0)
        equal = ids[:, before] == ids[:, length - back][:, None]
        return repeats & (equal & keep[:, before] & (place >= back)[None] | (back >= size))

    longest = jnp.minimum(jnp.max(size), ids.shape[1] + 1)  # a longer one repeats nothing either
    return without(logits, mark(logits, ids, lax.fori_loop(1, longest, narrowed, keep & (size > 0))))


def warp(logits: Array, options: Options) -> Kept:
    """The rules for sampling: temperature, then which tokens are kept, of which there are `least_kept` at least."""
    least, top_k, top_p, min_p, typical_p, temperature = (
        jnp.where(options.do_sample, x, off)
        for x, off in (
            (options.least_kept, 1),
            (options.top_k, 0),
            (options.top_p, 1),
            (options.min_p, 0),
            (options.typical_p, 1),
            (options.temperature, 1),
        )
    )
    logits = kept = logits / temperature.astype(logits.dtype)
    tokens, typical = first_few(logits), some(typical_p < 1)
    top_k = jnp.where(top_k > 0, jnp.maximum(top_k, least), 0)
    kept = when(some(top_k > 0), lambda x: keep_top_k(x, tokens, top_k), kept)
    kept = when(some(top_p < 1), lambda x: keep_top_p(x, tokens, top_p), kept)
    kept = when(some(min_p > 0), lambda x: keep_min_p(x, min_p), kept)
    kept = when(typical, lambda x: keep_typical(x, typical_p), kept)
    kept = when(some(least > 1), lambda x: jnp.where(keep_top_k(logits, tokens, least) > -jnp.inf, logits, x), kept)
    return Kept(kept, lax.cond(typical, lambda: first_few(kept), lambda: tokens))  # others may be left


def keep_top_k(logits: Array, tokens: Array, k: Any) -> Array:
    """Keep the k greatest logits, and what ties with the k-th; all where k is 0.

    tokens: (R, K), those of the greatest in order.
    """
    k = jnp.asarray(k, jnp.int32)

    def of_few() -> Array:
        last = jnp.broadcast_to(jnp.maximum(k - 1, 0), (len(logits), 1))
        least = at(logits, at(tokens, last))
        return without(logits, (logits < least) & (k > 0))

    def of_all() -> Array:
        keys = ordered(logits)
        last = greatest(keys, lambda key: (keys >= key).sum(-1, keepdims=True, dtype=jnp.int32) >= k)
        return without(logits, (keys < last) & (k > 0))

    return lax.cond((k <= tokens.shape[1]).all(), of_few, of_all)


def keep_top_p(logits: Array, tokens: Array, p: Any) -> Array:
    """Keep the fewest most likely tokens whose probability reaches p, at least one; lower ids first; all where p is 1.

    tokens: (R, K), those of the greatest logits in order.
    """
    p, most = jnp.asarray(p, logits.dtype), logits.max(-1, keepdims=True)
    powers = jnp.exp(at(logits, tokens) - most)  # (R, K)
    reached = jnp.cumsum(powers / jnp.exp(logits - most).sum(-1, keepdims=True), -1)

    def of_few() -> Array:
        token = at(tokens, (reached < p).sum(-1, keepdims=True))  # what reaches p
        least = at(logits, token)
        gone = (logits < least) | ((logits == least) & (every(logits)[None] > token))
        return without(logits, gone & (p < 1))

    def of_all() -> Array:
        keys, probs = ordered(logits), jax.nn.softmax(logits)

        def mass(where: Array) -> Array:
            return jnp.where(where, probs, 0).sum(-1, keepdims=True)

        last = greatest(keys, lambda key: mass(keys >= key) >= p)  # what reaches p
        tied = keys == last
        among = jnp.where(tied, probs, 0)
        before = mass(keys > last) + jnp.cumsum(among, -1) - among
        return without(logits, ((keys < last) | (tied & (before >= p))) & (p < 1))

    return lax.cond(((reached[:, -1:] >= p) | (p >= 1)).all(), of_few, of_all)


def keep_min_p(logits: Array, p: Any) -> Array:
    """Keep what is at least p times as likely as the likeliest token."""
    least = logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(p, logits.dtype))
    return without(logits, logits < least)


def keep_typical(logits: Array, p: Any) -> Array:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach p, and what ties with the last.

    All where p is 1.
    """
    log_probs, p = jax.nn.log_softmax(logits), jnp.asarray(p, logits.dtype)
    probs = jnp.exp(log_probs)
    entropy = -jnp.where(probs > 0, probs * log_probs, 0).sum(-1, keepdims=True)
    keys = ordered(-jnp.abs(log_probs + entropy))
    last = greatest(keys, lambda key: jnp.where(keys >= key, probs, 0).sum(-1, keepdims=True) >= p)
    return without(logits, (keys < last) & (p < 1))


def guide(logits: Array, others: Array, scale: Any) -> Array:
    """Log-probabilities led away from those without the prompt, all (R, V) (Sanchez et al. 2023, equation 7)."""
    given, less = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    return less + jnp.asarray(scale, logits.dtype) * (given - less)


def ordered(logits: Array) -> Array:
    """Unsigned integers in the order of these floats: the bits, all flipped where the sign is set, else the sign."""
    kind = jnp.uint64 if logits.dtype == jnp.float64 else jnp.uint32
    zeros_as_one = jnp.where(logits != 0, logits, 0)  # + 0 would be folded away
    bits = lax.bitcast_convert_type(zeros_as_one, kind)
    sign = jnp.asarray(1 << kind.dtype.itemsize * 8 - 1, kind)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def greatest(keys: Array, holds: Callable[[Array], Array]) -> Array:
    """The greatest key of each row for which a condition holds that holds for all lower ones, bit by bit: (R, 1).

    It needs no sort, which XLA does by one comparison after the other.
    """
    width = keys.dtype.itemsize * 8

    def lower(number: Array, found: Array) -> Array:
        tried = found | jnp.left_shift(jnp.asarray(1, keys.dtype), jnp.asarray(width - 1 - number, keys.dtype))
        return jnp.where(holds(tried), tried, found)

    return lax.fori_loop(0, width, lower, jnp.zeros((len(keys), 1), keys.dtype))


def sample(kept: Kept, streams: Any, step: Any, do_sample: Any = True) -> Array:
    """Draw from the softmax of logits by the Gumbel noise (Maddison et al. 2014) of each row's stream: (R,)

    Where all but a few tokens are ruled out, there is no noise for them, nor in a row that is not sampled.
    """
    logits, tokens = kept

    def among(logits: Array, tokens: Array) -> Array:
        noise = jnp.where(do_sample, gumbel(streams, step, tokens, logits.dtype), 0)
        return likeliest(logits + noise, tokens)

    values = at(logits, tokens)
    are_all = (logits > -jnp.inf).sum(-1, keepdims=True) == (values > -jnp.inf).sum(-1, keepdims=True)
    are_all = (are_all | ~jnp.asarray(do_sample)).all()
    return lax.cond(are_all, lambda: among(values, tokens), lambda: among(logits, every(logits)))


def at(x: Array, index: Array) -> Array:
    """What stands at these places of each row: (R, V), (R, K) -> (R, K)"""
    return jnp.take_along_axis(x, index, 1, mode="clip")


def every(logits: Array) -> Array:
    """The tokens of the vocabulary: (R, V) -> (V,)"""
    return jnp.arange(logits.shape[1], dtype=jnp.int32)


def few(logits: Array) -> int:
    """How many tokens of (R, V) logits are put in order."""
    return min(FEW, logits.shape[1])


def first_few(logits: Array) -> Array:
    """The tokens of the greatest logits of each row, in order, of equal ones the lower first: (R, V) -> (R, K)"""
    zeros_as_one = jnp.where(logits != 0, logits, 0)  # XLA puts -0 after 0
    return lax.top_k(zeros_as_one, few(logits))[1]


def gumbel(streams: Any, step: Any, tokens: Array, dtype: Any) -> Array:
    """The Gumbel noise of these tokens, (K,) or (R, K), at a step, () or (R, 1), for streams (R, 2) uint32: (R, K)"""
    low, high = jnp.split(jnp.asarray(streams, jnp.uint32), 2, -1)  # (R, 1) each
    x0, _ = threefry2x32((low, high), (jnp.asarray(step, jnp.uint32), tokens.astype(jnp.uint32)))
    uniform = ((x0 >> 9).astype(dtype) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def threefry2x32(keys: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """`generation.rules.threefry2x32` on uint32 arrays, which wrap around.

    The groups of rounds are a loop: XLA takes very long over all twenty rounds as one expression on a CPU.
    """
    words = jnp.stack([*keys, keys[0] ^ keys[1] ^ jnp.uint32(PARITY)])
    shape = jnp.broadcast_shapes(keys[0].shape, counter[1].shape)
    start = tuple(jnp.broadcast_to(word, shape) + key for word, key in zip(counter, keys, strict=True))
    return lax.fori_loop(0, 5, partial(four_rounds, words), start)


def four_rounds(words: Array, group: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    """A group of rounds, and the words of the key, (3, ...), that follow it."""
    x0, x1 = state
    for even, odd in zip(*ROTATIONS, strict=True):
        rotation = jnp.where(group % 2 == 0, jnp.uint32(even), jnp.uint32(odd))
        x0 = x0 + x1
        x1 = x0 ^ (x1 << rotation | x1 >> 32 - rotation)
    group += 1
    return x0 + words[group % 3], x1 + words[(group + 1) % 3] + jnp.asarray(group, jnp.uint32)
