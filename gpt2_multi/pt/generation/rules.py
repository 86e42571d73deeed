"""The rules that turn logits into the next token, in PyTorch: those of `gpt2_multi.generation.rules`, on batches.

B rows, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2_multi.generation.config import Bias, GenerationConfig
from gpt2_multi.generation.rules import PARITY, ROTATIONS
from gpt2_multi.generation.stopping import FOUND


class Rules:
    """What each row has said so far, and the rules that turn its logits into its next token."""

    def __init__(
        self, config: GenerationConfig, ids: Tensor, mask: Tensor, new: int, table: Tensor, keys: tuple[Tensor, Tensor]
    ) -> None:
        """ids, mask: (B, T), the prompts. table: (S, V) of the stop strings. keys: (B, 1) each, of the noise."""
        (batch, self.length), vocab_size = ids.shape, table.shape[1]
        self.config, self.table, self.keys = config, table, keys
        self.ids = torch.cat([ids, ids.new_zeros(batch, new)], 1)
        self.mask = torch.cat([mask, mask.new_ones(batch, new)], 1)
        self.finished = mask.new_zeros(batch)
        self.state = ids.new_zeros(batch)  # of the stop strings
        self.ends = ids.new_tensor([end for end in config.eos_token_ids if end < vocab_size])
        self.seen = mask.new_zeros(batch, vocab_size)
        self.biases = config.biases
        if config.repetition_penalty != 1:
            self.seen[mask.nonzero()[:, 0], ids[mask]] = True

    def process(self, logits: Tensor, step: int) -> Tensor:
        """What the next token is chosen by, from the model's logits, or a beam's log-probabilities: (B, V) -> (B, V)"""
        config, length = self.config, self.length + step
        ids, mask = self.ids[:, :length], self.mask[:, :length]
        if self.biases:
            logits = add_biases(logits, ids, mask, self.biases)
        if config.repetition_penalty != 1:
            logits = penalise(logits, self.seen, config.repetition_penalty)
        if config.no_repeat_ngram_size:
            logits = ban_repeats(logits, ids, mask, config.no_repeat_ngram_size)
        if step < config.longest_minimum():
            logits = self._without_ends(logits, mask, step)
        return warp(logits, config) if config.do_sample else logits

    def _without_ends(self, logits: Tensor, mask: Tensor, step: int) -> Tensor:
        """No end token where a row is too short; its own tokens count, not its padding."""
        short = (mask.sum(-1, keepdim=True) < self.config.min_length) | (step < (self.config.min_new_tokens or 0))
        return torch.where(short, logits.index_fill(1, self.ends, -torch.inf), logits)

    def choose(self, processed: Tensor, step: int) -> Tensor:
        """The next token of each row, (B,)"""
        return sample(processed, self.keys, step) if self.config.do_sample else processed.argmax(-1)

    def accept(self, chosen: Tensor, step: int) -> Tensor:
        """Note the tokens of a step; what the caller sees of a finished row is filling: (B,) -> (B,)"""
        shown = chosen.masked_fill(self.finished, self.config.fill_token_id)
        over, self.state = self.over(chosen, self.state)
        self.finished |= over
        self.ids[:, self.length + step] = chosen
        if self.config.repetition_penalty != 1:
            self.seen.scatter_(1, chosen[:, None], True)
        return shown

    def over(self, chosen: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens end their rows, and the states of the stop strings after them; all of one shape."""
        state = self.table[state, chosen].long()
        return torch.isin(chosen, self.ends) | (state == FOUND), state.clamp(min=0)

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows, (B,), some of them several times."""
        self.ids, self.state, self.seen = self.ids[rows], self.state[rows], self.seen[rows]

    def row(self, row: int, new: int) -> Rules:
        """The same for one row alone, without padding, before anything was said."""
        ids, mask = self.ids[row : row + 1, : self.length], self.mask[row : row + 1, : self.length]
        keys = (self.keys[0][row : row + 1], self.keys[1][row : row + 1])
        return Rules(self.config, ids[:, mask[0]], mask[:, mask[0]], new, self.table, keys)

    def all_finished(self) -> bool:
        """Whether no row goes on."""
        return bool(self.finished.all())


def add_biases(logits: Tensor, ids: Tensor, mask: Tensor, biases: Sequence[Bias]) -> Tensor:
    """Add to the last id of each phrase that a row's ids (B, T) have begun; mask: (B, T), which of them count."""
    logits = logits.clone()
    for phrase, bias in biases:
        begun = len(phrase) - 1
        if begun > ids.shape[1]:
            continue
        same = ids[:, ids.shape[1] - begun :] == ids.new_tensor(phrase[:-1])
        matches = (same & mask[:, ids.shape[1] - begun :]).all(-1)  # (B,)
        logits[:, phrase[-1]] += torch.where(matches, bias, 0.0).to(logits.dtype)
    return logits


