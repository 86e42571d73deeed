"""Beam search and beam sampling in PyTorch, as transformers 4.57 has them: a strategy of the loop.

B prompts, K beams of each, C candidates of each, V vocabulary, N new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import NO_CALLBACKS
from gpt2_multi.pt.attention import KVCache, upcast
from gpt2_multi.pt.generation.decoding import Prompt, State, guided, own_ends, own_rules, record
from gpt2_multi.pt.generation.rules import ends, gumbel, likeliest, process
from gpt2_multi.pt.layers import is_at_hand, to_numpy


class Paths(NamedTuple):
    """How texts came about, token by token; X is K or C."""

    tokens: Tensor  # (B, X, N), filling after the last
    log_probs: Tensor  # (B, X, N), of each token; 0 after the last
    beams: Tensor  # (B, X, N), the row that each token was chosen in, among all B * K; -1 after the last

    def gather(self, index: Tensor) -> Paths:
        """Some of the paths: index (B, X)"""
        return Paths(*(x.take_along_dim(index[..., None], 1) for x in self))

    def concat(self, others: Paths) -> Paths:
        """These, and others after them."""
        return Paths(*(torch.cat(pair, 1) for pair in zip(self, others, strict=True)))


class Hypotheses(NamedTuple):
    """Finished texts, the best first; where there is none yet, the score is -inf."""

    scores: Tensor  # (B, K)
    paths: Paths

    def best(self, several: int, fill: int) -> Paths:
        """The paths of so many texts of each prompt, (B * several, N); nothing but filling where there is none."""
        none = (self.scores[:, :several] == -torch.inf).flatten()[:, None]
        paths = (x[:, :several].flatten(0, 1) for x in self.paths)
        return Paths(*(x.masked_fill(none, empty) for x, empty in zip(paths, (fill, 0, -1), strict=True)))


@dataclass
class BeamState(State):
    """What the loop carries from one token to the next; the rows are the beams of all prompts."""

    scores: Tensor = field(kw_only=True)  # (B, K), of the running beams, the best first
    running: Paths = field(kw_only=True)
    found: Hypotheses = field(kw_only=True)
    is_open: Tensor = field(kw_only=True)  # (B,), whether better texts may yet be found


@dataclass(frozen=True)
class BeamSearch:
    """The likeliest texts, or a sample of them."""

    room: int  # for how many tokens
    rows: int  # of each prompt, its beams
    records: tuple[str, ...]  # what is kept of each step
    dtype: torch.dtype  # of scores
    callbacks: Callbacks = NO_CALLBACKS
    stride: int = 1  # after how many tokens it is looked whether all is over

    def start(self, prompt: Prompt, options: Options) -> BeamState:
        """The state in which nothing is made; of a prompt's beams, which are all the same, one counts."""
        tokens = prompt.ids.new_full((len(prompt.ids), self.rows, self.room), options.fill)
        running = Paths(tokens, torch.zeros_like(tokens, dtype=self.dtype), torch.full_like(tokens, -1))
        none = running.log_probs.new_full(tokens.shape[:2], -torch.inf)
        first = none.index_fill(1, tokens.new_zeros(1), 0)
        more = dict(scores=first, running=running, found=Hypotheses(none, running), is_open=none[:, 0] < 0)
        return BeamState.of(prompt, self.rows, self.room, self.records, options.fill, **more)

    def is_open(self, state: BeamState) -> bool:
        """Whether anything is to follow."""
        return state.step < self.room and (bool(state.step % self.stride) or bool(state.is_open.any()))

    def propose(self, state: BeamState, options: Options) -> Tensor:
        """What is read together with the last token, as it may follow: nothing, (B * K, 0)."""
        return state.ids[:, :0]

    def update(self, state: BeamState, logits: Tensor, proposed: Tensor, options: Options) -> None:
        """Go on by one token, from the logits (B * K, 1, V) of the next; of guided rows twice as many."""
        ids, keep, made = state.ids[:, : state.length], state.mask[:, : state.length], state.step + 1
        log_probs = guided(state, upcast(logits[:, 0]).log_softmax(-1), options)
        kept = process(log_probs, ids, keep, state.step, options, own_rules(self, state))
        record(state, logits[: len(ids), 0], kept)
        processed = kept.whole(logits.shape[-1])
        values, beam, token = candidates(processed, state.scores, state.step, options)  # (B, C)
        ended, stop = ends(token, state.stop.view_as(state.scores).gather(1, beam), options)
        if made == self.room or state.is_late:
            ended = torch.ones_like(ended)
        if self.callbacks.criteria:
            ended |= self.ends(state, beam, token)
        paths = extend(state.running, processed, beam, token, state.step)
        reached = (values / made**options.length_penalty).masked_fill(~(ended & state.is_open[:, None]), -torch.inf)
        state.found = add_finished(state.found, paths, reached)
        state.scores, best = greatest(values.masked_fill(ended, -torch.inf), self.rows)  # (B, K)
        state.running, state.stop = paths.gather(best), stop.gather(1, best).flatten()
        state.is_open &= can_improve(state.scores[:, 0], state.found, made, self.room, options)
        reorder(state)

    def ends(self, state: BeamState, beam: Tensor, token: Tensor) -> Tensor:
        """Which candidates are over by the caller's criteria: beam, token (B, C) -> (B, C)"""
        rows = beam + self.rows * torch.arange(len(beam), device=beam.device)[:, None]
        ids = torch.cat([state.ids[rows.flatten(), : state.length], token.flatten()[:, None]], 1)
        return own_ends(self.callbacks, state, ids).view_as(beam)


