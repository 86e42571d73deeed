"""Beam search and beam sampling in PyTorch, as transformers 4.57 has them.

B prompts, K beams of each, C candidates of each, V vocabulary, N new tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.pt.generation.decoding import Prompt, Reader
from gpt2_multi.pt.generation.rules import Rules, gumbel
from gpt2_multi.pt.training import widened

if TYPE_CHECKING:
    from gpt2_multi.pt.heads import GPT2LMHeadModel


class Paths(NamedTuple):
    """How texts came about, token by token; X is K or C."""

    tokens: Tensor  # (B, X, N), filling after the last
    log_probs: Tensor  # (B, X, N), of each token; 0 after the last
    beams: Tensor  # (B, X, N), the row that each token was chosen in, among all B * K; -1 after the last

    def taken(self, index: Tensor) -> Paths:
        """Some of the paths: index (B, X)"""
        return Paths(*(x.take_along_dim(index[..., None], 1) for x in self))

    def joined(self, others: Paths) -> Paths:
        """These, and others after them."""
        return Paths(*(torch.cat(pair, 1) for pair in zip(self, others, strict=True)))


class Found(NamedTuple):
    """Finished texts, the best first; where there is none yet, the score is -inf."""

    scores: Tensor  # (B, K)
    paths: Paths

    def best(self, several: int, fill: int) -> Paths:
        """The paths of so many texts of each prompt, (B * several, N); nothing but filling where there is none."""
        none = (self.scores[:, :several] == -torch.inf).flatten()[:, None]
        paths = (x[:, :several].flatten(0, 1) for x in self.paths)
        return Paths(*(x.masked_fill(none, empty) for x, empty in zip(paths, (fill, 0, -1), strict=True)))


@torch.no_grad()
def search(
    model: GPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, rules: Rules, new: int
) -> tuple[Found, list[dict[str, Tensor]]]:
    """The texts that are found, and what the options ask to be recorded of each step."""
    batch, beams = len(prompt.ids), config.num_beams
    reader, records = Reader(model, prompt, new, beams), []
    logits = reader.begin()  # (B * K, V)
    scores = widened(logits).new_full((batch, beams), -torch.inf)
    scores[:, 0] = 0  # the beams are the same yet
    running = nothing(rules, scores, new)
    found, is_open = Found(torch.full_like(scores, -torch.inf), running), prompt.mask.new_ones(batch)
    for step in range(new):
        processed = rules.process(widened(logits).log_softmax(-1), step)
        records.append({"logits": logits, "scores": processed})
        values, beam, token = candidates(config, rules, processed, scores, step)  # (B, C)
        over, _ = rules.over(token, rules.state.view(batch, beams).gather(1, beam))
        paths = extended(running, processed, beam, token, step)
        over |= step + 1 == new
        found = updated(found, paths, values / (step + 1) ** config.length_penalty, over & is_open[:, None])
        scores, best = greatest(values.masked_fill(over, -torch.inf), beams)  # (B, K)
        running = paths.taken(best)
        is_open &= can_improve(config, scores[:, 0], found, step + 1, new)
        if step + 1 == new or not is_open.any():
            break
        chosen, rows = (running.tokens[..., step].flatten(), running.beams[..., step].flatten())
        rules.reorder(rows)
        rules.accept(chosen, step)
        reader.reorder(rows)
        logits = reader.follow(chosen[:, None])[:, -1]
    return found, records


def nothing(rules: Rules, scores: Tensor, new: int) -> Paths:
    """Paths without a token."""
    tokens = rules.ids.new_full((*scores.shape, new), rules.config.fill_token_id)
    return Paths(tokens, scores.new_zeros(tokens.shape), torch.full_like(tokens, -1))


def candidates(
    config: GenerationConfig, rules: Rules, processed: Tensor, scores: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest continuations of all beams, or samples without replacement (Kool et al. 2019), best first: (B, C)

    processed: (B * K, V). scores: (B, K). Returns the scores, the beams that they continue, and the tokens.
    """
    vocab = processed.shape[-1]
    values = (processed.view(*scores.shape, vocab) + scores[..., None]).flatten(1)  # (B, K * V)
    rank = values
    if config.do_sample:
        tokens = torch.arange(vocab, device=values.device).expand(len(processed), vocab)
        rank = values + gumbel(rules.keys, step, tokens, values.dtype).view_as(values)
    _, index = greatest(rank, min(config.candidates, values.shape[1]))
    values = values.gather(1, index)
    index = index.masked_fill(values == -torch.inf, 0)  # there are fewer than C
    return values, index // vocab, index % vocab


def greatest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest numbers of each row (B, N) and where they are, the first of equals first: (B, count) each."""
    least = x.topk(count).values[:, -1:]
    enough = int((x >= least).sum(-1).max())  # with all that ties with the last
    index = x.topk(enough, sorted=False).indices.sort(-1).values
    values, order = x.gather(1, index).sort(dim=-1, descending=True, stable=True)
    return values[:, :count], index.gather(1, order)[:, :count]


def extended(running: Paths, processed: Tensor, beam: Tensor, token: Tensor, step: int) -> Paths:
    """The paths of candidates: beam, token (B, C) -> (B, C, N)"""
    batch, beams, _ = running.tokens.shape
    row = beam + beams * torch.arange(batch, device=beam.device)[:, None]
    paths = running.taken(beam)
    for path, value in zip(paths, (token, processed[row, token], row), strict=True):
        path[..., step] = value
    return paths


def updated(found: Found, paths: Paths, scores: Tensor, finished: Tensor) -> Found:
    """The best of what was found and of the first K candidates, where they are finished: scores, finished (B, C)"""
    beams = found.scores.shape[1]
    scores = scores.masked_fill(~finished, -torch.inf)[:, :beams]
    best, index = greatest(torch.cat([found.scores, scores], 1), beams)
    first = Paths(*(x[:, :beams] for x in paths))
    return Found(best, found.paths.joined(first).taken(index))


def can_improve(config: GenerationConfig, score: Tensor, found: Found, made: int, new: int) -> Tensor:
    """Whether the best running beam of each prompt may yet be better than the worst text that was found: (B,)"""
    worst = found.scores[:, -1]
    if config.early_stopping is True:
        return (worst == -torch.inf) & (score > -torch.inf)
    hopeful = config.early_stopping == "never" and config.length_penalty > 0
    return score / (new if hopeful else made) ** config.length_penalty > worst
