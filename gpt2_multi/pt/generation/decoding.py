"""Decoding in PyTorch: a model that reads texts into a cache, and the loop that lets it choose token after token.

B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.rules import window_start
from gpt2_multi.pt.attention import Context, KVCache, causal_bias, key_bias, score_dtype
from gpt2_multi.pt.generation.rules import Rules
from gpt2_multi.pt.training import widened

if TYPE_CHECKING:
    from gpt2_multi.pt.heads import GPT2LMHeadModel


@dataclass
class Prompt:
    """Checked input of a generation, each row padded on the left."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), booleans
    states: Tensor | None  # (B, encoder length, E)
    states_mask: Tensor | None  # (B, encoder length)

    def repeated(self, rows: int) -> Prompt:
        """Each row so many times."""
        parts = (self.ids, self.mask, self.states, self.states_mask)
        return Prompt(*(None if x is None else x.repeat_interleave(rows, 0) for x in parts))  # type: ignore[arg-type]

    def row(self, row: int) -> Prompt:
        """One row without padding."""
        ids, mask, states, states_mask = (
            None if x is None else x[row : row + 1] for x in (self.ids, self.mask, self.states, self.states_mask)
        )
        return Prompt(ids[:, mask[0]], mask[:, mask[0]], states, states_mask)  # type: ignore[index]


class Step(NamedTuple):
    """One token of each row."""

    shown: Tensor  # (B,), filling where a row is finished
    records: dict[str, Tensor]  # what the options ask for: scores and logits (B, V), log_probs (B,)


