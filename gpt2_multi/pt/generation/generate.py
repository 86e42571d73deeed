"""Generation in PyTorch: `generate`, `stream`, `stream_tokens` and `score`, between texts or ids and the loop.

B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Array, Request
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput
from gpt2_multi.pt.attention import upcast
from gpt2_multi.pt.generation.beams import BeamSearch, BeamState
from gpt2_multi.pt.generation.decoding import Prompt, Sampling, State, decode
from gpt2_multi.pt.generation.lookup import Lookup
from gpt2_multi.pt.generation.rules import as_tensors
from gpt2_multi.pt.layers import facts, to_numpy

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def generate(
    self: Any,
    input_ids: Any,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Continue (B, T) prompts: returns (B * num_return_sequences, T + new) ids, the prompts in front.

    Prompts may be texts, with `tokenizer`: a text gives a text, or a list where several are asked for; a list gives a
    list. `options` are the fields of `GenerationConfig`, on top of `generation_config` or the model's own. Without
    `attention_mask` every id counts; with it, padding may stand on either side, and each row gets what it gets alone.
    With `return_dict_in_generate` the answer is a `GenerateOutput`.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown option.
    """
    config = self.generation_config.resolve(generation_config, options)
    encoder = encoder_hidden_states, encoder_attention_mask
    request = request_of(self, config, input_ids, attention_mask, tokenizer, *encoder)
    device = self.device if request.prompts is not None else input_ids.device
    prompt = Prompt.of(request, device, *encoder)
    output = run(self, request, prompt)
    given = torch.from_numpy(request.given).to(device).repeat_interleave(config.num_return_sequences, 0)
    output.sequences = torch.cat([given, output.sequences], 1)
    return request.answer(output, None if request.prompts is None else to_numpy(output.sequences))


