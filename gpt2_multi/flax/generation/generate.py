"""Generation in Flax: `generate`, `stream` and `stream_tokens`, which check their input and choose the loop.

Each loop is one jitted function. Lengths come in buckets, so that another prompt rarely compiles anything. Under the
user's `jit`, `params` being an argument, the loop becomes a part of that. B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt2_multi.errors import InputError
from gpt2_multi.flax.generation import lookup
from gpt2_multi.flax.generation.beams import Found, search
from gpt2_multi.flax.generation.decoding import (
    Plan,
    Prompt,
    advance,
    aligned,
    begin,
    bucketed,
    decode,
    fresh,
    read,
    shown,
    sliding,
    tokenwise,
)
from gpt2_multi.flax.generation.rules import Options
from gpt2_multi.flax.layers import as_array, facts, is_concrete
from gpt2_multi.flax.params import Tree
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.request import seed_of
from gpt2_multi.generation.rules import bucket, noise_streams
from gpt2_multi.generation.stopping import stop_table
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput

if TYPE_CHECKING:
    from gpt2_multi.flax.heads import FlaxGPT2LMHeadModel
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def generate(
    self: FlaxGPT2LMHeadModel,
    input_ids: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer | None = None,
    params: Tree | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    **options: Any,
) -> Any:
    """Continue (B, T) prompts: returns (B * num_return_sequences, T + new) ids, the prompts in front.

    Prompts may be texts, with `tokenizer`: a text gives a text, or a list where several are asked for; a list gives a
    list. `options` are the fields of `GenerationConfig`, on top of `generation_config` or the model's own. Without
    `attention_mask` every id counts; with it, padding may stand on either side, and each row gets what it gets alone.
    With `return_dict_in_generate` the answer is a `GenerateOutput`.
    Called while another function is traced, the loop becomes a part of that, and always returns the greatest length;
    `sliding_window` and `prompt_lookup_num_tokens`, which are guided from outside, cannot be used there.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown option.
    """
    config = self.generation_config.resolve(generation_config, options)
    encoder = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
    if texts.are_texts(input_ids):
        given: dict[str, Any] = {"tokenizer": tokenizer, "params": params, **encoder}
        run = partial(generate, self, generation_config=config, **given)
        return texts.generate(run, input_ids, attention_mask, tokenizer, config, self.config, np.asarray)
    prompt, rules, new = prepare(self, config, input_ids, attention_mask, tokenizer, *encoder.values())
    output = run_loop(self, self.fitting(params), config, prompt, rules, new)
    prompts = jnp.repeat(jnp.asarray(input_ids), config.num_return_sequences, axis=0)
    output.sequences = jnp.concatenate([prompts, output.sequences.astype(prompts.dtype)], 1)
    return output if config.return_dict_in_generate else output.sequences


def stream(
    self: FlaxGPT2LMHeadModel,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    params: Tree | None = None,
    **options: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    config = self.generation_config.resolve(generation_config, options)
    ids = np.array([texts.streamed(text, tokenizer, config, self.config)])
    columns = stream_tokens(self, ids, generation_config=config, tokenizer=tokenizer, params=params)
    return texts.decode(tokenizer, (int(column[0]) for column in columns), config)


def stream_tokens(
    self: FlaxGPT2LMHeadModel,
    input_ids: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer | None = None,
    params: Tree | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    **options: Any,
) -> Iterator[Array]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    config = self.generation_config.resolve(generation_config, options)
    config.check_streaming()
    encoder = (encoder_hidden_states, encoder_attention_mask)
    prompt, rules, new = prepare(self, config, input_ids, attention_mask, tokenizer, *encoder)
    params = self.fitting(params)
    if is_traced(params, prompt):
        raise InputError("stream_tokens: cannot give one token after the other while it is traced; call generate there")
    return columns(self, params, config, prompt, rules, new)


def columns(
    model: FlaxGPT2LMHeadModel, params: Tree, config: GenerationConfig, prompt: Prompt, options: Options, new: int
) -> Iterator[Array]:
    """One token of each row after the other, until the length, or until all are finished."""
    if not new or not len(prompt.ids):
        return iter(())
    given = (model, params, bucketed(prompt), planned(config, new), new, options)
    if config.prompt_lookup_num_tokens is not None:
        return lookup.columns(*given, config.prompt_lookup_num_tokens)
    states = sliding(*given, stride=1) if config.sliding_window else tokenwise(*given)
    return (shown(view, state, options)[:, step] for step, (view, state) in enumerate(states))


def decoders(module: Any) -> dict[str, Callable[..., Any]]:
    """The jitted functions that a model generates with; `advance` and `speculate` write their caches in place."""
    return {
        "decode": jax.jit(partial(decode, module), static_argnums=2),
        "search": jax.jit(partial(search, module), static_argnums=2),
        "lookup": jax.jit(partial(lookup.lookup, module), static_argnums=(2, 5)),
        "begin": jax.jit(partial(begin, module), static_argnums=2),
        "fresh": jax.jit(partial(fresh, module), static_argnums=1),
        "read": jax.jit(partial(read, module), static_argnums=2),
        "advance": jax.jit(partial(advance, module), donate_argnums=2),
        "speculate": jax.jit(partial(lookup.speculate, module), static_argnums=6, donate_argnums=2),
    }


def planned(config: GenerationConfig, new: int) -> Plan:
    """What is compiled for so many new tokens."""
    return Plan(bucket(new + (config.prompt_lookup_num_tokens or 0)), config.rows, config.records)


def is_traced(*trees: Any) -> bool:
    """Whether anything in these trees has no value yet."""
    return not all(map(is_concrete, jax.tree.leaves(trees)))


def prepare(
    model: FlaxGPT2LMHeadModel,
    config: GenerationConfig,
    ids: Any,
    mask: Any,
    tokenizer: GPT2Tokenizer | None,
    states: Any,
    states_mask: Any,
) -> tuple[Prompt, Options, int]:
    """Check the input, move padding to the left, and say by what rules how many tokens may follow."""
    ids, states, states_mask = (as_array(name, x) for name, x in (
        ("input_ids", ids), ("encoder_hidden_states", states), ("encoder_attention_mask", states_mask)
    ))  # fmt: skip
    inputs.check_shape("input_ids", ids.shape, (None, None))
    mask = np.ones(ids.shape, bool) if mask is None else as_array("attention_mask", mask) != 0
    inputs.check_shape("attention_mask", mask.shape, ids.shape)
    inputs.check_ids("input_ids", facts(ids), model.config.vocab_size)
    encoder = {"encoder_hidden_states": states, "encoder_attention_mask": states_mask}
    found = {name: facts(x) for name, x in encoder.items() if x is not None}
    inputs.check_states(model.config, len(ids), found)
    new = config.total_length(ids.shape[1]) - ids.shape[1]
    if not is_traced(ids, mask):
        ids, mask = np.asarray(ids), np.asarray(mask)
        check_values(model, config, ids, mask, new)
    config.check_vocabulary(model.config.vocab_size)
    table = stop_table(config.stops, tokenizer, model.config.vocab_size)
    noise = noise_streams(seed_of(config, len(ids)), len(ids), config.rows)
    prompt = Prompt(*aligned(ids.astype(np.int32), mask), states, states_mask)
    return prompt, Options.of(config, table, noise), new


def check_values(model: FlaxGPT2LMHeadModel, config: GenerationConfig, ids: Any, mask: Any, new: int) -> None:
    """Every prompt needs a token, and room."""
    if len(ids):
        counts = mask.sum(-1)
        inputs.check_prompts(int(counts.min()))
        config.check_context(int(counts.max()), new, model.config.n_positions)


def run_loop(
    model: FlaxGPT2LMHeadModel, params: Tree, config: GenerationConfig, prompt: Prompt, options: Options, new: int
) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, new), and what the options ask to be recorded."""
    if not new or not len(prompt.ids):
        return nothing(config, len(prompt.ids) * config.num_return_sequences, new)
    check_guided(config, is_traced(params, prompt))
    prompt, plan = bucketed(prompt), planned(config, new)
    if config.num_beams > 1:
        return found_output(config, new, *model.decoders["search"](params, prompt, plan, new, options))
    if (guesses := config.prompt_lookup_num_tokens) is not None:
        return GenerateOutput(lookup.looked_up(model, params, prompt, plan, new, options, guesses))
    if config.sliding_window:
        *_, (view, state) = sliding(model, params, prompt, plan, new, options, stride=new)
        tokens, made, records = shown(view, state, options), state.step, state.records
    else:
        tokens, made, records = model.decoders["decode"](params, prompt, plan, new, options)
    count = int(made) if is_concrete(made) else new
    output = GenerateOutput(tokens[:, :count])
    if "log_probs" in records:
        output.log_probs = records["log_probs"][:, :count]
    return with_records(output, records, count)


