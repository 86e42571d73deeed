"""Generation in Flax: `generate`, `stream` and `score`, which check their input and choose how the loop goes on.

The loop is compiled. Lengths come in buckets, so that another prompt rarely compiles anything. Under the user's `jit`,
`params` being an argument, the loop becomes a part of that. B prompts, R rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt2_multi.errors import InputError
from gpt2_multi.flax.attention import KVCache
from gpt2_multi.flax.generation.beams import BeamSearch
from gpt2_multi.flax.generation.decoders import Source, log_probs_of, states_of
from gpt2_multi.flax.generation.decoding import INSIDE, Prompt, Sampling, State, forward
from gpt2_multi.flax.generation.lookup import Assistant, Assisted, Lookup
from gpt2_multi.flax.generation.rules import as_tensors
from gpt2_multi.flax.generation.tracing import check_alone, traced_request
from gpt2_multi.flax.layers import as_array, facts, is_concrete, is_traced, on_host
from gpt2_multi.flax.parameters.axes import under_any_axes
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Array as NumPyArray
from gpt2_multi.generation.request import Given, Request, check_assisted, check_streamed
from gpt2_multi.generation.rules import bucket
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

ROWS = (  # which are looked at and put in order before anything is computed
    "input_ids", "attention_mask", "token_type_ids", "negative_prompt_ids", "negative_prompt_attention_mask",
)  # fmt: skip
STRIDE = 4  # tokens from one look at the clock to the next


@under_any_axes
def generate(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    params: Tree | None = None,
    **given: Any,
) -> Any:
    """Continue (B, T) prompts: returns (B * num_return_sequences, T + new) ids, the prompts in front.

    Prompts may be texts, with `tokenizer`: a text gives a text, or a list where several are asked for; a list gives a
    list. Without `attention_mask` every id counts; with it, padding may stand on either side, and each row gets what it
    gets alone. With `return_dict_in_generate` the answer is a `GenerateOutput`.
    `given` are the fields of `GenerationConfig`, on top of `generation_config` or the model's own, and arguments
    (docs/generation.md): tokenizer, token_type_ids (B, T), inputs_embeds (B, T, E), past_key_values,
    encoder_hidden_states (B, encoder length, E), encoder_attention_mask, negative_prompt_ids (B, any),
    negative_prompt_attention_mask, logits_processor, prefix_allowed_tokens_fn, stopping_criteria, streamer,
    assistant_model. Functions are traced into the loop, which is compiled once for each set of them.
    Called while another function is traced, the loop becomes a part of that, and always returns the greatest length;
    `sliding_window`, `prompt_lookup_num_tokens`, `max_time`, `streamer` and `assistant_model`, which lead it from
    outside, cannot be used there. Another `__call__`, and methods that are intercepted, steer the loop; it is compiled
    anew at each call then.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown argument.
    """
    brought, config = Given.of(self.generation_config, input_ids, attention_mask, generation_config, given)
    with brought.callbacks.ended():
        source = Source.of(self, params, brought)
        request, prompt = request_of(self, config, brought, source)
        output = run(self, source, request, prompt)
        own = request.given if request.prompts is not None or brought.input_ids is None else brought.input_ids
        prompts = jnp.repeat(as_array("input_ids", own), config.num_return_sequences, axis=0)
        output.sequences = jnp.concatenate([prompts, output.sequences.astype(prompts.dtype)], 1)
        return request.answer(output, None if request.prompts is None else np.asarray(output.sequences))


@under_any_axes
def stream(
    self: Any,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    params: Tree | None = None,
    **given: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    given = {"tokenizer": tokenizer, **given}
    brought, config = Given.of(self.generation_config, text, None, generation_config, given)
    check_streamed(config, brought)
    source = Source.of(self, params, brought)
    request, prompt = request_of(self, config, brought, source)
    made = columns(self, source, request, prompt)
    return texts.decode(tokenizer, (int(column[0]) for column in made), config, request.given[0].tolist())


@under_any_axes
def stream_tokens(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    params: Tree | None = None,
    **given: Any,
) -> Iterator[Array]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    brought, config = Given.of(self.generation_config, input_ids, attention_mask, generation_config, given)
    check_streamed(config, brought, is_text=False)
    source = Source.of(self, params, brought)
    request, prompt = request_of(self, config, brought, source)
    if is_traced(source.params, prompt):
        raise InputError("stream_tokens: cannot give one token after the other while it is traced; call generate there")
    return columns(self, source, request, prompt)


@under_any_axes
def score(
    self: Any,
    texts: str | Sequence[str],
    *,
    tokenizer: GPT2Tokenizer,
    params: Tree | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Any:
    """The `TextScore` of a text, or a list of them: log-probabilities of its tokens in nats, and its perplexity.

    Texts beyond `n_positions` are read in windows, each `stride` tokens (by default half the context) further than the
    one before. Raises InputError for what is no text, and for a stride that would leave tokens out.
    """
    from gpt2_multi.generation import scoring  # which few programs need

    return scoring.score(partial(log_probs, self, params=params), texts, tokenizer, self.config, stride, batch_size)


def log_probs(
    model: Any, ids: NumPyArray, mask: NumPyArray, params: Tree | None = None
) -> tuple[NumPyArray, NumPyArray]:
    """Of each id but the first its log-probability, given those before it, and whether none is likelier.

    (B, T) -> (B, T - 1) of both. The last id is not read, so that there may be one more than the model has positions.
    Rows and lengths are filled up to a bucket, so that few are compiled.
    """
    rows, length = ids.shape[0], ids.shape[1] - 1
    more = [(0, (1 << (rows - 1).bit_length()) - rows), (0, min(bucket(length), model.config.n_positions) - length)]
    given, keep, wanted = (np.pad(x, more) for x in (ids[:, :-1], mask[:, :-1], ids[:, 1:]))
    logits = forward(model, given, attention_mask=keep, params=params).logits
    found, likeliest = log_probs_of(logits, wanted)
    return np.asarray(found)[:rows, :length], np.asarray(likeliest)[:rows, :length]


def request_of(model: Any, config: GenerationConfig, given: Given, source: Source) -> tuple[Request, Prompt]:
    """What a call was given, checked, but for the values of what is traced; and its rows, up to a bucket's length."""
    arrays = {name: (on_host if name in ROWS else as_array)(name, x) for name, x in given.arrays.items()}
    found = {name: facts(x) for name, x in arrays.items()}
    known = {name: np.asarray(x) for name, x in arrays.items() if name in ROWS and is_concrete(x)}
    rows, past = given._replace(**{**arrays, **known}), None if source.past is None else check_past(model, source.past)
    if any(name in arrays and not is_concrete(arrays[name]) for name in ROWS):
        request = traced_request(model, config, rows, found, past)
    else:
        states = found.get("encoder_hidden_states")
        request = Request.of(
            config, model.config, rows.input_ids, rows.attention_mask, given.tokenizer, given.callbacks,
            token_type_ids=rows.token_type_ids, embeds=found.get("inputs_embeds"), past=past,
            batch=1 if states is None else states.shape[0] or 0,
            negative=(rows.negative_prompt_ids, rows.negative_prompt_attention_mask),
        )  # fmt: skip
    inputs.check_states(model.config, len(request.ids), found)
    check_assisted(request, given)
    if source.past is not None:
        model._check_cache(source.past, len(request.ids), None)
    return request, Prompt.of(request, rows, source.past)


