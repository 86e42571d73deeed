"""Generation in PyTorch: prefill, decode loop, the rules on logits, and the sample that every framework draws alike.

The rules are those of `gpt2_multi.sampling`, on batches: B rows, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2_multi import limits
from gpt2_multi.pt.attention import Context, KVCache, causal_bias, key_bias, score_dtype
from gpt2_multi.pt.checks import check_states, check_tensors, extremes
from gpt2_multi.sampling import PARITY, ROTATIONS, GenerationConfig

if TYPE_CHECKING:
    from gpt2_multi.pt.heads import GPT2LMHeadModel


@dataclass
class Prompt:
    """Checked input of a generation, each row padded on the left and repeated for every sequence to return."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), booleans
    states: Tensor | None  # (B, encoder length, E)
    states_mask: Tensor | None  # (B, encoder length)


def generate(
    self: GPT2LMHeadModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Continue (B, T) prompts: returns (B * num_return_sequences, T + new) ids, the prompts in front.

    `options` are the fields of `GenerationConfig`, on top of `generation_config` or the model's own. Without
    `attention_mask` every id counts; with it, padding may stand on either side, and each row gets what it gets alone.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown option.
    """
    config = (generation_config or self.generation_config).with_options(options)
    columns = stream_tokens(
        self,
        input_ids,
        attention_mask,
        config,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
    )
    prompts = input_ids.long().repeat_interleave(config.num_return_sequences, 0)
    return torch.cat([prompts, *(column[:, None] for column in columns)], 1)


def stream_tokens(
    self: GPT2LMHeadModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    config = (generation_config or self.generation_config).with_options(options)
    prompt = prepare(self, config, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask)
    return decode(self, config, prompt)


def prepare(
    model: GPT2LMHeadModel,
    config: GenerationConfig,
    ids: Tensor,
    mask: Tensor | None,
    states: Tensor | None,
    states_mask: Tensor | None,
) -> Prompt:
    """Check the input, move padding to the left, and repeat each row `num_return_sequences` times."""
    check_tensors(input_ids=ids, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=states_mask)
    limits.check_shape("input_ids", ids.shape, (None, None))
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    limits.check_shape("attention_mask", mask.shape, ids.shape)
    counts = mask.sum(-1)
    limits.check_integers("input_ids", ids.dtype, ids.dtype in (torch.int64, torch.int32))
    check_states(model.transformer, len(ids), states, states_mask)
    if len(ids):
        limits.check_prompts(int(counts.min()))
        limits.check_ids("input_ids", *extremes(ids), model.transformer.wte.num_embeddings)
        new = config.total_length(ids.shape[1]) - ids.shape[1]
        limits.check_context(int(counts.max()), new, model.transformer.wpe.num_embeddings)
    order = mask.int().argsort(dim=-1, stable=True)  # hidden tokens first
    aligned = (ids.long().gather(1, order), mask.gather(1, order), states, states_mask)
    return Prompt(*(None if x is None else x.repeat_interleave(config.num_return_sequences, 0) for x in aligned))  # type: ignore[arg-type]


@torch.no_grad()
def decode(model: GPT2LMHeadModel, config: GenerationConfig, prompt: Prompt) -> Iterator[Tensor]:
    """Prefill the cache with the prompt, then choose, yield and feed back one token per row and step."""
    body, length = model.transformer, prompt.ids.shape[1]
    total = config.total_length(length)
    context, key_biases = begin(model, prompt, total)
    counts = prompt.mask.sum(-1)  # (B,), the next token's position
    rules = Rules(config, prompt, model.config.vocab_size, total)
    hidden = body.run(body.embed(prompt.ids, (prompt.mask.cumsum(-1) - 1).clamp(min=0)), context).last_hidden_state
    for step in range(total - length):
        chosen = rules.choose(model.logits(hidden[:, -1]), step)  # (B,)
        yield rules.accept(chosen, length + step)
        if length + step + 1 == total or rules.all_finished():
            return
        context.bias = None if key_biases is None else key_biases[..., : length + step + 1]
        x = body.embed(chosen[:, None], (counts + step)[:, None])
        hidden = body.run(x, context).last_hidden_state


def begin(model: GPT2LMHeadModel, prompt: Prompt, total: int) -> tuple[Context, Tensor | None]:
    """The context of the prefill, and the bias of each later step's keys (B, 1, 1, total) where there is padding."""
    body, (batch, length) = model.transformer, prompt.ids.shape
    context = Context(cache=KVCache.empty(body, batch, total), eager=body.attn_implementation == "eager")
    context.states, dtype = prompt.states, score_dtype(body.ln_f.weight.new_zeros(0, dtype=model.dtype))
    if prompt.states is not None and prompt.states_mask is not None:
        context.states_bias = key_bias(prompt.states_mask, dtype)
    if prompt.mask.all():
        return context, None
    context.bias = causal_bias(length, length, prompt.mask, dtype, prompt.ids.device)
    later = torch.ones(batch, total - length, dtype=torch.bool, device=prompt.ids.device)
    return context, key_bias(torch.cat([prompt.mask, later], 1), dtype)


class Rules:
    """What a row has said so far, and the rules that turn its logits into its next token."""

    def __init__(self, config: GenerationConfig, prompt: Prompt, vocab_size: int, total: int) -> None:
        device, (batch, self.prompt_length) = prompt.ids.device, prompt.ids.shape
        self.config = config
        self.ids = prompt.ids.new_zeros(batch, total)
        self.ids[:, : self.prompt_length] = prompt.ids
        self.mask = prompt.mask
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.ends = torch.tensor([i for i in config.eos_token_ids if i < vocab_size], dtype=torch.long, device=device)
        self.seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)
        if config.repetition_penalty != 1:
            self.seen[prompt.mask.nonzero()[:, 0], prompt.ids[prompt.mask]] = True
        self.keys = stream_keys(config.seed, batch, device)

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """The next token of each row, from the model's logits (B, V): -> (B,)"""
        config, length = self.config, self.prompt_length + step
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if config.repetition_penalty != 1:
            logits = penalise(logits, self.seen, config.repetition_penalty)
        if config.no_repeat_ngram_size:
            logits = ban_repeats(logits, self.ids[:, :length], self.mask, config.no_repeat_ngram_size)
        if step < config.longest_minimum():
            logits = self._without_ends(logits, step)
        if not config.do_sample:
            return logits.argmax(-1)
        logits = logits / config.temperature
        logits = keep_top_k(logits, config.top_k) if config.top_k else logits
        logits = keep_top_p(logits, config.top_p) if config.top_p < 1 else logits
        return sample(logits, self.keys, step)

    def _without_ends(self, logits: Tensor, step: int) -> Tensor:
        """No end token where a row is too short; its own tokens count, not its padding."""
        config, lengths = self.config, self.mask.sum(-1, keepdim=True) + step  # (B, 1)
        short = (lengths < config.min_length) | (step < (config.min_new_tokens or 0))
        return torch.where(short, logits.index_fill(1, self.ends, -torch.inf), logits)

    def accept(self, chosen: Tensor, length: int) -> Tensor:
        """Note the tokens at index `length`; what the caller sees of a finished row is filling: (B,) -> (B,)"""
        shown = chosen.masked_fill(self.finished, self.config.fill_token_id)
        self.finished |= torch.isin(chosen, self.ends)
        self.ids[:, length] = chosen
        if self.config.repetition_penalty != 1:
            self.seen.scatter_(1, chosen[:, None], True)
        return shown

    def all_finished(self) -> bool:
        """Whether no row goes on."""
        return bool(len(self.ends)) and bool(self.finished.all())


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make each token that a row has seen (B, V) less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeats(logits: Tensor, ids: Tensor, prompt_mask: Tensor, size: int) -> Tensor:
    """Rule out every token that would repeat an n-gram of its row's ids (B, T); windows over padding do not count."""
    if ids.shape[1] < size:
        return logits
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, : prompt_mask.shape[1]] = prompt_mask
    windows = ids.unfold(1, size, 1)  # (B, windows, size)
    prefix = ids[:, None, ids.shape[1] - size + 1 :]
    repeated = (windows[..., :-1] == prefix).all(-1) & counts.unfold(1, size, 1).all(-1)
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


def stream_keys(seed: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two key words of each row's noise, seed + row, as (B, 1) int32."""
    streams = [(seed + row) % 2**64 for row in range(batch)]
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