def warp(logits: Tensor, config: GenerationConfig) -> Tensor:
    """The rules for sampling: temperature, then which tokens are kept, of which there are `least_kept` at least."""
    logits = kept = logits / config.temperature
    if config.top_k:
        kept = keep_top_k(kept, max(config.top_k, config.least_kept))
    if config.top_p < 1:
        kept = keep_top_p(kept, config.top_p)
    if config.min_p:
        kept = keep_min_p(kept, config.min_p)
    if config.least_kept == 1:
        return kept
    return torch.where(keep_top_k(logits, config.least_kept) > -torch.inf, logits, kept)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make each token that a row has seen (B, V) less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeats(logits: Tensor, ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """Rule out every token that would repeat an n-gram of its row's ids (B, T); windows over padding do not count."""
    if ids.shape[1] < size:
        return logits
    windows = ids.unfold(1, size, 1)  # (B, windows, size)
    prefix = ids[:, None, ids.shape[1] - size + 1 :]
    repeated = (windows[..., :-1] == prefix).all(-1) & mask.unfold(1, size, 1).all(-1)
    row, window = repeated.nonzero(as_tuple=True)
    logits = logits.clone()
    logits[row, windows[row, window, -1]] = -torch.inf
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k greatest logits, and what ties with the k-th."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probability reaches p, at least one; lower ids first."""
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    probs = ordered.softmax(-1)
    dropped = probs.cumsum(-1) - probs >= p
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep what is at least p times as likely as the likeliest token."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def sample(logits: Tensor, keys: tuple[Tensor, Tensor], step: int) -> Tensor:
    """Draw from softmax(logits) by Gumbel noise, which is computed for the kept tokens alone: (B, V) -> (B,)

    Where nothing is left, id 0 follows.
    """
    kept = max(int((logits > -torch.inf).sum(-1).max()), 1) if len(logits) else 1
    if kept == logits.shape[-1]:
        tokens = torch.arange(kept, device=logits.device).expand_as(logits)
    else:
        tokens = logits.topk(kept, sorted=False).indices.sort(-1).values  # (B, K), so that ties go to the lowest id
    scores = logits.gather(-1, tokens) + gumbel(keys, step, tokens, logits.dtype)
    best, place = scores.max(-1, keepdim=True)
    return tokens.gather(-1, place).masked_fill(best == -torch.inf, 0).squeeze(-1)


def stream_keys(streams: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The two key words of each row's noise, from `sampling.streams`, as (B, 1) int32."""
    low, high = ([_signed(s >> shift & 0xFFFFFFFF) for s in streams] for shift in (0, 32))
    return tuple(torch.tensor(words, dtype=torch.int32, device=device)[:, None] for words in (low, high))  # type: ignore[return-value]


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def threefry2x32(keys: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`sampling.threefry2x32` on int32 tensors, whose additions wrap around as 32-bit words do."""
    words = (keys[0], keys[1], keys[0] ^ keys[1] ^ PARITY)
    x0, x1 = counter[0] + words[0], counter[1] + words[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << rotation | x1 >> (32 - rotation) & (1 << rotation) - 1)
        x0 = x0 + words[(group + 1) % 3]
        x1 = x1 + words[(group + 2) % 3] + (group + 1)
    return x0, x1


def gumbel(keys: tuple[Tensor, Tensor], step: int, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The Gumbel noise of these tokens (B, K) at a step: (B, K)"""
    x0, _ = threefry2x32(keys, (torch.full_like(keys[0], step), tokens.to(torch.int32)))
    uniform = ((x0 >> 9 & 0x7FFFFF).to(dtype) + 0.5) * 2.0**-23
    return -(-uniform.log()).log()
