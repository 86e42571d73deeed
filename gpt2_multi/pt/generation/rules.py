"""The rules that turn logits into the next token, in PyTorch: those of `gpt2_multi.generation.rules`, on batches.

Options are Python's numbers, so that what is off costs nothing, or (R, 1) where rows have their own. R rows, T ids of
each so far, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_multi.generation import rules as numpy_rules
from gpt2_multi.generation.options import PER_ROW, TABLES, Options
from gpt2_multi.generation.rules import PARITY, ROTATIONS
from gpt2_multi.generation.stopping import FOUND
from gpt2_multi.pt.layers import is_at_hand, to_numpy

FEW = 128  # tokens, among which those are that top-p and min-p keep, where they keep few


class Kept(NamedTuple):
    """What a token is chosen among, in the order of ids: which tokens, and their logits, -inf where ruled out."""

    logits: Tensor  # (R, V), or (R, K)
    tokens: Tensor | None = None  # (R, K), beside which all are ruled out; None where all of the vocabulary are there

    def whole(self, vocab_size: int) -> Tensor:
        """The logits of all tokens, (R, V)."""
        if self.tokens is None:
            return self.logits
        none = self.logits.new_full((len(self.logits), vocab_size), -torch.inf)
        return none.scatter_(1, self.tokens, self.logits)


def as_tensors(options: Options, device: torch.device, dtype: torch.dtype = torch.float32) -> Options:
    """Options with tensors for arrays, without what fills these up; `stops` is None where no token begins any.

    dtype: of numbers that rows have of their own.
    """
    options = agreed(options) if options.ends.ndim == 2 else options
    numbers = {name: x for name in PER_ROW if isinstance(x := getattr(options, name), np.ndarray)}
    vocab_size, there = options.stops.shape[1], options.biases != 0
    there = there.any(0) if there.ndim == 2 else there
    ends = np.where((options.ends >= 0) & (options.ends < vocab_size), options.ends, vocab_size)
    phrases = options.phrases[..., there, :]
    arrays = numbers | {
        "ends": (ends if ends.ndim == 2 else ends[ends < vocab_size]).astype(np.int64),
        "phrases": phrases[..., (phrases >= 0).reshape(-1, phrases.shape[-1]).any(0)].astype(np.int64),
        "biases": options.biases[..., there],
        "streams": options.streams.view(np.int32),
    }
    tensors = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}
    tensors |= {name: tensors[name].to(dtype) for name, x in numbers.items() if x.dtype == np.float64}
    return options._replace(
        stops=torch.from_numpy(options.stops).to(device) if options.stops[0].any() else None, **tensors
    )


def agreed(options: Options) -> Options:
    """Options of rows, with one number or table where all have the same; else what is off keeps every token."""
    found = {name: getattr(options, name) for name in (*PER_ROW, *TABLES)}
    off = {"top_k": (found["top_k"] > 0, options.stops.shape[1]), "top_p": (found["top_p"] < 1, 2)}
    off["typical_p"] = (found["typical_p"] < 1, 2)  # as sums of probabilities may be 1 too early
    kept = {name: np.where(is_there, found[name], whole) for name, (is_there, whole) in off.items()}
    same = {name: x[0] for name, x in found.items() if (x == x[:1]).all()}
    numbers = {name: x.item() for name, x in same.items() if name in PER_ROW}
    return options._replace(**(kept | same | numbers))


def process(
    logits: Tensor,
    ids: Tensor,
    keep: Tensor,
    step: int | Tensor,
    options: Options,
    own: Callable[[Tensor], Tensor] | None = None,
) -> Kept:
    """What the next token is chosen among, from the model's logits, or a beam's log-probabilities, (R, V).

    ids: (R, T), of which those count that `keep` (R, T) marks. step: how many tokens were made, a number or
    (1,), or (R, 1). own: the caller's.
    """
    if is_on(options.presence, 0) or is_on(options.frequency, 0):
        logits = discourage(logits, ids, keep, step, options.presence, options.frequency)
    if len(options.phrases):
        logits = add_biases(logits, ids, keep, options.phrases, options.biases)
    if is_on(options.repetition_penalty, 1):
        logits = penalise(logits, ids, keep, options.repetition_penalty)
    if is_on(options.no_repeat_ngram_size, 0):
        logits = ban_repeats(logits, ids, keep, options.no_repeat_ngram_size)
    least = [option for option in (options.min_length, options.min_new_tokens) if is_on(option, 0)]
    if least and (isinstance(step, Tensor) or step < max(least)):
        short = (keep.sum(-1, keepdim=True) < options.min_length) | (step < options.min_new_tokens)
        logits = without(logits, short & is_end(logits, options))
    if own is not None:
        logits = own(logits)
    return warp(logits, options) if is_on(options.do_sample, False) else Kept(logits)


def choose(processed: Kept, step: int | Tensor, options: Options) -> Tensor:
    """The next token of each row, (R,)."""
    if not is_on(options.do_sample, False):
        return processed.logits.argmax(-1)
    drawn = sample(processed, options.streams, step)
    if not isinstance(options.do_sample, Tensor):
        return drawn
    best = processed.logits.argmax(-1, keepdim=True)
    best = best if processed.tokens is None else processed.tokens.gather(-1, best)
    return torch.where(options.do_sample, drawn[:, None], best).squeeze(-1)


def ends(chosen: Tensor, stop: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Which tokens end their rows, and the states of the stop strings after them; all of one shape."""
    ended = (chosen[..., None] == options.ends).any(-1)
    if options.stops is None:
        return ended, stop
    stop = options.stops[stop, chosen].long()
    return ended | (stop == FOUND), stop.clamp(min=0)