def check_past(model: Any, past: Any) -> int:
    """How many tokens a cache holds, which is one that a call of the model would take."""
    length = model._check_cache(past, None, None)
    if length is None:
        raise InputError("past_key_values: its length is not known while it is traced; call generate outside")
    return int(length)


def strategy_of(request: Request, source: Source) -> Sampling:
    """How tokens are chosen."""
    config, own = request.config, replace(request.callbacks, streamer=None)
    more: dict[str, Any] = {"records": config.records, "callbacks": own}
    if source.assistant is not None:
        more["guesses"], more["assistant"] = config.num_assistant_tokens, Assistant.of(source.assistant)
        return Assisted(bucket(request.new_tokens + config.num_assistant_tokens), **more)
    if (guesses := config.prompt_lookup_num_tokens) is not None:
        return Lookup(bucket(request.new_tokens + guesses), guesses=guesses, **more)
    kind = BeamSearch if config.num_beams > 1 else Sampling
    return kind(bucket(request.new_tokens), config.rows, **more)


def parts(strategy: Sampling, request: Request, prompt: Prompt) -> list[tuple[Prompt, Options]]:
    """What goes on together: all rows; but each row alone with guesses, which come true in one row and not in another.

    Nothing, where there is no row, or no token to come.
    """
    if not request.new_tokens or not len(prompt.ids):
        return []
    options = as_tensors(request.options)
    if not strategy.guesses:
        return [(prompt, options)]
    rows = prompt.repeated(request.config.rows)
    return [(rows.row(row), options.row(row)) for row in range(len(rows.ids))]


