"""The specification of generation: its noise, and its rules on logits, in NumPy; and of the order of training data.

Each backend carries these rules out on its own tensors and is held to the functions here. A sample is the argmax of
logits + Gumbel noise (Maddison et al. 2014), and the noise comes from a counter: threefry2x32 with 20 rounds (Salmon
et al. 2011) under the key `seed + row` at (step, token). It needs no state, is the same in every framework, and a row's
text depends neither on the other rows nor on how they are batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.generation.config import Bias, GenerationConfig

Array = np.ndarray[Any, Any]
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
TURNS = [[(np.uint32(turn), np.uint32(32 - turn)) for turn in group] for group in ROTATIONS]
PARITY = 0x1BD11BDA


def bucket(length: int) -> int:
    """The length that is compiled for this one: a multiple of 16, and of a quarter of the power of two below it."""
    size = 1 << (length - 1).bit_length() - 3 if length > 64 else 16
    return max(-(-length // size), 1) * size


def window_start(length: int, n_positions: int) -> int:
    """Where the part of a text begins that a sliding window shows the model: 0, then half a context further each time.

    So the model reads the last n_positions tokens or fewer, but more than half as many, and what it reads depends on
    the length of the text alone.
    """
    half = max(n_positions // 2, 1)
    return max(-(-(length - n_positions) // half), 0) * half


def noise_streams(seed: int | Sequence[int], prompts: int, rows: int) -> list[int]:
    """The 64-bit stream of noise of each row: `rows` rows for each prompt, a seed for all of them or one per prompt."""
    if isinstance(seed, (list, tuple)):
        if len(seed) != prompts:
            raise InputError(f"seed: expected one number, or one for each of {prompts} prompts, found {len(seed)}")
        return [(start + row) % 2**64 for start in seed for row in range(rows)]
    return [(seed + row) % 2**64 for row in range(prompts * rows)]  # type: ignore[operator]


def phrase_table(biases: Sequence[Bias]) -> tuple[Array, Array]:
    """The phrases, (N, L) int32, filled up with -1 on the left, and their biases, (N,) float32.

    N and L are powers of two from 8 on, so that few shapes are compiled; what was added to N has bias 0.
    """
    sizes = len(biases), max([len(phrase) for phrase, _ in biases], default=0)
    count, longest = (1 << max(size - 1, 7).bit_length() for size in sizes)
    phrases, values = np.full((count, longest), -1, np.int32), np.zeros(count, np.float32)
    phrases[:, -1] = 0
    for row, (phrase, bias) in enumerate(biases):
        phrases[row, longest - len(phrase) :], values[row] = phrase, bias
    return phrases, values


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Array, Array]:
    """The 20-round threefry2x32 of Salmon et al. 2011: two 32-bit words from a two-word key and a two-word counter."""
    keys = [np.asarray(word, np.uint32) for word in (key[0], key[1], key[0] ^ key[1] ^ PARITY)]
    with np.errstate(over="ignore"):
        words = [np.asarray(word, np.uint32) + keys[i] for i, word in enumerate(counter)]
        x0, x1 = (np.array(word) for word in np.broadcast_arrays(*words))
        left = np.empty_like(x1)
        for group in range(5):
            for rotation, rest in TURNS[group % 2]:  # in place: they are a hundred passes over the numbers
                np.add(x0, x1, out=x0)
                np.left_shift(x1, rotation, out=left)
                np.right_shift(x1, rest, out=x1)
                np.bitwise_or(x1, left, out=x1)
                np.bitwise_xor(x1, x0, out=x1)
            x0 += keys[(group + 1) % 3]
            x1 += keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def uniform(seed: int, row: int, step: int, tokens: Array) -> Array:
    """The uniform numbers of one row's step, for these token ids: float64 in (0, 1), exact in float32 too."""
    stream = (seed + row) % 2**64
    x0, _ = threefry2x32((stream & 0xFFFFFFFF, stream >> 32), (np.uint32(step), tokens))
    return np.asarray(((x0 >> np.uint32(9)) + 0.5) * 2.0**-23)


