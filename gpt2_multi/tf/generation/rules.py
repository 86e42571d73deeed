"""The rules that turn logits into the next token, in TensorFlow: those of `gpt2_multi.generation.rules`, on batches.

Every option is a tensor, so that another value traces and compiles nothing; it is one for all rows, (), or one for
each, (B, 1). What a row does not want changes nothing in it; what no row wants is not computed. B rows, S keys (prompt
and room), V vocabulary, K tokens, P phrases of L ids, E end tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import tensorflow as tf

from gpt2_multi.generation.options import Options
from gpt2_multi.generation.rules import PARITY, ROTATIONS
from gpt2_multi.generation.stopping import FOUND
from gpt2_multi.tf.layers import sizes

FEW = 64  # tokens that are put in order, which is quick; what keeps more looks for its limit, bit by bit


class Kept(NamedTuple):
    """What a token is chosen among: all logits, -inf where ruled out, and the likeliest tokens in their order.

    All rules look at these first, so that nothing is put in order twice; where nothing is sampled, they are any.
    """

    logits: tf.Tensor  # (B, V)
    tokens: tf.Tensor  # (B, K)


def as_tensors(options: Options) -> Options:
    """The options as tensors; those that are tensors already stay."""
    kinds = {bool: tf.bool, int: tf.int32, float: tf.float64}
    return Options(*(tf.convert_to_tensor(value, kinds.get(type(value))) for value in options))


def process(
    logits: tf.Tensor,
    ids: tf.Tensor,
    keep: tf.Tensor,
    place: tf.Tensor,
    step: tf.Tensor,
    options: Options,
    own: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> Kept:
    """What the next token, which will stand at `place`, is chosen among.

    logits: (B, V), the model's, or a beam's log-probabilities. ids: (B, S), of which those count that `keep` (B, S)
    marks. step: how many tokens were made, () or (B, 1). own: the caller's rules.
    """
    lengths = tf.math.count_nonzero(keep, -1, keepdims=True, dtype=tf.int32)  # (B, 1); padding does not count
    presence, frequency, made = options.presence, options.frequency, keep & is_made(ids, place, step)
    penalty, size = options.repetition_penalty, options.no_repeat_ngram_size
    is_wanted = some(presence != 0) | some(frequency != 0)
    logits = when(is_wanted, lambda x: discourage(x, ids, made, presence, frequency), logits)
    logits = when(
        some(options.biases != 0), lambda x: add_biases(x, ids, keep, place, options.phrases, options.biases), logits
    )
    logits = when(some(penalty != 1), lambda x: penalise(x, ids, keep, penalty), logits)
    logits = when(some(size > 0), lambda x: ban_repeats(x, ids, keep, place, size), logits)
    short = (lengths < options.min_length) | (step < options.min_new_tokens)
    logits = when(some(short), lambda x: without(x, short & is_end(x, options)), logits)
    logits = logits if own is None else own(logits)
    blank = tf.zeros((sizes(logits)[0], few(logits)), tf.int32)
    return Kept(*tf.cond(some(options.do_sample), lambda: tuple(warp(logits, options)), lambda: (logits, blank)))


def choose(processed: Kept, step: tf.Tensor, options: Options) -> tf.Tensor:
    """The next token of each row, (B,)"""
    return tf.cond(
        some(options.do_sample),
        lambda: sample(processed, options.streams, step, options.do_sample),
        lambda: likeliest(processed.logits, every(processed.logits)),
    )


def likeliest(logits: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
    """The token of the greatest logit of each row, the lowest of several: (B, K) of tokens (K,) or (B, K) -> (B,)

    XLA's `argmax` does it one comparison after the other on a CPU.
    """
    is_first = (logits == tf.reduce_max(logits, -1, keepdims=True)) | tf.math.is_nan(logits)
    return tf.reduce_min(tf.where(is_first, tokens, tokens.dtype.max), -1)


def ends(chosen: tf.Tensor, state: tf.Tensor, options: Options) -> tuple[tf.Tensor, tf.Tensor]:
    """Which tokens end their rows, and the states of the stop strings after them; all of one shape."""
    state = tf.gather_nd(options.stops, tf.stack([state, chosen], -1))
    ends = options.ends  # (E,), or (B, E) of rows
    for _ in range(chosen.shape.rank + 1 - ends.shape.rank if ends.shape.rank > 1 else 0):
        ends = tf.expand_dims(ends, 1)
    ended = tf.reduce_any(chosen[..., None] == ends, -1)
    return ended | (state == FOUND), tf.maximum(state, 0)


def some(condition: tf.Tensor) -> tf.Tensor:
    """Whether a condition holds for any row, ()"""
    return tf.reduce_any(condition)


def when(condition: tf.Tensor, change: Callable[[tf.Tensor], tf.Tensor], logits: tf.Tensor) -> tf.Tensor:
    """The logits, changed if the condition holds; what is not needed is not computed."""
    return tf.cond(condition, lambda: change(logits), lambda: logits)


def without(logits: tf.Tensor, gone: tf.Tensor) -> tf.Tensor:
    """The logits with some tokens ruled out."""
    return tf.where(gone, tf.constant(-float("inf"), logits.dtype), logits)


def is_end(logits: tf.Tensor, options: Options) -> tf.Tensor:
    """Which ids of the vocabulary are end tokens, (1, V) or of each row (B, V)."""
    ends = tf.reshape(options.ends, (-1, sizes(options.ends)[-1]))
    are_words = (ends >= 0) & (ends < sizes(logits)[1])
    return mark(logits, tf.where(are_words, ends, sizes(logits)[1]), are_words)


def add_biases(
    logits: tf.Tensor, ids: tf.Tensor, keep: tf.Tensor, place: tf.Tensor, phrases: tf.Tensor, biases: tf.Tensor
) -> tf.Tensor:
    """Add to the last id of each phrase, (P, L) or (B, P, L), that a row's ids (B, S) before `place` have begun."""
    (batch, vocab), length = sizes(logits), sizes(phrases)[-1]
    back = place - length + 1 + tf.range(length - 1)  # (L - 1,)
    before = tf.maximum(back, 0)
    counts = tf.gather(keep, before, axis=1) & (back >= 0)  # of padding, which begins none
    starts = phrases[..., :-1]
    same = (tf.gather(ids, before, axis=1)[:, None] == starts) & counts[:, None]  # (B, P, L - 1)
    begun = tf.reduce_all(same | (starts == -1), -1)
    added = tf.where(begun, tf.cast(biases, logits.dtype), 0)  # (B, P)
    if phrases.shape.rank == 2:
        return logits + tf.transpose(tf.scatter_nd(phrases[:, -1:], tf.transpose(added), (vocab, batch)))
    rows = tf.broadcast_to(tf.range(batch)[:, None], tf.shape(added))
    return tf.tensor_scatter_nd_add(logits, tf.stack([rows, phrases[..., -1]], -1), added)