def is_on(option: Any, off: Any) -> bool:
    """Whether an option does anything, as one does that rows have of their own."""
    return isinstance(option, Tensor) or option != off


def without(logits: Tensor, gone: Tensor) -> Tensor:
    """The logits with some tokens ruled out."""
    return logits.masked_fill(gone, -torch.inf)


def is_end(logits: Tensor, options: Options) -> Tensor:
    """Which ids of the vocabulary are end tokens, (V,), or of each row, (R, V)."""
    rows, vocab_size = logits.shape
    if options.ends.dim() == 1:
        return logits.new_zeros(vocab_size, dtype=torch.bool).index_fill(0, options.ends, True)
    return options.ends.new_zeros(rows, vocab_size + 1, dtype=torch.bool).scatter_(1, options.ends, True)[:, :-1]


def add_biases(logits: Tensor, ids: Tensor, keep: Tensor, phrases: Tensor, biases: Tensor) -> Tensor:
    """Add to the last id of each phrase (P, L), whose others a row's ids (R, T) end with; padding begins none.

    Rows may have phrases (R, P, L) of their own.
    """
    back = phrases.shape[-1] - 1
    ids, keep = (F.pad(x, (back, 0))[:, x.shape[1] :] for x in (ids, keep))  # (R, back), the last ones
    same = (ids[:, None] == phrases[..., :-1]) & keep[:, None]  # (R, P, back)
    begun = (same | (phrases[..., :-1] < 0)).all(-1)
    added = torch.where(begun, biases.to(logits.dtype), 0)
    return logits.scatter_add(1, phrases[..., -1].expand_as(added), added)


def discourage(
    logits: Tensor, ids: Tensor, keep: Tensor, step: int | Tensor, presence: float | Tensor, frequency: float | Tensor
) -> Tensor:
    """Make each token less likely that was made, as the last `step` of a row's ids (R, T) were."""
    rows, vocab_size = logits.shape
    made = keep & (torch.arange(ids.shape[1], 0, -1, device=ids.device) <= step)
    counts = logits.new_zeros(rows, vocab_size + 1)
    counts.scatter_add_(1, ids.masked_fill(~made, vocab_size), made.to(logits.dtype))
    counts = counts[:, :vocab_size]
    return logits - frequency * counts - presence * (counts > 0)


def mark(logits: Tensor, ids: Tensor, marked: Tensor) -> Tensor:
    """Which tokens (R, V) are marked somewhere in a row: ids (R, T), marked (R, T) -> booleans."""
    rows, vocab_size = logits.shape
    found = marked.new_zeros(rows, vocab_size + 1)
    return found.scatter_(1, ids.masked_fill(~marked, vocab_size), True)[:, :vocab_size]


