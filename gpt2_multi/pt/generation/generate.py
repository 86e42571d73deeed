"""Generation in PyTorch: `generate`, `stream` and `stream_tokens`, which check their input and choose the loop.

B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.request import seed_of
from gpt2_multi.generation.rules import noise_streams
from gpt2_multi.generation.stopping import stop_table
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput
from gpt2_multi.pt.generation.beams import Found, search
from gpt2_multi.pt.generation.decoding import Prompt, Step, aligned, decode
from gpt2_multi.pt.generation.lookup import speculate
from gpt2_multi.pt.generation.rules import Rules, stream_keys
from gpt2_multi.pt.layers import facts, to_numpy

if TYPE_CHECKING:
    from gpt2_multi.pt.heads import GPT2LMHeadModel
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def generate(
    self: GPT2LMHeadModel,
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
    encoder = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
    if texts.are_texts(input_ids):
        run = partial(_generate_rows, self, config=config, tokenizer=tokenizer, **encoder)
        return texts.generate(run, input_ids, attention_mask, tokenizer, config, self.config, to_numpy)
    prompt, rules, new = prepare(self, config, input_ids, attention_mask, tokenizer, *encoder.values())
    output = run_loop(self, config, prompt, rules, new)
    prompts = input_ids.long().repeat_interleave(config.num_return_sequences, 0)
    output.sequences = torch.cat([prompts, output.sequences], 1)
    return output if config.return_dict_in_generate else output.sequences


def _generate_rows(model: GPT2LMHeadModel, ids: Any, mask: Any, config: GenerationConfig, **given: Any) -> Any:
    """What `generate` gives for rows in NumPy."""
    ids, mask = (torch.from_numpy(x).to(model.device) for x in (ids, mask))
    return generate(model, ids, mask, config, **given)


def stream(
    self: GPT2LMHeadModel,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    **options: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    config = self.generation_config.resolve(generation_config, options)
    ids = torch.tensor([texts.streamed(text, tokenizer, config, self.config)], device=self.device)
    columns = stream_tokens(self, ids, generation_config=config, tokenizer=tokenizer)
    return texts.decode(tokenizer, (int(column[0]) for column in columns), config)


def stream_tokens(
    self: GPT2LMHeadModel,
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
    prompt, rules, new = prepare(
        self, config, input_ids, attention_mask, tokenizer, encoder_hidden_states, encoder_attention_mask
    )
    return (step.shown for step in steps(self, config, prompt, rules, new))


def prepare(
    model: GPT2LMHeadModel,
    config: GenerationConfig,
    ids: Any,
    mask: Tensor | None,
    tokenizer: GPT2Tokenizer | None,
    states: Tensor | None,
    states_mask: Tensor | None,
) -> tuple[Prompt, Rules, int]:
    """Check the input, move padding to the left, and say how many tokens may follow, and by what rules."""
    given = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": states}
    given["encoder_attention_mask"] = states_mask
    found = {name: facts(name, x) for name, x in given.items() if x is not None}
    inputs.check_shape("input_ids", found["input_ids"].shape, (None, None))
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    inputs.check_shape("attention_mask", mask.shape, ids.shape)
    inputs.check_states(model.config, len(ids), found)
    vocab_size, counts = model.transformer.wte.num_embeddings, mask.sum(-1)
    new = config.total_length(ids.shape[1]) - ids.shape[1]
    inputs.check_ids("input_ids", found["input_ids"], vocab_size)
    if len(ids):
        inputs.check_prompts(int(counts.min()))
        config.check_context(int(counts.max()), new, model.transformer.wpe.num_embeddings)
    config.check_vocabulary(vocab_size)
    table = torch.from_numpy(stop_table(config.stops, tokenizer, vocab_size)).to(ids.device)
    prompt = Prompt(*aligned(ids.long(), mask), states, states_mask)
    noise = stream_keys(noise_streams(seed_of(config, len(ids)), len(ids), config.rows), ids.device)
    wide = prompt.repeated(config.rows)
    return prompt, Rules(config, wide.ids, wide.mask, new, table, noise), new


def steps(model: GPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, rules: Rules, new: int) -> Iterator[Step]:
    """One token of each row after the other, until the length, or until all are finished."""
    if not new or not len(prompt.ids):
        return iter(())
    if config.prompt_lookup_num_tokens is None:
        return decode(model, config, prompt, rules, new)
    alone = [speculate(model, config, prompt.row(i), rules.row(i, new), new) for i in range(len(prompt.ids))]
    fill = rules.ids.new_tensor([config.fill_token_id])
    return (Step(torch.cat(column), {}) for column in zip_longest(*alone, fillvalue=fill))


def run_loop(
    model: GPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, rules: Rules, new: int
) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, new), and what the options ask to be recorded."""
    if config.num_beams > 1 and new and len(prompt.ids):
        return found_output(config, *search(model, config, prompt, rules, new))
    made = list(steps(model, config, prompt, rules, new))
    columns = [step.shown for step in made]
    nothing = rules.ids.new_zeros(len(prompt.ids) * config.num_return_sequences, new)  # no rows, or no columns
    output = GenerateOutput(torch.stack(columns, 1) if columns else nothing)
    return with_records(output, config, [step.records for step in made])


def with_records(output: GenerateOutput, config: GenerationConfig, records: list[dict[str, Tensor]]) -> GenerateOutput:
    """The output with the records of all steps: scores and logits a tuple, log_probs (B, new)."""
    for name in config.records:
        if name != "log_probs":
            setattr(output, name, tuple(record[name] for record in records))
        elif output.log_probs is None:
            kept = [record[name] for record in records]
            output.log_probs = torch.stack(kept, 1) if kept else torch.zeros(output.sequences.shape)
    return output


def found_output(config: GenerationConfig, found: Found, records: list[dict[str, Tensor]]) -> GenerateOutput:
    """The best of the beams: their paths (B, K, N), cut to the longest that is returned."""
    several = config.num_return_sequences
    scores, (tokens, log_probs, beams) = found.scores[:, :several].flatten(), found.best(several, config.fill_token_id)
    longest = int((beams >= 0).sum(-1).max())
    output = GenerateOutput(tokens[:, :longest], log_probs=log_probs[:, :longest], beam_indices=beams[:, :longest])
    output.sequences_scores = scores
    return with_records(output, config, records)