def is_made(ids: tf.Tensor, place: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """Which of the ids (B, S) were made, the last `step` before `place`: (S,) or (B, S)"""
    places = tf.range(sizes(ids)[1])
    return (places >= place - step) & (places < place)


def discourage(
    logits: tf.Tensor, ids: tf.Tensor, counts: tf.Tensor, presence: tf.Tensor, frequency: tf.Tensor
) -> tf.Tensor:
    """Make less likely what was made: the ids (B, S) that count."""
    found = tf.cast(tally(logits, ids, counts), logits.dtype)
    there = tf.cast(found > 0, logits.dtype)
    return logits - tf.cast(frequency, logits.dtype) * found - tf.cast(presence, logits.dtype) * there


def mark(logits: tf.Tensor, ids: tf.Tensor, marked: tf.Tensor) -> tf.Tensor:
    """Which tokens (B, V) are marked somewhere in a row: ids (B, S), marked (B, S) -> booleans."""
    return tally(logits, ids, marked) > 0


def tally(logits: tf.Tensor, ids: tf.Tensor, marked: tf.Tensor) -> tf.Tensor:
    """How often each token is marked in a row, (B, V) int32: ids (B, S), marked (B, S)."""
    (batch, length), vocab = sizes(ids), sizes(logits)[1]
    row = tf.repeat(tf.range(batch), length)
    index = tf.stack([row, tf.reshape(ids, [-1])], -1)
    marks = tf.scatter_nd(index, tf.cast(tf.reshape(marked, [-1]), tf.int32), (batch, vocab + 1))
    return marks[:, :vocab]  # without what stands for embeddings


def penalise(logits: tf.Tensor, ids: tf.Tensor, keep: tf.Tensor, penalty: tf.Tensor) -> tf.Tensor:
    """Make each token that a row has seen less likely (Keskar et al. 2019, section 4.1)."""
    penalty = tf.cast(penalty, logits.dtype)
    return tf.where(mark(logits, ids, keep), tf.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeats(logits: tf.Tensor, ids: tf.Tensor, keep: tf.Tensor, length: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Rule out every token that would repeat an n-gram of its row's ids (B, S); windows over padding do not count."""
    place = tf.range(sizes(ids)[1])
    longest = tf.minimum(tf.reduce_max(size), length + 1)  # which repeats nothing, as no longer one does

    def narrowed(back: tf.Tensor, repeats: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        before = tf.maximum(place - back, 0)
        equal = tf.gather(ids, before, axis=1) == tf.gather(ids, length - back, axis=1)[:, None]
        equal &= tf.gather(keep, before, axis=1) & (place >= back)
        return back + 1, repeats & (equal | (back >= size))

    _, repeats = tf.while_loop(lambda back, _: back < longest, narrowed, (tf.constant(1), keep & (size > 0)))
    return without(logits, mark(logits, ids, repeats))


def warp(logits: tf.Tensor, options: Options) -> Kept:
    """The rules for sampling: temperature, then which tokens are kept, of which there are `least_kept` at least."""
    least, top_k, top_p, min_p, typical_p, temperature = (
        tf.where(options.do_sample, x, tf.constant(off, x.dtype))
        for x, off in (
            (options.least_kept, 1),
            (options.top_k, 0),
            (options.top_p, 1),
            (options.min_p, 0),
            (options.typical_p, 1),
            (options.temperature, 1),
        )
    )
    logits = logits / tf.cast(temperature, logits.dtype)
    tokens, typical = first_few(logits), some(typical_p < 1)
    top_k = tf.where(top_k > 0, tf.maximum(top_k, least), 0)
    kept = when(some(top_k > 0), lambda x: keep_top_k(x, tokens, top_k), logits)
    kept = when(some(top_p < 1), lambda x: keep_top_p(x, tokens, top_p), kept)
    kept = when(some(min_p > 0), lambda x: keep_min_p(x, min_p), kept)
    kept = when(typical, lambda x: keep_typical(x, typical_p), kept)
    kept = when(some(least > 1), lambda x: tf.maximum(keep_top_k(logits, tokens, least), x), kept)
    return Kept(kept, tf.cond(typical, lambda: first_few(kept), lambda: tokens))  # others may be left


def keep_top_k(logits: tf.Tensor, tokens: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Keep the k greatest logits, and what ties with the k-th; all where k is 0.

    tokens: (B, K), those of the greatest in order.
    """

    def of_few() -> tf.Tensor:
        last = tf.broadcast_to(tf.maximum(k - 1, 0), (sizes(logits)[0], 1))
        return without(logits, (logits < at(logits, at(tokens, last))) & (k > 0))

    def of_all() -> tf.Tensor:
        keys = ordered(logits)
        least = greatest(keys, lambda key: tf.math.count_nonzero(keys >= key, -1, keepdims=True, dtype=tf.int32) >= k)
        return without(logits, (keys < least) & (k > 0))

    return tf.cond(tf.reduce_all(k <= few(logits)), of_few, of_all)


def keep_top_p(logits: tf.Tensor, tokens: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
    """Keep the fewest most likely tokens whose probability reaches p, at least one; lower ids first; all where p is 1.

    tokens: (B, K), those of the greatest logits in order.
    """
    p, most = tf.cast(p, logits.dtype), tf.reduce_max(logits, -1, keepdims=True)
    powers = tf.exp(at(logits, tokens) - most)  # (B, K)
    reached = tf.cumsum(powers / tf.reduce_sum(tf.exp(logits - most), -1, keepdims=True), -1)

    def of_few() -> tf.Tensor:
        last = tf.math.count_nonzero(reached < p, -1, keepdims=True, dtype=tf.int32)  # the place of what reaches p
        token = at(tokens, tf.minimum(last, sizes(tokens)[1] - 1))  # where p is 1 nothing need reach it
        least = at(logits, token)
        gone = (logits < least) | ((logits == least) & (every(logits) > token))
        return without(logits, gone & (p < 1))

    def of_all() -> tf.Tensor:
        keys, probs = ordered(logits), tf.nn.softmax(logits)

        def mass(where: tf.Tensor) -> tf.Tensor:
            return tf.reduce_sum(tf.where(where, probs, 0), -1, keepdims=True)

        last = greatest(keys, lambda key: mass(keys >= key) >= p)  # what reaches p
        tied = keys == last
        before = mass(keys > last) + tf.cumsum(tf.where(tied, probs, 0), axis=-1, exclusive=True)
        return without(logits, ((keys < last) | (tied & (before >= p))) & (p < 1))

    return tf.cond(tf.reduce_all((reached[:, -1:] >= p) | (p >= 1)), of_few, of_all)


def keep_min_p(logits: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
    """Keep what is at least p times as likely as the likeliest token."""
    least = tf.reduce_max(logits, -1, keepdims=True) + tf.cast(tf.math.log(p), logits.dtype)
    return without(logits, logits < least)


def keep_typical(logits: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach probability p; and ties.

    All where p is 1.
    """
    surprise, p = -tf.nn.log_softmax(logits), tf.cast(p, logits.dtype)
    probs = tf.exp(-surprise)
    entropy = tf.reduce_sum(tf.math.multiply_no_nan(surprise, probs), -1, keepdims=True)
    nearness = ordered(-tf.abs(surprise - entropy))
    last = greatest(nearness, lambda key: tf.reduce_sum(tf.where(nearness >= key, probs, 0), -1, keepdims=True) >= p)
    return without(logits, (nearness < last) & (p < 1))


def guide(logits: tf.Tensor, others: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Log-probabilities led away from those without the prompt, all (B, V) (Sanchez et al. 2023, equation 7)."""
    given, without = tf.nn.log_softmax(logits), tf.nn.log_softmax(others)
    return without + tf.cast(scale, logits.dtype) * (given - without)


def ordered(logits: tf.Tensor) -> tf.Tensor:
    """Unsigned integers in the order of these floats: the bits, all flipped where the sign is set, else the sign."""
    kind = tf.uint64 if logits.dtype == tf.float64 else tf.uint32
    zeros_as_one = tf.where(logits != 0, logits, 0)  # + 0 would be folded away
    bits = tf.bitcast(zeros_as_one, kind)
    sign = tf.constant(1 << kind.size * 8 - 1, kind)
    return tf.where(bits >= sign, ~bits, bits | sign)


def greatest(keys: tf.Tensor, holds: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """The greatest key of each row for which a condition holds that holds for all lower ones, bit by bit: (B, 1).

    It needs no sort, which XLA does by one comparison after the other.
    """
    width, one = keys.dtype.size * 8, tf.constant(1, keys.dtype)

    def lower(bit: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tried = found | tf.bitwise.left_shift(one, tf.cast(bit, keys.dtype))
        return bit - 1, tf.where(holds(tried), tried, found)

    start = tf.zeros((sizes(keys)[0], 1), keys.dtype)
    return tf.while_loop(lambda bit, _: bit >= 0, lower, (tf.constant(width - 1), start))[1]


def sample(kept: Kept, streams: tf.Tensor, step: tf.Tensor, do_sample: tf.Tensor | bool = True) -> tf.Tensor:
    """Draw from the softmax of logits by Gumbel noise (Maddison et al. 2014): (B,)

    Where all but a few tokens are ruled out, there is no noise for them, nor in a row that is not sampled.
    """
    logits, tokens = kept

    def among(logits: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
        noise = tf.where(do_sample, gumbel(streams, step, tokens, logits.dtype), 0)
        return likeliest(logits + noise, tokens)

    def count(logits: tf.Tensor) -> tf.Tensor:
        return tf.math.count_nonzero(logits > -float("inf"), -1, keepdims=True, dtype=tf.int32)

    values = at(logits, tokens)
    are_all = tf.reduce_all((count(logits) == count(values)) | tf.logical_not(do_sample))
    return tf.cond(are_all, lambda: among(values, tokens), lambda: among(logits, every(logits)))


def at(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """What stands at these places of each row: (B, V), (B, K) -> (B, K)"""
    return tf.gather(x, index, batch_dims=1)


def every(logits: tf.Tensor) -> tf.Tensor:
    """The tokens of the vocabulary: (B, V) -> (V,)"""
    return tf.range(sizes(logits)[1])


def few(logits: tf.Tensor) -> int:
    """How many tokens of (B, V) logits are put in order."""
    return min(FEW, sizes(logits)[1])


def first_few(logits: tf.Tensor) -> tf.Tensor:
    """The tokens of the greatest logits of each row, in order, of equal ones the lower first: (B, V) -> (B, K)"""
    zeros_as_one = tf.where(logits != 0, logits, 0)  # XLA puts -0 after 0
    return tf.math.top_k(zeros_as_one, few(logits)).indices


def gumbel(streams: tf.Tensor, step: tf.Tensor, tokens: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The Gumbel noise of these tokens, (K,) or (B, K), at a step, () or (B, 1), for rows of streams (B, 2): (B, K)"""
    low, high = tf.unstack(streams[:, None], axis=-1)
    x0, _ = threefry2x32((low, high), (tf.cast(step, tf.uint32), tf.cast(tokens, tf.uint32)))
    uniform = (tf.cast(tf.bitwise.right_shift(x0, tf.constant(9, tf.uint32)), dtype) + 0.5) * 2.0**-23
    return -tf.math.log(-tf.math.log(uniform))


def threefry2x32(
    keys: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """`rules.threefry2x32` on uint32 tensors, which wrap around.

    The groups of rounds are a loop: XLA compiles all twenty rounds as one expression, and does not come to an end on a
    CPU where there are as many words as a multiple of 8.
    """
    words = tf.stack([*keys, keys[0] ^ keys[1] ^ tf.constant(PARITY, tf.uint32)])
    shape = tf.broadcast_dynamic_shape(tf.shape(keys[0]), tf.shape(counter[1]))
    start = (tf.broadcast_to(word + key, shape) for word, key in zip(counter, keys, strict=True))
    _, x0, x1 = tf.while_loop(lambda group, *_: group < 5, partial(four_rounds, words), (tf.constant(0), *start))
    return x0, x1


def four_rounds(
    words: tf.Tensor, group: tf.Tensor, x0: tf.Tensor, x1: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A group of rounds and the words of the key, (3, ...), that follow it; the next group."""
    for rotation in tf.unstack(tf.gather(tf.constant(ROTATIONS, tf.uint32), group % 2)):
        x0 = x0 + x1
        x1 = x0 ^ (tf.bitwise.left_shift(x1, rotation) | tf.bitwise.right_shift(x1, 32 - rotation))
    group += 1
    return group, x0 + words[group % 3], x1 + words[(group + 1) % 3] + tf.cast(group, tf.uint32)