def candidates(processed: Tensor, scores: Tensor, step: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest continuations of all beams, or samples without replacement (Kool et al. 2019), best first: (B, C)

    processed: (B * K, V). scores: (B, K). Returns the scores, the beams that they continue, and the tokens.
    """
    rank = values = processed + scores.flatten()[:, None]  # (B * K, V)
    tokens = torch.arange(values.shape[1], device=values.device).expand_as(values)
    if options.do_sample:
        rank = values + gumbel(options.streams, step, tokens, values.dtype)
    if is_at_hand(rank) and len(rank):  # then first of each beam, which two cores do at once
        tokens = likeliest(rank, options.candidates)
        values, rank = values.gather(1, tokens), rank.gather(1, tokens)
    each = rank.shape[1]
    values, rank, tokens = (x.reshape(len(scores), -1) for x in (values, rank, tokens))  # (B, K * each)
    _, index = greatest(rank, min(options.candidates, rank.shape[1]))
    values = values.gather(1, index)
    none = values == -torch.inf  # there are fewer than C
    return values, (index // each).masked_fill(none, 0), tokens.gather(1, index).masked_fill(none, 0)


def greatest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest numbers of each row (B, N) and where they are, the first of equals first: (B, count) each."""
    if not is_at_hand(x):
        values, order = x.sort(dim=-1, descending=True, stable=True)
        return values[:, :count], order[:, :count]
    index = likeliest(x, count)
    values, order = x.gather(1, index).sort(dim=-1, descending=True, stable=True)
    return values[:, :count], index.gather(1, order)[:, :count]


def extend(running: Paths, processed: Tensor, beam: Tensor, token: Tensor, step: int) -> Paths:
    """The paths of candidates: beam, token (B, C) -> (B, C, N)"""
    batch, beams, _ = running.tokens.shape
    row = beam + beams * torch.arange(batch, device=beam.device)[:, None]
    paths = running.gather(beam)
    for path, value in zip(paths, (token, processed[row, token], row), strict=True):
        path[..., step] = value
    return paths


def add_finished(found: Hypotheses, paths: Paths, scores: Tensor) -> Hypotheses:
    """The best of what was found and of the first K candidates: scores (B, C), -inf where one is not finished."""
    beams = found.scores.shape[1]
    best, index = greatest(torch.cat([found.scores, scores[:, :beams]], 1), beams)
    first = Paths(*(x[:, :beams] for x in paths))
    return Hypotheses(best, found.paths.concat(first).gather(index))


def can_improve(score: Tensor, found: Hypotheses, made: int, room: int, options: Options) -> Tensor:
    """Whether the best running beam of each prompt may yet be better than the worst text that was found: (B,)"""
    worst = found.scores[:, -1]
    if options.early_stopping == 1:
        return (worst == -torch.inf) & (score > -torch.inf)
    hopeful = options.early_stopping == 2 and options.length_penalty > 0
    return score / (room if hopeful else made) ** options.length_penalty > worst


def reorder(state: BeamState) -> None:
    """Go on with the rows of the running beams, each of which shares its prompt with the one that it replaces."""
    rows, chosen = (x[..., state.step].flatten() for x in (state.running.beams, state.running.tokens))
    texts = state.ids[:, state.length - state.step : state.length]
    state.ids = state.ids[rows]
    state.ids[:, state.length] = chosen
    made = slice(state.extra + state.length - state.step, state.extra + state.length)
    if state.is_guided:
        rows, texts = torch.cat([rows, rows + len(rows)]), texts.repeat(2, 1)
    parts = [buffer[:, :, made] for pair in cast(KVCache, state.cache).layers for buffer in pair]
    if is_at_hand(rows):
        move(parts, rows.tolist(), to_numpy(texts))
    else:
        for part in parts:
            part.copy_(part.index_select(0, rows))
    state.step, state.length = state.step + 1, state.length + 1


def move(parts: list[Tensor], rows: list[int], texts: np.ndarray[Any, Any]) -> None:
    """Let each row of tensors (R, H, N, D) be the one that `rows` names, from where their texts (R, N) part.

    No two beams have one text, so that what they have in common was read once and copied.
    """
    left, order = {into: of for into, of in enumerate(rows) if into != of}, []
    starts = {into: int((texts[into] != texts[of]).argmax()) if texts.size else 0 for into, of in left.items()}
    while free := set(left).difference(left.values()):  # what nobody will read any more
        order += [(into, left.pop(into), starts[into]) for into in free]
    into, of = torch.tensor([*left]), torch.tensor([*left.values()])  # rows that go round in circles
    least = min((starts[row] for row in left), default=0)
    for part in parts:
        for row, other, start in order:
            part[row, :, start:] = part[other, :, start:]
        if left:
            part[into, :, least:] = part[of, :, least:]