def penalise(logits: Tensor, ids: Tensor, keep: Tensor, penalty: float | Tensor) -> Tensor:
    """Make each token that a row has seen less likely (Keskar et al. 2019, section 4.1)."""
    return torch.where(mark(logits, ids, keep), torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeats(logits: Tensor, ids: Tensor, keep: Tensor, size: int | Tensor) -> Tensor:
    """Rule out every token that would repeat an n-gram of its row's ids (R, T); windows over padding do not count."""
    if isinstance(size, Tensor):
        for one in torch.unique(size[size > 0]).tolist():
            logits = torch.where(size == one, ban_repeats(logits, ids, keep, one), logits)
        return logits
    if ids.shape[1] < size:
        return logits
    windows = ids.unfold(1, size, 1)  # (R, windows, size)
    prefix = ids[:, None, ids.shape[1] - size + 1 :]
    repeats = (windows[..., :-1] == prefix).all(-1) & keep.unfold(1, size, 1).all(-1)
    return without(logits, mark(logits, windows[..., -1], repeats))


def warp(logits: Tensor, options: Options) -> Kept:
    """The rules for sampling: temperature, then which tokens are kept, of which there are `least_kept` at least.

    A CPU looks at those alone that may be kept, where they are few.
    """
    logits = logits / options.temperature if is_on(options.temperature, 1) else logits
    if is_at_hand(logits) and is_narrow(options, *logits.shape) and (found := shortlist(logits, options)):
        return found
    top_k, tokens = options.top_k, None
    if isinstance(top_k, int) and top_k:
        top_k = max(top_k, options.least_kept)
    if is_on(top_k, 0) and is_at_hand(logits) and len(logits):
        tokens = likeliest(logits, greatest(top_k))
        logits = logits.gather(1, tokens)
    kept = logits
    if is_on(top_k, 0):
        kept = keep_top_k(kept, top_k)
    if is_on(options.top_p, 1):
        kept = keep_top_p(kept, options.top_p)
    if is_on(options.min_p, 0):
        kept = keep_min_p(kept, options.min_p)
    if is_on(options.typical_p, 1):
        kept = keep_typical(kept, options.typical_p)
    return Kept(
        kept if options.least_kept == 1 else torch.maximum(keep_top_k(logits, options.least_kept), kept), tokens
    )


def is_narrow(options: Options, rows: int, vocab_size: int) -> bool:
    """Whether rows may keep few tokens, of those first in the order of logits, without one number for how many."""
    is_one = isinstance(options.top_k, int) and options.top_k
    is_any = is_on(options.top_k, 0) or is_on(options.top_p, 1) or is_on(options.min_p, 0)
    is_plain = options.least_kept == 1 and not is_on(options.typical_p, 1)
    return bool(is_any and is_plain and not is_one and rows and vocab_size > 2 * FEW)


def shortlist(logits: Tensor, options: Options) -> Kept | None:
    """What top-k, top-p and min-p keep, the likeliest first; None where that is more than `FEW`, or has equals.

    In NumPy, whose calls cost less where there is little to do.
    """
    found, tokens = logits.topk(FEW)
    best = to_numpy(found)
    if (best[:, 1:] == best[:, :-1]).any():
        return None
    top_k, top_p, min_p = (as_numpy(option) for option in (options.top_k, options.top_p, options.min_p))
    keep = best > -np.inf
    if is_on(options.top_k, 0):
        keep &= np.arange(FEW) < top_k
    if is_on(options.top_p, 1):
        probs = np.exp(best - to_numpy(logits.logsumexp(-1, keepdim=True)))
        share = np.where(keep[:, -1:], 1, (probs * keep).sum(-1, keepdims=True))  # of what top-k leaves
        keep &= probs.cumsum(-1) - probs < top_p * share
    if is_on(options.min_p, 0):
        with np.errstate(divide="ignore"):  # where it is off
            keep &= best >= best[:, :1] + np.log(min_p, dtype=best.dtype)
    count = int(keep.sum(-1).max())
    if count == FEW:
        return None
    return Kept(torch.from_numpy(np.where(keep, best, -np.inf)[:, :count]), tokens[:, :count])


def as_numpy(option: Any) -> Any:
    """An option of rows as an array, or the number that it is."""
    return to_numpy(option) if isinstance(option, Tensor) else option


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The ids of the `count` greatest logits of each row on a CPU, of all that tie with the last: (R, V) -> (R, K)

    In their order, so that the lowest is the first of equals.
    """
    count = min(count, logits.shape[-1])
    values, index = logits.topk(min(count + 1, logits.shape[-1]))
    least = values[:, count - 1 : count]
    if bool(((values[:, count:] == least) & (least > -torch.inf)).any()):
        enough = int((logits >= least).sum(-1).max())
        return logits.topk(enough, sorted=False).indices.sort(-1).values
    return index[:, :count].sort(-1).values


def greatest(option: int | Tensor) -> int:
    """The greatest number that a row has."""
    return option if isinstance(option, int) else int(option.max())


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Keep the k greatest logits, and what ties with the k-th."""
    vocab_size = logits.shape[-1]
    best = logits.topk(min(greatest(k), vocab_size)).values
    least = best[..., -1:] if isinstance(k, int) else best.gather(-1, (k - 1).long().clamp(max=vocab_size - 1))
    return without(logits, logits < least)


def keep_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the fewest most likely tokens whose probability reaches p, at least one; lower ids first."""
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    probs = ordered.softmax(-1)
    dropped = probs.cumsum(-1) - probs >= p
    return without(logits, dropped.scatter(-1, order, dropped))


def keep_min_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep what is at least p times as likely as the likeliest token."""
    below = p.log() if isinstance(p, Tensor) else math.log(p)
    return without(logits, logits < logits.amax(-1, keepdim=True) + below)


def keep_typical(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach p, and what ties with the last."""
    surprise = -logits.log_softmax(-1)
    probs = (-surprise).exp()
    distance = (surprise - (probs * surprise.nan_to_num(posinf=0)).sum(-1, keepdim=True)).abs()
    ordered, order = distance.sort(stable=True, dim=-1)
    last = (probs.gather(-1, order).cumsum(-1) < p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return without(logits, distance > ordered.gather(-1, last))


def guide(logits: Tensor, others: Tensor, scale: float) -> Tensor:
    """Log-probabilities led away from those without the prompt: (R, V) each (Sanchez et al. 2023, equation 7)"""
    given, without_it = logits.log_softmax(-1), others.log_softmax(-1)
    return without_it + scale * (given - without_it)


def sample(kept: Kept, streams: Tensor, step: int | Tensor) -> Tensor:
    """Draw from the softmax of logits by Gumbel noise, which a CPU computes for the kept tokens alone: (R,)

    Where nothing is left, id 0 follows.
    """
    logits, tokens = kept
    if tokens is None and len(logits) and is_at_hand(logits):
        count = max(int((logits > -torch.inf).sum(-1).max()), 1)
        tokens = likeliest(logits, count) if count < logits.shape[-1] else None
        logits = logits if tokens is None else logits.gather(-1, tokens)
    if tokens is None:
        tokens = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    scores = logits + gumbel(streams, step, tokens, logits.dtype)
    best, place = scores.max(-1, keepdim=True)
    return tokens.gather(-1, place).masked_fill(best == -torch.inf, 0).squeeze(-1)


def gumbel(streams: Tensor, step: int | Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The Gumbel noise of these tokens (R, K) at a step, for rows with these streams (R, 2): (R, K)"""
    if is_at_hand(tokens):
        return torch.from_numpy(few_gumbel(streams, step, tokens, to_numpy(torch.empty(0, dtype=dtype)).dtype))
    low, high = streams[:, :1], streams[:, 1:]
    counter = (torch.zeros_like(low) + step).to(torch.int32), tokens.to(torch.int32)
    x0, _ = threefry2x32((low, high), counter)
    uniform = ((x0 >> 9 & 0x7FFFFF).to(dtype) + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def few_gumbel(streams: Tensor, step: int | Tensor, tokens: Tensor, dtype: Any) -> np.ndarray[Any, Any]:
    """The same in NumPy, which makes it of a few tokens sooner."""
    low, high = to_numpy(streams).view(np.uint32).T[..., None]  # (R, 1) each
    made = to_numpy(step).astype(np.uint32) if isinstance(step, Tensor) else np.uint32(step)
    x0, _ = numpy_rules.threefry2x32((low, high), (made, to_numpy(tokens).astype(np.uint32)))
    uniform = ((x0 >> np.uint32(9)).astype(dtype) + dtype.type(0.5)) * dtype.type(2.0**-23)
    return np.asarray(-np.log(-np.log(uniform)))


def threefry2x32(keys: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`rules.threefry2x32` on int32 tensors, whose additions wrap around as 32-bit words do."""
    words = (keys[0], keys[1], keys[0] ^ keys[1] ^ PARITY)
    x0, x1 = counter[0] + words[0], counter[1] + words[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << rotation | x1 >> (32 - rotation) & (1 << rotation) - 1)
        x0 = x0 + words[(group + 1) % 3]
        x1 = x1 + words[(group + 2) % 3] + (group + 1)
    return x0, x1