def gumbel(seed: int, row: int, step: int, tokens: Array) -> Array:
    """Gumbel noise: argmax(logits + noise) is a sample of softmax(logits)."""
    return np.asarray(-np.log(-np.log(uniform(seed, row, step, tokens))))


def add_biases(logits: Array, ids: Array, biases: Sequence[Bias]) -> Array:
    """Add to the last id of each phrase that a row's unmasked ids have begun: (V,) logits, (T,) ids."""
    out = logits.copy()
    for phrase, bias in biases:
        if tuple(ids[len(ids) - len(phrase) + 1 :] if len(phrase) > 1 else ()) == phrase[:-1]:
            out[phrase[-1]] += bias
    return out


def discourage(logits: Array, made: Array, presence: float, frequency: float) -> Array:
    """Take from the logit of each token that was made `presence`, and `frequency` as often as it was: (V,), (N,) ids.

    As OpenAI's API has it; before all other rules.
    """
    counts = np.bincount(made, minlength=len(logits))
    return np.asarray(logits - frequency * counts - presence * (counts > 0))


def penalise(logits: Array, ids: Array, penalty: float) -> Array:
    """Make each distinct id of a row less likely (Keskar et al. 2019, section 4.1): (V,) logits, (T,) unmasked ids."""
    out, seen = logits.copy(), np.unique(ids)
    out[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return out


def ban_repeats(logits: Array, ids: Array, size: int) -> Array:
    """Rule out every token that would repeat an n-gram of the row's unmasked ids: (V,) logits, (T,) ids."""
    out, prefix = logits.copy(), tuple(ids[len(ids) - size + 1 :])
    for start in range(len(ids) - size + 1):
        if tuple(ids[start : start + size - 1]) == prefix:
            out[ids[start + size - 1]] = -np.inf
    return out


def keep_top_k(logits: Array, k: int) -> Array:
    """Keep the k greatest logits, and what ties with the k-th."""
    k = min(k, logits.shape[-1])
    return np.where(logits < np.sort(logits, axis=-1)[..., -k, None], -np.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """Keep the fewest most likely tokens that reach probability p (Holtzman et al. 2020), at least one; low ids."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    probs = np.exp(np.take_along_axis(logits, order, -1) - logits.max(-1, keepdims=True))
    probs = probs / probs.sum(-1, keepdims=True)
    dropped = np.zeros(logits.shape, bool)
    np.put_along_axis(dropped, order, np.cumsum(probs, -1) - probs >= p, -1)
    return np.where(dropped, -np.inf, logits)


def keep_min_p(logits: Array, p: float) -> Array:
    """Keep what is at least p times as likely as the likeliest token (Nguyen et al. 2024)."""
    return np.where(logits < logits.max(-1, keepdims=True) + np.log(p), -np.inf, logits)


def keep_typical(logits: Array, p: float) -> Array:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach probability p, and what ties with the
    last (Meister et al. 2022, section 4)."""
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs = probs / probs.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        surprise = -np.log(probs)
    entropy = np.where(probs > 0, probs * np.where(probs > 0, surprise, 0), 0).sum(-1, keepdims=True)
    distance = np.abs(surprise - entropy)
    order = np.argsort(distance, axis=-1, kind="stable")
    reached = np.cumsum(np.take_along_axis(probs, order, -1), -1) < p
    last = np.minimum(reached.sum(-1, keepdims=True), logits.shape[-1] - 1)
    farthest = np.take_along_axis(np.take_along_axis(distance, order, -1), last, -1)
    return np.where(distance > farthest, -np.inf, logits)


def guide(logits: Array, others: Array, scale: float) -> Array:
    """Log-probabilities led away from those without the prompt, all (..., V) (Sanchez et al. 2023, equation 7)."""
    given, without = (x - x.max(-1, keepdims=True) for x in (logits, others))
    given, without = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (given, without))
    return np.asarray(without + scale * (given - without))


def process(
    logits: Array, ids: Array, made: int, config: GenerationConfig, own: Callable[[Array, Array], Array] | None = None
) -> Array:
    """All rules of a step on a row: (V,) logits after (T,) unmasked ids, of which the last `made` are new.

    own: the caller's rules, from ids and logits.
    """
    logits = add_biases(logits, ids, config.biases)
    logits = penalise(logits, ids, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        logits = ban_repeats(logits, ids, config.no_repeat_ngram_size)
    if len(ids) < config.min_length or made < (config.min_new_tokens or 0):
        logits = logits.copy()
        logits[[end for end in config.eos_token_ids if end < len(logits)]] = -np.inf
    if own is not None:
        logits = own(ids, logits)
    return warp(logits, config) if config.do_sample else logits


def warp(logits: Array, config: GenerationConfig) -> Array:
    """The rules for sampling: temperature, then which tokens are kept, of which there are `least_kept` at least."""
    logits = kept = logits / config.temperature
    if config.top_k:
        kept = keep_top_k(kept, max(config.top_k, config.least_kept))
    if config.top_p < 1:
        kept = keep_top_p(kept, config.top_p)
    if config.min_p:
        kept = keep_min_p(kept, config.min_p)
    if (config.typical_p or 1) < 1:
        kept = keep_typical(kept, config.typical_p or 1)
    if config.least_kept == 1:
        return kept
    return np.where(np.isfinite(keep_top_k(logits, config.least_kept)), logits, kept)


# --- the order of a training run's data -------------------------------------------------------------------------------

ROUNDS = 8  # of the network; twice what makes it look random to whoever sees a part of it


def batches_per_epoch(tokens: int, length: int, batch_size: int) -> int:
    """How many whole batches there are of the windows that every cut of the tokens has; InputError if there is none."""
    if (count := (tokens // length - 1) // batch_size) < 1:
        raise InputError(
            f"ids: expected at least {(batch_size + 1) * length}, a batch of {batch_size} windows of {length} and "
            f"one to spare, found {tokens}; give a longer text, shorter windows or a smaller batch"
        )
    return count


def window_starts(tokens: int, length: int, batch_size: int, seed: int, step: int) -> Array:
    """Where in the tokens the windows of a step's batch begin, (B,): this follows from the step and the seed alone.

    Each epoch cuts the tokens elsewhere, and takes its windows once, but for those that fill no whole batch.
    """
    epoch, number = divmod(step, batches_per_epoch(tokens, length, batch_size))
    places = number * batch_size + np.arange(batch_size)
    offset = int(_words(seed, epoch, ROUNDS, np.zeros(1, np.int64))[0]) % length
    return offset + length * shuffled(places, tokens // length - 1, seed, epoch)


def shuffled(numbers: Array, count: int, seed: int, epoch: int) -> Array:
    """Where a permutation of the numbers below `count` takes these, in int64; each seed and epoch has one of its own.

    It needs no memory: the numbers go through a Feistel network of threefry, and what leaves it beyond the count goes
    through it again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    sides = (side := math.isqrt(count - 1) + 1), -(-count // side)
    found = _network(np.asarray(numbers, np.int64), sides, seed, epoch)
    while (beyond := found >= count).any():
        found[beyond] = _network(found[beyond], sides, seed, epoch)
    return found


def _network(numbers: Array, sides: tuple[int, int], seed: int, epoch: int) -> Array:
    """A permutation of the numbers below the product of the sides, as which they are divided into two."""
    left, right = np.divmod(numbers, sides[1])
    for step in range(0, ROUNDS, 2):
        left = (left + _words(seed, epoch, step, right)) % sides[0]
        right = (right + _words(seed, epoch, step + 1, left)) % sides[1]
    return np.asarray(left * sides[1] + right)


def _words(seed: int, epoch: int, step: int, numbers: Array) -> Array:
    """32 random bits for each number in a step of an epoch, in int64."""
    key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return threefry2x32(key, (np.uint32((epoch * 16 + step) & 0xFFFFFFFF), numbers))[0].astype(np.int64)
