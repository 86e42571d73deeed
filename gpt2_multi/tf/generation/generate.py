"""Generation in TensorFlow: `generate`, `stream`, `stream_tokens` and `score`, between texts or ids and the loop.

B rows, T prompt length, V vocabulary. Lengths come in buckets, so that another prompt rarely traces or compiles
anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Array, Request
from gpt2_multi.generation.rules import bucket
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput
from gpt2_multi.tf.attention import upcast
from gpt2_multi.tf.fit.arguments import tensor
from gpt2_multi.tf.generation.beams import BeamSearch, BeamState
from gpt2_multi.tf.generation.decoders import Decoders
from gpt2_multi.tf.generation.decoding import Prompt, Records, Sampling, State, slide
from gpt2_multi.tf.generation.lookup import Lookup
from gpt2_multi.tf.generation.rules import as_tensors
from gpt2_multi.tf.generation.tracing import traced, traced_request
from gpt2_multi.tf.layers import facts

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def generate(
    self: keras.Model,
    input_ids: tf.Tensor | str | Sequence[str],
    attention_mask: tf.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer | None = None,
    encoder_hidden_states: tf.Tensor | None = None,
    encoder_attention_mask: tf.Tensor | None = None,
    jit_compile: bool | None = None,
    **options: Any,
) -> Any:
    """Continue (B, T) prompts: returns (B * num_return_sequences, T + new) ids, the prompts in front.

    Prompts may be texts, with `tokenizer`: a text gives a text, or a list where several are asked for; a list gives a
    list. `options` are the fields of `GenerationConfig`, on top of `generation_config` or the model's own. Without
    `attention_mask` every id counts; with it, padding may stand on either side, and each row gets what it gets alone.
    With `return_dict_in_generate` the answer is a `GenerateOutput`.
    The loop is compiled by XLA unless `jit_compile` is False. Called while another function is traced, it becomes a
    part of that, and always returns the greatest length; a prompt of unknown length needs `max_new_tokens`.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown option.
    """
    config = self.generation_config.resolve(generation_config, options)
    given = input_ids, attention_mask, tokenizer, encoder_hidden_states, encoder_attention_mask
    request, prompt = request_of(self, config, *given)
    finals = []
    for rows in parts(request, prompt):
        *_, state = run(self, request, *rows, request.new_tokens, jit_compile in (None, True))
        finals.append(state)
    output = output_of(request, finals)
    prompts = tf.convert_to_tensor(input_ids if request.prompts is None else request.given)
    prompts = tf.repeat(prompts, config.num_return_sequences, axis=0)
    output.sequences = tf.concat([prompts, tf.cast(output.sequences, prompts.dtype)], 1)
    return request.answer(output, None if request.prompts is None else output.sequences.numpy())


def stream(
    self: keras.Model,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    jit_compile: bool | None = None,
    **options: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    config = self.generation_config.resolve(generation_config, options)
    request = Request.of_text(config, self.config, text, tokenizer)
    made = columns(self, request, Prompt.of(request), jit_compile in (None, True))
    return texts.decode(tokenizer, (int(column[0]) for column in made), config)


def stream_tokens(
    self: keras.Model,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer | None = None,
    encoder_hidden_states: tf.Tensor | None = None,
    encoder_attention_mask: tf.Tensor | None = None,
    jit_compile: bool | None = None,
    **options: Any,
) -> Iterator[tf.Tensor]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    config = self.generation_config.resolve(generation_config, options)
    config.check_streaming()
    given = input_ids, attention_mask, tokenizer, encoder_hidden_states, encoder_attention_mask
    return columns(self, *request_of(self, config, *given), jit_compile in (None, True))


def score(
    self: keras.Model,
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

    return scoring.score(partial(log_probs, self), texts, tokenizer, self.config, stride, batch_size)


def log_probs(model: keras.Model, ids: Array, mask: Array) -> Array:
    """The log-probability of each id but the first, given those before it: (B, T) -> (B, T - 1)"""
    logits = upcast(model(ids, attention_mask=mask, use_cache=False, return_dict=True).logits[:, :-1])
    chosen = tf.gather(logits, tf.constant(ids[:, 1:]), batch_dims=2)
    return np.asarray(chosen - tf.reduce_logsumexp(logits, -1))


def request_of(
    model: keras.Model,
    config: GenerationConfig,
    ids: Any,
    mask: Any,
    tokenizer: GPT2Tokenizer | None,
    states: Any,
    states_mask: Any,
) -> tuple[Request, Prompt]:
    """What a call asks for, checked, and its prompts as tensors."""
    states, states_mask = tensor("encoder_hidden_states", states), tensor("encoder_attention_mask", states_mask)
    if texts.are_texts(ids):
        request = Request.of(config, model.config, ids, mask, tokenizer)
    else:
        ids, mask = tensor("input_ids", ids), tensor("attention_mask", mask)
        given = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        inputs.check_numbers("attention_mask", {name: facts(name, x) for name, x in given.items()})
        make = Request.of if tf.executing_eagerly() else traced_request
        request = make(config, model.config, ids, mask, tokenizer)
    encoder = {"encoder_hidden_states": states, "encoder_attention_mask": states_mask}
    found = {name: facts(name, x) for name, x in encoder.items() if x is not None}
    inputs.check_states(model.config, request.ids.shape[0], found)
    return request, Prompt.of(request, states, states_mask)


def strategy_of(config: GenerationConfig, room: Any) -> Sampling | BeamSearch | Lookup:
    """How tokens are chosen, of which there is room for so many."""
    if config.num_beams > 1:
        return BeamSearch(room, config.rows, tuple(name for name in config.records if name != "log_probs"))
    if config.prompt_lookup_num_tokens is not None:
        return Lookup(room, config.rows, config.records, config.prompt_lookup_num_tokens)
    return Sampling(room, config.rows, config.records)


def parts(request: Request, prompt: Prompt) -> list[tuple[Prompt, Options]]:
    """The prompts that are continued together, and their options: of prompt lookup each alone, otherwise all."""
    options, count = as_tensors(request.options), request.ids.shape[0]
    if request.config.prompt_lookup_num_tokens is None or not count:
        return [(prompt, options)]
    return [(prompt.row(row), options.row(row)) for row in range(count)]


def columns(model: keras.Model, request: Request, prompt: Prompt, jit: bool) -> Iterator[tf.Tensor]:
    """One token of each row after the other, until the length, or until all are finished."""
    alone = [columns_of(run(model, request, *rows, 1, jit), request.new_tokens) for rows in parts(request, prompt)]
    fill = tf.constant([request.options.fill])
    return (tf.concat(column, 0) for column in zip_longest(*alone, fillvalue=fill))


def columns_of(states: Iterator[State], new: int) -> Iterator[tf.Tensor]:
    """The columns (B,) that each state has more than the one before, `new` in all."""
    seen = 0
    for state in states:
        made = min(int(state.step), new)
        yield from tf.unstack(state.shown[:, seen:made], axis=1)
        seen = made


def run(
    model: keras.Model, request: Request, prompt: Prompt, options: Options, stride: int, jit: bool
) -> Iterator[Any]:
    """The states of these prompts: in which nothing is made, and after every `stride` tokens or more, up to the last.

    Where a window slides, each of its places is another prompt to read.
    """
    config, new, longest = request.config, request.new_tokens, request.model.n_positions
    if not tf.executing_eagerly():
        yield traced(model, strategy_of(config, new), prompt, options, new)
        return
    prompt, strategy, step, decoders = prompt.bucketed(), strategy_of(config, bucket(new)), 0, Decoders.of(model, jit)
    wide = prompt.repeated(config.rows)
    state: Any = strategy.start(model, wide, options)
    yield state
    while step < new and strategy.is_open(state):
        window, rows, room, full = prompt, config.rows, strategy.room, new
        if config.sliding_window:
            window, count = slide(wide, state, longest)
            rows, room, full = 1, bucket(longest - count), min(step + longest - count + 1, new)
        cache, keep = decoders.prefill(window, room + 1 + (config.prompt_lookup_num_tokens or 0), rows)
        state = state._replace(cache=cache, keep=keep)
        while step < full and strategy.is_open(state):
            state = decoders.decode(wide, strategy, state, tf.constant(min(step + stride, full)), options)
            step = int(state.step)
            yield state


def output_of(request: Request, finals: list[Any]) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, N), and what the options ask to be recorded, of the last states."""
    new = made = request.new_tokens
    if tf.executing_eagerly() and len(request.ids):
        made = min(max(int(state.step) for state in finals), new)
    if isinstance(finals[0], BeamState):
        return beam_output(request.config, finals[0], made)
    tokens = tf.concat([state.shown for state in finals], 0)[:, :made]
    return with_records(GenerateOutput(tokens), request.config, finals[0].records, made)


def with_records(output: GenerateOutput, config: GenerationConfig, records: Records, made: int) -> GenerateOutput:
    """The output with the records of the steps that were made: scores and logits a tuple, log_probs (B, N)."""
    for name in config.records:
        if name != "log_probs":
            setattr(output, name, tuple(tf.unstack(records[name][:made])))
        elif output.log_probs is None:
            output.log_probs = tf.transpose(records[name][:made])
    return output


def beam_output(config: GenerationConfig, state: BeamState, made: int) -> GenerateOutput:
    """The best of the beams: their paths (B, K, N), cut to the longest that is returned."""
    several, longest = config.num_return_sequences, made
    tokens, log_probs, beams = state.found.best(several, config.fill_token_id)
    if tf.executing_eagerly() and len(tokens):
        longest = int(tf.reduce_max(tf.math.count_nonzero(beams >= 0, -1)))
    output = GenerateOutput(tokens[:, :longest], log_probs=log_probs[:, :longest], beam_indices=beams[:, :longest])
    output.sequences_scores = tf.reshape(state.found.scores[:, :several], [-1])
    return with_records(output, config, state.records, made)