class Reader:
    """A model that has read a batch of texts: its cache, and which of the keys count."""

    def __init__(self, model: GPT2LMHeadModel, prompt: Prompt, room: int, rows: int = 1) -> None:
        """room: how many tokens may follow. rows: in how many rows each text goes on, once it is read."""
        self.model, self.body, self.prompt, self.rows, self.room = model, model.transformer, prompt, rows, room
        batch, self.length = prompt.ids.shape
        self.counts = prompt.mask.sum(-1)  # (B,), the next token's position
        self.context = Context(eager=self.body.attn_implementation == "eager", states=prompt.states)
        self.context.cache = KVCache.empty(self.body, batch, self.length + (room if rows == 1 else 0))
        self.dtype = score_dtype(self.body.ln_f.weight.new_zeros(0, dtype=model.dtype))
        self.padded = not bool(prompt.mask.all())

    @property
    def cache(self) -> KVCache:
        """The keys and values so far."""
        assert self.context.cache is not None
        return self.context.cache

    def begin(self) -> Tensor:
        """Read the prompts: -> the logits of the next token, (B * rows, V)"""
        ids, mask = self.prompt.ids, self.prompt.mask
        if self.prompt.states is not None and self.prompt.states_mask is not None:
            self.context.states_bias = key_bias(self.prompt.states_mask, self.dtype)
        if self.padded:
            self.context.bias = causal_bias(self.length, self.length, mask, self.dtype, ids.device)
        x = self.body.embed(ids, (mask.cumsum(-1) - 1).clamp(min=0))
        logits = self.model.logits(self.body.run(x, self.context).last_hidden_state[:, -1])
        if self.rows > 1:
            self._spread()
        return logits.repeat_interleave(self.rows, 0)

    def _spread(self) -> None:
        """Go on with each text in several rows."""
        self.prompt, self.counts = self.prompt.repeated(self.rows), self.counts.repeat_interleave(self.rows)
        wide, read = KVCache.empty(self.body, len(self.counts), self.length + self.room), self.cache
        for pair, old_pair in zip(wide.layers, read.layers, strict=True):
            for buffer, old in zip(pair, old_pair, strict=True):
                buffer[:, :, : self.length] = old.repeat_interleave(self.rows, 0)
        wide.length = self.length
        wide.cross = [(k.repeat_interleave(self.rows, 0), v.repeat_interleave(self.rows, 0)) for k, v in read.cross]
        if self.context.states_bias is not None:
            self.context.states_bias = self.context.states_bias.repeat_interleave(self.rows, 0)
        self.context.cache = wide

    def follow(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, or in one row without padding several: (B, N) -> logits (B, N, V)"""
        past, length = self.cache.length, tokens.shape[1]
        self.context.bias = None
        if self.padded:
            later = self.prompt.mask.new_ones(len(tokens), past + length - self.length)
            self.context.bias = key_bias(torch.cat([self.prompt.mask, later], 1), self.dtype)
        elif length > 1:
            self.context.bias = causal_bias(length, past + length, None, self.dtype, tokens.device)
        places = torch.arange(past - self.length, past - self.length + length, device=tokens.device)
        x = self.body.embed(tokens, self.counts[:, None] + places)
        return self.model.logits(self.body.run(x, self.context).last_hidden_state)

    def reorder(self, rows: Tensor) -> None:
        """Go on with these rows, (B,), each of which shares its prompt with the one that it replaces."""
        made = slice(self.length, self.cache.length)
        for pair in self.cache.layers:
            for buffer in pair:
                buffer[:, :, made] = buffer[rows, :, made]

    def forget(self, tokens: int) -> None:
        """Forget the last tokens."""
        self.cache.length -= tokens

    @property
    def is_full(self) -> bool:
        """Whether a row's next token would have no position."""
        made = self.cache.length - self.length
        return int(self.counts.max()) + made >= self.body.wpe.num_embeddings


@torch.no_grad()
def decode(model: GPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, rules: Rules, new: int) -> Iterator[Step]:
    """Choose, yield and feed back one token per row and step."""
    if config.sliding_window:
        reader = slid(model, prompt.repeated(config.rows), rules, 0, new)
    else:
        reader = Reader(model, prompt, new, config.rows)
    logits = reader.begin()
    for step in range(new):
        processed = rules.process(widened(logits), step)
        chosen = rules.choose(processed, step)  # (B,)
        records = recorded(config, logits, processed, chosen, rules.finished)
        yield Step(rules.accept(chosen, step), records)
        if step + 1 == new or rules.all_finished():
            return
        if config.sliding_window and reader.is_full:
            reader = slid(model, reader.prompt, rules, step + 1, new)
            logits = reader.begin()
        else:
            logits = reader.follow(chosen[:, None])[:, -1]


def recorded(
    config: GenerationConfig, logits: Tensor, processed: Tensor, chosen: Tensor, finished: Tensor
) -> dict[str, Tensor]:
    """What the caller wants to know of a step; filling has the log-probability 0."""
    records = {"logits": logits, "scores": processed}
    kept = {name: records[name] for name in config.records if name in records}
    if "log_probs" in config.records:
        log_probs = processed.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
        kept["log_probs"] = log_probs.masked_fill(finished, 0)
    return kept


def slid(model: GPT2LMHeadModel, prompt: Prompt, rules: Rules, step: int, new: int) -> Reader:
    """A reader of what the window shows of each row after so many steps; see `sampling.window_start`."""
    longest, length = model.transformer.wpe.num_embeddings, rules.length + step
    ids, mask = rules.ids[:, :length], rules.mask[:, :length]
    counts = mask.cumsum(-1)  # (B, T)
    starts = [window_start(int(count), longest) for count in counts[:, -1]]
    ids, mask = aligned(ids, mask & (counts > ids.new_tensor(starts)[:, None]))
    window = replace(prompt, ids=ids, mask=mask)
    return Reader(model, window, min(longest - ids.shape[1], new - step))


def aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) with padding on the left, and no more of it than the longest row needs."""
    order = mask.int().argsort(dim=-1, stable=True)
    hidden = ids.shape[1] - int(mask.sum(-1).max()) if len(ids) else 0
    return ids.gather(1, order)[:, hidden:], mask.gather(1, order)[:, hidden:]