def loops(model: Any, source: Source, request: Request, prompt: Prompt, stride: int) -> list[Iterator[State]]:
    """The states of each part, after every `stride` tokens or more."""
    strategy = strategy_of(request, source)
    model.renew(strategy.callbacks, source.assistant)
    each = parts(strategy, request, prompt)
    return [states_of(model, source, request, strategy, part, stride) for part in each]


def columns(model: Any, source: Source, request: Request, prompt: Prompt) -> Iterator[Array]:
    """One token of each row, (R,), after the other, until the length, or until all are finished."""
    made = [columns_of(states) for states in loops(model, source, request, prompt, 1)]
    if len(made) == 1:
        return made[0]
    fill = jnp.full(1, request.options.fill, jnp.int32)
    return (jnp.concatenate(column) for column in zip_longest(*made, fillvalue=fill))


def columns_of(states: Iterator[State]) -> Iterator[Array]:
    """The columns (R,) that each state has more than the one before."""
    seen = 0
    for state in states:
        shown, step = state.shown, int(state.step)
        yield from (shown[:, place] for place in range(seen, step))
        seen = step


def streamed(states: Iterator[State], streamer: Any) -> Iterator[State]:
    """The states, whose new columns (R,) a streamer gets as soon as they are there, as arrays of NumPy."""
    seen = 0
    for state in states:
        shown, step = np.asarray(state.shown), int(state.step)
        for place in range(seen, step):
            streamer.put(shown[:, place])
        seen = step
        yield state