def nothing(config: GenerationConfig, rows: int, new: int) -> GenerateOutput:
    """What no prompt is continued by, or one by no token."""
    output = GenerateOutput(jnp.zeros((rows, new), jnp.int32))
    if "log_probs" in config.records:
        output.log_probs = jnp.zeros((rows, new))
    return with_records(output, dict.fromkeys(config.records, ()), 0)


def check_guided(config: GenerationConfig, traced: bool) -> None:
    """A loop that is guided from outside cannot be part of another function."""
    for name, is_on in (
        ("sliding_window", config.sliding_window),
        ("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens is not None),
    ):
        if traced and is_on:
            raise InputError(f"{name}: cannot be used while generate is traced; leave it out, or call it outside")


def with_records(output: GenerateOutput, records: dict[str, Any], made: int) -> GenerateOutput:
    """The output with the scores and logits of so many steps."""
    for name in {"scores", "logits"} & records.keys():
        setattr(output, name, tuple(records[name][step] for step in range(made)))
    return output


def found_output(
    config: GenerationConfig, new: int, found: Found, made: Any, records: dict[str, Any]
) -> GenerateOutput:
    """The best of the beams: their paths (B, K, N), cut to the longest that is returned."""
    several = config.num_return_sequences
    tokens, log_probs, beams = found.best(several, config.fill_token_id)
    longest = int((beams >= 0).sum(-1).max()) if is_concrete(beams) else new
    output = GenerateOutput(tokens[:, :longest], log_probs=log_probs[:, :longest], beam_indices=beams[:, :longest])
    output.sequences_scores = found.scores[:, :several].reshape(-1)
    return with_records(output, records, int(made) if is_concrete(made) else new)
