"""Generation in TensorFlow: `generate`, `stream` and `stream_tokens`, which check their input and choose the loop.

B rows, T prompt length, V vocabulary. Lengths come in buckets, so that another prompt rarely traces or compiles
anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.request import seed_of
from gpt2_multi.generation.rules import bucket, noise_streams
from gpt2_multi.generation.stopping import stop_table
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput
from gpt2_multi.tf.attention import KVCache, sizes, widened
from gpt2_multi.tf.fit.arguments import as_tensor
from gpt2_multi.tf.generation.beams import Found, search
from gpt2_multi.tf.generation.decoding import Prompt, Records, State, advance, begin, decode, segments, start
from gpt2_multi.tf.generation.lookup import speculate
from gpt2_multi.tf.generation.rules import Options
from gpt2_multi.tf.layers import facts, is_concrete

if TYPE_CHECKING:
    from gpt2_multi.tf.heads import TFGPT2LMHeadModel
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

PARTS: dict[str, Callable[..., Any]] = {
    "": decode, "beams ": search, "begin ": begin, "advance ": advance, "lookup ": speculate,
}  # fmt: skip


def generate(
    self: TFGPT2LMHeadModel,
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
    The loop is one function, compiled by XLA unless `jit_compile` is False. Called while another function is traced, it
    becomes a part of that, and always returns the greatest length; a prompt of unknown length needs `max_new_tokens`.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown option.
    """
    config = self.generation_config.resolve(generation_config, options)
    encoder = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
    if texts.are_texts(input_ids):
        given: dict[str, Any] = {"tokenizer": tokenizer, "jit_compile": jit_compile, **encoder}
        run = partial(generate, self, generation_config=config, **given)
        return texts.generate(run, input_ids, attention_mask, tokenizer, config, self.config, np.asarray)
    prompt, rules, new = prepare(self, config, input_ids, attention_mask, tokenizer, *encoder.values())
    output = run_loop(self, config, prompt, rules, new, jit_compile in (None, True))
    prompts = tf.repeat(tf.convert_to_tensor(input_ids), config.num_return_sequences, axis=0)
    output.sequences = tf.concat([prompts, tf.cast(output.sequences, prompts.dtype)], 1)
    return output if config.return_dict_in_generate else output.sequences