def run(model: Any, source: Source, request: Request, prompt: Prompt) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, new), and what the options ask to be recorded."""
    config, new, streamer = request.config, request.new_tokens, request.callbacks.streamer
    if is_traced(source.params, source.past, prompt):
        check_alone(config, request.callbacks, source.assistant)
    stride = 1 if streamer is not None else new if config.max_time is None else STRIDE
    made = loops(model, source, request, prompt, stride)
    if streamer is not None:
        inputs.check_together(len(made))
        streamer.put(np.repeat(request.given, config.num_return_sequences, axis=0))
        made = [streamed(states, streamer) for states in made]
    finals = [deque(states, maxlen=1)[0] for states in made]
    if not finals:
        nothing = jnp.zeros((len(prompt.ids) * config.num_return_sequences, new), jnp.int32)
        records: dict[str, Any] = {name: () for name in config.records}
        return with_records(GenerateOutput(nothing, log_probs=jnp.zeros(nothing.shape)), config, records, 0)
    longest = max(int(state.step) if is_concrete(state.step) else new for state in finals)
    return output_of(request, prompt, finals, longest)


def output_of(request: Request, prompt: Prompt, finals: list[State], made: int) -> GenerateOutput:
    """What is answered, of the last state of each part."""
    config, state = request.config, finals[0]
    if config.num_beams > 1:
        output = beam_output(config, state, made, request.new_tokens)
    else:
        shown = state.shown if len(finals) == 1 else jnp.concatenate([each.shown for each in finals])
        output = GenerateOutput(shown[:, :made])
    if not config.return_dict_in_generate:
        return output
    records = dict(state.records)
    if not config.sliding_window:
        places = places_of(request, prompt, state)
        if config.num_beams == 1:
            output.past_key_values = kept(state, places, request.width)
        read = slice(request.past or 0, request.width)
        records |= {name: as_given(name, state, places, read, made) for name in INSIDE if name in records}
    return with_records(output, config, records, made)


def kept(state: State, places: Array, width: int) -> KVCache:
    """The cache to go on from, of the rows that are text, in the columns (R, N) that were given and made."""
    cache, rows = state.cache, len(places)

    def own(x: Array) -> Array:
        return moved(x[:rows], places, -2) if x.ndim == 4 else jax.vmap(own)(x)

    layers, cross = jax.tree.map(own, cache.layers), jax.tree.map(lambda x: x[..., :rows, :, :, :], cache.cross)
    return KVCache(layers, cross, jnp.asarray(width + state.step - 1, jnp.int32))


def places_of(request: Request, prompt: Prompt, state: State) -> Array:
    """Where in the cache each column is that was given, and each that was made after them: (R, width and room)

    What is no part of the window, as it is padding in every row, is beyond all caches.
    """
    (batch, length), window = request.ids.shape, state.window.mask.shape[1]
    place, rows = window - length + jnp.arange(length, dtype=jnp.int32), jnp.arange(batch, dtype=jnp.int32)[:, None]
    if request.past is not None:
        place = jnp.where(
            jnp.arange(length, dtype=jnp.int32) < request.past, jnp.arange(length, dtype=jnp.int32), place
        )
    found = jnp.full((batch, request.width), -1, jnp.int32).at[rows, jnp.asarray(request.order)].max(place)
    more = window + jnp.arange(state.cache.capacity - window, dtype=jnp.int32)
    whole = jnp.concatenate([found, jnp.broadcast_to(more, (batch, len(more)))], 1)
    return jnp.repeat(jnp.where(whole < 0, np.iinfo(np.int32).max, whole), len(state.ids) // batch, axis=0)


def moved(x: Array, places: Array, axis: int) -> Array:
    """x (R, ...) with these columns (R, N) of an axis, which is counted from behind; 0 for one that is not there."""
    shape = [len(places)] + [1] * (x.ndim - 1)
    shape[axis] = places.shape[1]
    return jnp.take_along_axis(x, places.reshape(shape), axis, mode="fill", fill_value=0)


def as_given(name: str, state: State, places: Array, read: slice, made: int) -> tuple[tuple[Array, ...], ...]:
    """What the model has shown at each step, in the columns that were given, of which the first step read some."""
    first, later = state.records[f"first_{name}"], state.records[name]
    queries = places[:, read] - (state.window.mask.shape[1] - first[0].shape[-2])

    def seen(x: Array, step: int) -> Array:
        return moved(x, places[:, : read.stop + step], -1) if name == "attentions" else x

    steps = [tuple(moved(x, queries, -2) for x in first), *(tuple(x[step] for x in later) for step in range(1, made))]
    return tuple(tuple(seen(x, step) for x in layers) for step, layers in enumerate(steps))


def with_records(
    output: GenerateOutput, config: GenerationConfig, records: Mapping[str, Any], made: int
) -> GenerateOutput:
    """The output with the records of so many steps: log_probs (R, made), and of the others a tuple."""
    for name in config.records:
        if name != "log_probs":
            setattr(output, name, tuple(records[name][step] for step in range(made)))
        elif output.log_probs is None:
            output.log_probs = records[name][:, : output.sequences.shape[1]]
    return output


def beam_output(config: GenerationConfig, state: State, made: int, new: int) -> GenerateOutput:
    """The best of the beams: their paths (B, K, N), cut to the longest that is returned."""
    several, found = config.num_return_sequences, state.beams.found
    tokens, log_probs, beams = found.best(several, config.fill_token_id)
    longest = int((beams >= 0).sum(-1).max()) if is_concrete(beams) else new
    output = GenerateOutput(tokens[:, :longest], log_probs=log_probs[:, :longest], beam_indices=beams[:, :longest])
    output.sequences_scores = found.scores[:, :several].reshape(-1)
    return output