def stream(
    self: Any,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    **options: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    config = self.generation_config.resolve(generation_config, options)
    request = Request.of_text(config, self.config, text, tokenizer)
    made = columns(self, request, Prompt.of(request, self.device, None, None))
    return texts.decode(tokenizer, (int(column[0]) for column in made), config)


def stream_tokens(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    config = self.generation_config.resolve(generation_config, options)
    config.check_streaming()
    facts("input_ids", input_ids)  # of ids alone: a stream of texts is `stream`
    encoder = encoder_hidden_states, encoder_attention_mask
    request = request_of(self, config, input_ids, attention_mask, tokenizer, *encoder)
    return columns(self, request, Prompt.of(request, input_ids.device, *encoder))


def score(
    self: Any,
    texts: str | Sequence[str],
    *,
    tokenizer: GPT2Tokenizer,
    stride: int | None = None,
    batch_size: int = 8,
) -> Any:
    """The `TextScore` of a text, or a list of them: log-probabilities of its tokens in nats, and its perplexity.

    Texts beyond `n_positions` are read in windows, each `stride` tokens (by default half the context) further than the
    one before. Raises InputError for what is no text, and for a stride that would leave tokens out.
    """
    from gpt2_multi.generation import scoring  # which few programs need

    was_training = self.training
    try:
        self.eval()  # dropout would score another model
        return scoring.score(partial(log_probs, self), texts, tokenizer, self.config, stride, batch_size)
    finally:
        self.train(was_training)


@torch.no_grad()
def log_probs(model: Any, ids: Array, mask: Array) -> Array:
    """The log-probability of each id but the first, given those before it: (B, T) -> (B, T - 1)"""
    given, keep = (torch.from_numpy(x).to(model.device) for x in (ids, mask))
    logits = model(given, attention_mask=keep, use_cache=False, return_dict=True).logits[:, :-1]
    chosen = logits.gather(-1, given[:, 1:, None]).squeeze(-1)
    return to_numpy(upcast(chosen) - upcast(logits).logsumexp(-1))


def request_of(
    model: Any,
    config: GenerationConfig,
    ids: Any,
    mask: Any,
    tokenizer: GPT2Tokenizer | None,
    states: Tensor | None,
    states_mask: Tensor | None,
) -> Request:
    """Check what was given, and take it from tensors to NumPy."""
    given = {"encoder_hidden_states": states, "encoder_attention_mask": states_mask}
    if not texts.are_texts(ids):
        given |= {"input_ids": ids, "attention_mask": mask}
    found = {name: facts(name, x) for name, x in given.items() if x is not None}
    if "input_ids" in found:
        ids, mask = to_numpy(ids), None if mask is None else to_numpy(mask)
    request = Request.of(config, model.config, ids, mask, tokenizer)
    inputs.check_states(model.config, len(request.ids), found)
    return request


def strategy_of(request: Request, dtype: torch.dtype) -> Sampling | BeamSearch:
    """How tokens are chosen; `dtype` is what the model computes in."""
    config, room = request.config, request.new_tokens
    if config.num_beams > 1:
        records = tuple(name for name in config.records if name != "log_probs")  # which the paths have
        return BeamSearch(room, config.rows, records, torch.promote_types(dtype, torch.float32))
    if config.prompt_lookup_num_tokens is not None:
        return Lookup(room, config.rows, config.records, config.prompt_lookup_num_tokens)
    return Sampling(room, config.rows, config.records)


def parts(strategy: Sampling | BeamSearch, prompt: Prompt, options: Options) -> list[tuple[Prompt, Options]]:
    """The prompts that a loop is given at once, as tensors with their options: all, but one by one for a lookup."""
    options = as_tensors(options, prompt.ids.device)
    if not strategy.room or not len(prompt.ids):
        return []
    if not isinstance(strategy, Lookup):
        return [(prompt, options)]
    return [(prompt.row(i), options.row(i)) for i in range(len(prompt.ids))]


def columns(model: Any, request: Request, prompt: Prompt) -> Iterator[Tensor]:
    """One token of each row after the other, until the length, or until all are finished."""
    strategy, fill = strategy_of(request, model.dtype), prompt.ids.new_full((1,), request.options.fill)
    made = [
        columns_of(decode(model, part, strategy, options)) for part, options in parts(strategy, prompt, request.options)
    ]
    return (torch.cat(column) for column in zip_longest(*made, fillvalue=fill))


def columns_of(states: Iterator[State]) -> Iterator[Tensor]:
    """The columns (R,) that each state has more than the one before."""
    seen = 0
    for state in states:
        yield from state.shown[:, seen : state.step].unbind(1)
        seen = state.step


def run(model: Any, request: Request, prompt: Prompt) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, N), and what the options ask to be recorded."""
    config, strategy = request.config, strategy_of(request, model.dtype)
    shown: list[Tensor] = []
    longest = 0
    for part, options in parts(strategy, prompt, request.options):
        *_, state = decode(model, part, strategy, options)
        if isinstance(state, BeamState):
            return beam_output(config, state)
        shown, longest = [*shown, state.shown], max(longest, state.step)
    if shown:
        return with_records(GenerateOutput(torch.cat(shown)[:, :longest]), config, state.records)
    nothing = prompt.ids.new_zeros(len(prompt.ids) * config.num_return_sequences, strategy.room)
    output = GenerateOutput(nothing, log_probs=torch.zeros(nothing.shape))
    return with_records(output, config, {name: [] for name in config.records})


def with_records(output: GenerateOutput, config: GenerationConfig, records: dict[str, list[Tensor]]) -> GenerateOutput:
    """The output with the records of all steps: scores and logits a tuple, log_probs (B, N)."""
    for name in config.records:
        if name != "log_probs":
            setattr(output, name, tuple(records[name]))
        elif output.log_probs is None:
            output.log_probs = torch.stack(records[name], 1)
    return output


def beam_output(config: GenerationConfig, state: BeamState) -> GenerateOutput:
    """The best of the beams: their paths (B, K, N), cut to the longest that is returned."""
    several = config.num_return_sequences
    tokens, log_probs, beams = state.found.best(several, config.fill_token_id)
    longest = int((beams >= 0).sum(-1).max())
    output = GenerateOutput(tokens[:, :longest], log_probs=log_probs[:, :longest], beam_indices=beams[:, :longest])
    output.sequences_scores = state.found.scores[:, :several].flatten()
    return with_records(output, config, state.records)