def stream(
    self: TFGPT2LMHeadModel,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    jit_compile: bool | None = None,
    **options: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    config = self.generation_config.resolve(generation_config, options)
    ids = tf.constant([texts.streamed(text, tokenizer, config, self.config)])
    columns = stream_tokens(self, ids, generation_config=config, tokenizer=tokenizer, jit_compile=jit_compile)
    return texts.decode(tokenizer, (int(column[0]) for column in columns), config)


def stream_tokens(
    self: TFGPT2LMHeadModel,
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
    prompt, rules, new = prepare(
        self, config, input_ids, attention_mask, tokenizer, encoder_hidden_states, encoder_attention_mask
    )
    return columns(self, config, prompt, rules, new, jit_compile in (None, True))


def decoders(model: TFGPT2LMHeadModel) -> dict[str, Callable[..., Any]]:
    """The functions that a model generates with, by how they are compiled; without XLA a graph is for many shapes."""
    functions = {
        f"{part}{way}": tf.function(
            partial(function, model), jit_compile=jit, autograph=False, reduce_retracing=not jit
        )
        for part, function in PARTS.items()
        for way, jit in (("graph", False), ("xla", True))
    }
    for function in functions.values():
        function._omit_frequent_tracing_warning = True  # five buckets in a row are no mistake
    return functions


def room_after(config: GenerationConfig, prompt: int | None) -> int:
    """How many tokens may follow a prompt; None is a length that is not known yet."""
    if prompt is None and config.max_new_tokens is None and config.max_length is not None:
        raise InputError("max_length: the prompt's length is not known while tracing; give max_new_tokens instead")
    return config.total_length(prompt or 0) - (prompt or 0)


def prepare(
    model: TFGPT2LMHeadModel,
    config: GenerationConfig,
    ids: Any,
    mask: Any,
    tokenizer: GPT2Tokenizer | None,
    states: tf.Tensor | None,
    states_mask: tf.Tensor | None,
) -> tuple[Prompt, Options, int]:
    """Check the input, move padding to the left, and say how many tokens may follow, and by what rules."""
    given = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": states}
    ids, mask, states, states_mask = (
        None if value is None and name != "input_ids" else tf.convert_to_tensor(as_tensor(name, value))
        for name, value in {**given, "encoder_attention_mask": states_mask}.items()
    )
    parts = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": states}
    parts["encoder_attention_mask"] = states_mask
    found = {name: facts(name, x) for name, x in parts.items() if x is not None}
    inputs.check_shape("input_ids", found["input_ids"].shape, (None, None))
    check_traced(config)
    new, longest, vocab_size = room_after(config, ids.shape[1]), model.transformer.wpe.input_dim, vocabulary(model)
    if mask is None and not is_concrete(ids):
        config.check_context(ids.shape[1] or 0, new, longest)
    inputs.check_numbers("attention_mask", found)
    mask = tf.ones_like(ids, tf.bool) if mask is None else tf.cast(mask, tf.bool)
    inputs.check_shape("attention_mask", facts("attention_mask", mask).shape, found["input_ids"].shape)
    inputs.check_states(model.config, ids.shape[0], found)
    inputs.check_ids("input_ids", found["input_ids"], vocab_size)
    if is_concrete(ids) and len(ids):
        counts = tf.math.count_nonzero(mask, -1)
        inputs.check_prompts(int(tf.reduce_min(counts)))
        config.check_context(int(tf.reduce_max(counts)), new, longest)
    config.check_vocabulary(vocab_size)
    options = Options.of(config, noise(config, ids), stop_table(config.stops, tokenizer, vocab_size))
    return Prompt(*aligned(tf.cast(ids, tf.int32), mask), states, states_mask), options, new


def vocabulary(model: TFGPT2LMHeadModel) -> int:
    """How many tokens the model knows."""
    return int(model.transformer.wte.input_dim)


def check_traced(config: GenerationConfig) -> None:
    """What looks at its tokens between two compiled parts cannot be one of another function."""
    name = "sliding_window" if config.sliding_window else "prompt_lookup_num_tokens"
    if not tf.executing_eagerly() and (config.sliding_window or config.prompt_lookup_num_tokens):
        raise InputError(f"{name}: cannot be traced into another function; leave it out, or call generate outside")


def aligned(ids: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Ids and mask (B, T) with padding on the left."""
    order = tf.argsort(tf.cast(mask, tf.int32), axis=-1, stable=True)  # hidden tokens first
    return tf.gather(ids, order, batch_dims=1), tf.gather(mask, order, batch_dims=1)


def noise(config: GenerationConfig, ids: tf.Tensor) -> tf.Tensor:
    """The streams of noise of all rows, (B * rows,); of a number of prompts that is not known yet they are counted."""
    batch, rows = ids.shape[0], config.rows
    seed = seed_of(config, batch or 1)
    if batch is not None or not isinstance(seed, int):
        return tf.constant(np.array(noise_streams(seed, len(seed) if batch is None else batch, rows), np.uint64))  # type: ignore[arg-type]
    return tf.constant(seed, tf.uint64) + tf.cast(tf.range(tf.shape(ids)[0] * rows), tf.uint64)


def columns(
    model: TFGPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, options: Options, new: int, jit: bool
) -> Iterator[tf.Tensor]:
    """One token of each row after the other, until the length, or until all are finished."""
    batch = prompt.ids.shape[0]
    if not new or not batch:
        return iter(())
    if config.prompt_lookup_num_tokens is None:
        return tokens_of(states(model, config, prompt, options, new, jit, 1))
    alone = [tokens_of(lookups(model, config, prompt.row(i), options.row(i), new, jit, 1)) for i in range(batch)]
    return (tf.concat(column, 0) for column in zip_longest(*alone, fillvalue=options.fill[None]))


def tokens_of(states: Iterator[State]) -> Iterator[tf.Tensor]:
    """The columns (B,) that each state has more than the one before."""
    seen = 0
    for state in states:
        yield from tf.unstack(state.shown[:, seen : int(state.step)], axis=1)
        seen = int(state.step)


def states(
    model: TFGPT2LMHeadModel,
    config: GenerationConfig,
    prompt: Prompt,
    options: Options,
    new: int,
    jit: bool,
    stride: int,
) -> Iterator[State]:
    """The states after every `stride` tokens."""
    wide, way = prompt.bucketed().repeated(config.rows), "xla" if jit else "graph"
    state = start(model, wide, bucket(new), options, config.records, KVCache())
    if config.sliding_window:
        yield from segments(model, wide, state, new, options, jit, stride)
        return
    state = state._replace(cache=model.decoders[f"begin {way}"](prompt.bucketed(), bucket(new), config.rows))
    while state.step < new and not tf.reduce_all(state.finished):
        state = model.decoders[f"advance {way}"](wide, wide, state, tf.minimum(state.step + stride, new), options)
        yield state


def lookups(
    model: TFGPT2LMHeadModel,
    config: GenerationConfig,
    prompt: Prompt,
    options: Options,
    new: int,
    jit: bool,
    stride: int,
) -> Iterator[State]:
    """The states of one row after every `stride` tokens or more, by prompt lookup."""
    prompt, way = prompt.bucketed(), "xla" if jit else "graph"
    state = start(model, prompt, bucket(new), options, (), model.decoders[f"begin {way}"](prompt, bucket(new), 1))
    while state.step < new and not tf.reduce_all(state.finished):
        until = tf.minimum(state.step + stride, new)
        given = prompt, state, until, tf.constant(new), options, config.prompt_lookup_num_tokens
        state = model.decoders[f"lookup {way}"](*given)
        yield state


def run_loop(
    model: TFGPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, options: Options, new: int, jit: bool
) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, new), and what the options ask to be recorded."""
    if not new or prompt.ids.shape[0] == 0:
        empty = tf.zeros((sizes(prompt.ids)[0] * config.num_return_sequences, new), tf.int32)
        log_probs = tf.zeros(tf.shape(empty), widened(tf.zeros((), model.compute_dtype)).dtype)
        return with_records(GenerateOutput(empty), config, {"log_probs": log_probs, "scores": (), "logits": ()})
    if config.num_beams > 1:
        found, step, records = one_loop(model, "beams ", config, prompt, options, new, jit)
        return found_output(config, found, step, records, new)
    if config.prompt_lookup_num_tokens is not None:
        alone = [lookups(model, config, prompt.row(i), options.row(i), new, jit, new) for i in range(len(prompt.ids))]
        ends = [last(row) for row in alone]
        return GenerateOutput(tf.concat([end.shown for end in ends], 0)[:, : max(int(end.step) for end in ends)])
    if config.sliding_window:
        state = last(states(model, config, prompt, options, new, jit, new))
    else:
        state = one_loop(model, "", config, prompt, options, new, jit)
    made = int(state.step) if tf.executing_eagerly() else new
    return with_records(GenerateOutput(state.shown[:, :made]), config, cut(state.records, made))


def last(states: Iterator[State]) -> State:
    """The last of some states."""
    *_, state = states
    return state


def one_loop(
    model: TFGPT2LMHeadModel, part: str, config: GenerationConfig, prompt: Prompt, options: Options, new: int, jit: bool
) -> Any:
    """What one compiled loop gives; while another function is traced, it is a part of that."""
    rest = tf.constant(new), options, config.rows, config.records
    if not tf.executing_eagerly():
        return PARTS[part](model, prompt, new, *rest)
    return model.decoders[f"{part}{'xla' if jit else 'graph'}"](prompt.bucketed(), bucket(new), *rest)


def cut(records: Records, made: int) -> dict[str, Any]:
    """The records of the steps that were made: scores and logits a tuple, log_probs (B, new)."""
    parts = {name: tf.unstack(kept[:made]) for name, kept in records.items()}
    return {name: tf.stack(kept, 1) if name == "log_probs" else tuple(kept) for name, kept in parts.items()}


def with_records(output: GenerateOutput, config: GenerationConfig, records: dict[str, Any]) -> GenerateOutput:
    """The output with what the options ask for."""
    for name in config.records:
        if name in records:
            setattr(output, name, records[name])
    return output


def found_output(config: GenerationConfig, found: Found, step: tf.Tensor, records: Records, new: int) -> GenerateOutput:
    """The best of the beams: their paths (B, K, N), cut to the longest that is returned."""
    several, made = config.num_return_sequences, new
    tokens, log_probs, beams = found.best(several, config.fill_token_id)
    if tf.executing_eagerly():
        new, made = int(tf.reduce_max(tf.math.count_nonzero(beams >= 0, -1))), int(step)
    output = GenerateOutput(tokens[:, :new], log_probs=log_probs[:, :new], beam_indices=beams[:, :new])
    output.sequences_scores = tf.reshape(found.scores[:, :several], [-1])
    return with_records(output, config, cut(records, made))
