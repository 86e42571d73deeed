"""Generation in TensorFlow: `generate`, `stream`, `stream_tokens` and `score`, between texts or ids and the loop.

B rows, T prompt length, V vocabulary. Lengths come in buckets, so that another prompt rarely traces or compiles
anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.generation import texts
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Array, Given, Request, check_assisted, check_streamed
from gpt2_multi.generation.rules import bucket
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput
from gpt2_multi.tf.attention import KVCache, upcast
from gpt2_multi.tf.fit.arguments import tensor
from gpt2_multi.tf.generation.beams import BeamSearch, BeamState
from gpt2_multi.tf.generation.decoders import Decoders, helper_of
from gpt2_multi.tf.generation.decoding import INSIDE, Prompt, Sampling, State, begins, slide
from gpt2_multi.tf.generation.lookup import Assisted, Lookup
from gpt2_multi.tf.generation.rules import as_tensors
from gpt2_multi.tf.generation.tracing import traced, traced_request
from gpt2_multi.tf.layers import facts, sizes
from gpt2_multi.tf.model import as_cache

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

TIMED = 4  # tokens from one look at the clock to the next


def generate(
    self: keras.Model,
    input_ids: tf.Tensor | str | Sequence[str] | None = None,
    attention_mask: tf.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    jit_compile: bool | None = None,
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
    assistant_model.
    The loop is compiled by XLA unless `jit_compile` is False. Called while another function is traced, it becomes a
    part of that, and always returns the greatest length; a prompt of unknown length needs `max_new_tokens`.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown argument.
    """
    brought, config = Given.of(self.generation_config, input_ids, attention_mask, generation_config, given)
    with brought.callbacks.ended():
        request, prompt = request_of(self, config, brought)
        made = loops(self, request, prompt, brought, jit_compile in (None, True))
        finals: list[Any] = []
        for states in made:
            finals += deque(states, 1)
        output = output_of(request, finals)
        ids = brought.arrays.get("input_ids", request.given)
        front = tf.repeat(tf.convert_to_tensor(ids), config.num_return_sequences, axis=0)
        output.sequences = tf.concat([front, tf.cast(output.sequences, front.dtype)], 1)
        return request.answer(output, None if request.prompts is None else output.sequences.numpy())


def stream(
    self: keras.Model,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    jit_compile: bool | None = None,
    **given: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    given = {"tokenizer": tokenizer, **given}
    brought, config = Given.of(self.generation_config, text, None, generation_config, given)
    check_streamed(config, brought)
    request, prompt = request_of(self, config, brought)
    made = columns(self, request, prompt, brought, jit_compile in (None, True))
    return texts.decode(tokenizer, (int(column[0]) for column in made), config, request.given[0].tolist())


def stream_tokens(
    self: keras.Model,
    input_ids: tf.Tensor | None = None,
    attention_mask: tf.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    jit_compile: bool | None = None,
    **given: Any,
) -> Iterator[tf.Tensor]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    brought, config = Given.of(self.generation_config, input_ids, attention_mask, generation_config, given)
    check_streamed(config, brought, is_text=False)
    return columns(self, *request_of(self, config, brought), brought, jit_compile in (None, True))


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


def log_probs(model: keras.Model, ids: Array, mask: Array) -> tuple[Array, Array]:
    """Of each id but the first its log-probability, given those before it, and whether none is likelier.

    (B, T) -> (B, T - 1) of both. The last id is not read, so that there may be one more than the model has positions.
    """
    logits = upcast(model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False, return_dict=True).logits)
    chosen = tf.gather(logits, tf.constant(ids[:, 1:]), batch_dims=2)
    found = chosen - tf.reduce_logsumexp(logits, -1)
    return np.asarray(found), np.asarray(tf.argmax(logits, -1)) == ids[:, 1:]


def request_of(model: keras.Model, config: GenerationConfig, given: Given) -> tuple[Request, Prompt]:
    """What a call asks for, checked, and its prompts as tensors."""
    given = given._replace(**{name: tensor(name, x) for name, x in given.arrays.items()})
    found = {name: facts(name, x) for name, x in given.arrays.items()}
    inputs.check_numbers("attention_mask", found)
    past, states = given.past_key_values, given.encoder_hidden_states
    past = None if past is None else as_cache(past, model.config.n_layer)
    if not tf.executing_eagerly():
        request = traced_request(config, model.config, given, found.get("inputs_embeds"))
    else:
        request = Request.of(
            config, model.config, given.input_ids, given.attention_mask, given.tokenizer, given.callbacks,
            token_type_ids=given.token_type_ids, embeds=found.get("inputs_embeds"),
            past=None if past is None else past.length, batch=1 if states is None else states.shape[0],
            negative=(given.negative_prompt_ids, given.negative_prompt_attention_mask),
        )  # fmt: skip
        check_assisted(request, given)
    inputs.check_states(model.config, request.ids.shape[0], found)
    if past is not None:
        check_past(model, past, request)
    return request, Prompt.of(request, given, past)


def check_past(model: keras.Model, past: KVCache, request: Request) -> None:
    """A cache fits the prompts and what the model computes in."""
    if past.layers:
        key = past.layers[0][0]
        inputs.check_cache(key.shape[0], key.dtype.name, len(request.ids), model.compute_dtype)


def strategy_of(request: Request, given: Given, callbacks: Callbacks, room: Any) -> Sampling | BeamSearch | Lookup:
    """How tokens are chosen, of which there is room for so many; `callbacks` are those of the compiled functions."""
    config = request.config
    steered = config.is_guided, callbacks
    if config.num_beams > 1:
        records = tuple(name for name in config.records if name != "log_probs")  # which the paths have
        return BeamSearch(room, config.rows, records, *steered)
    if given.assistant_model is not None and can_read(given.assistant_model, request):
        return Assisted(room, 1, config.records, *steered, config.num_assistant_tokens, given.assistant_model)
    if config.prompt_lookup_num_tokens is not None:
        return Lookup(room, 1, config.records, *steered, config.prompt_lookup_num_tokens)
    return Sampling(room, config.rows, config.records, *steered)


def can_read(assistant: Any, request: Request) -> bool:
    """Whether an assistant has positions enough to guess what follows the prompts."""
    return int(request.mask.sum(-1).max(initial=0)) < int(assistant.config.n_positions)


def parts(request: Request, prompt: Prompt, given: Given) -> list[tuple[Prompt, Options]]:
    """The prompts that are continued together, and their options: each row alone with guesses, otherwise all."""
    options, count, rows = as_tensors(request.options), request.ids.shape[0], request.config.rows
    guesses = given.assistant_model is not None or request.config.prompt_lookup_num_tokens is not None
    if not guesses or not count or count * rows == 1:
        return [(prompt, options)]
    return [(prompt.row(row // rows), options.row(row)) for row in range(count * rows)]


def loops(
    model: keras.Model, request: Request, prompt: Prompt, given: Given, jit: bool, is_streamed: bool = False
) -> list[Iterator[Any]]:
    """The states of each part: of all tokens at once, or where they are streamed of one after the other."""
    max_time, new, streamer = request.config.max_time, request.new_tokens, given.streamer
    stride = 1 if is_streamed or streamer is not None else new
    end = inf if max_time is None else monotonic() + max_time
    made = [run(model, request, part, given, stride, jit, end) for part in parts(request, prompt, given)]
    if streamer is None:
        return made
    inputs.check_together(len(made))
    streamer.put(np.repeat(request.given, request.config.num_return_sequences, axis=0))
    return [streamed(states, new, streamer) for states in made]


def columns(model: keras.Model, request: Request, prompt: Prompt, given: Given, jit: bool) -> Iterator[tf.Tensor]:
    """One token of each row after the other, until the length, or until all are finished."""
    made = loops(model, request, prompt, given, jit, True)
    alone = [columns_of(states, request.new_tokens) for states in made]
    fill = tf.constant([request.options.fill])
    return (tf.concat(column, 0) for column in zip_longest(*alone, fillvalue=fill))


def columns_of(states: Iterator[State], new: int) -> Iterator[tf.Tensor]:
    """The columns (B,) that each state has more than the one before, `new` in all."""
    seen = 0
    for state in states:
        made = min(int(state.step), new)
        yield from tf.unstack(state.shown[:, seen:made], axis=1)
        seen = made


def streamed(states: Iterator[Any], new: int, streamer: Any) -> Iterator[Any]:
    """The states, whose new columns (R,) a streamer gets as soon as they are there."""
    seen = 0
    for state in states:
        for column in state.shown[:, seen : min(int(state.step), new)].numpy().T:
            streamer.put(column)
        seen = int(state.step)
        yield state


def run(
    model: keras.Model, request: Request, part: tuple[Prompt, Options], given: Given, stride: int, jit: bool, end: float
) -> Iterator[Any]:
    """The states of these prompts: in which nothing is made, and after every `stride` tokens or more, up to the last.

    Where a window slides, each of its places is another prompt to read. After the time `end`, nothing follows.
    """
    (prompt, options), new, longest = part, request.new_tokens, request.model.n_positions
    if not tf.executing_eagerly():
        yield traced(model, strategy_of(request, given, request.callbacks, new), prompt, options, new)
        return
    decoders, prompt = Decoders.of(model, jit, request.callbacks, given.assistant_model), prompt.bucketed()
    prompt = prompt if prompt.past is None else prompt.after(request)
    strategy, step = strategy_of(request, given, decoders.callbacks, bucket(new)), 0
    wide = prompt.text().repeated(strategy.rows)
    state: Any = strategy.start(model, wide, options)
    wide = wide._replace(embeds=None)
    yield state
    while step < new and strategy.is_open(state):
        window, rows, room, full = prompt, strategy.rows, strategy.room, new
        if request.config.sliding_window:
            window, count = slide(wide, state, longest)
            rows, room, full = 1, bucket(longest - count), min(step + longest - count + 1, new)
        if isinstance(strategy, Assisted):
            state = state._replace(helper=helper_of(strategy, prompt, jit))
        if begins(strategy, prompt):
            state, step = decoders.begin(prompt, strategy, state, tf.constant(new), options), 1
            state = within(end, strategy, state, options)
            yield state
        else:
            cache, keep = decoders.prefill(window, room + strategy.guesses, rows)
            state = state._replace(cache=cache, keep=keep)
        while step < full and strategy.is_open(state):
            until = min(step + (stride if end == inf else min(stride, TIMED if step else 1)), full)
            state = decoders.decode(wide, strategy, state, tf.constant(until), tf.constant(new), options)
            state, step = within(end, strategy, state, options), int(state.step)
            yield state


def within(end: float, strategy: Any, state: Any, options: Options) -> Any:
    """The state, to which nothing follows after the time `end`."""
    return strategy.finish(state, options) if monotonic() >= end else state


def output_of(request: Request, finals: list[Any]) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, N), and what the options ask to be recorded, of the last states."""
    new = made = request.new_tokens
    if tf.executing_eagerly() and len(request.ids):
        made = min(max(int(state.step) for state in finals), new)
    if isinstance(finals[0], BeamState):
        return beam_output(request, finals[0], made)
    tokens = tf.concat([state.shown for state in finals], 0)[:, :made]
    output = with_records(GenerateOutput(tokens), request, finals[0], made)
    if request.config.return_dict_in_generate and len(finals) == 1:
        output.past_key_values = kept(request, finals[0], made)
    return output


def kept(request: Request, state: State, made: int) -> KVCache | None:
    """The cache of all tokens but the last, in the columns that the caller gave; None where it is not whole."""
    if not made or request.config.sliding_window or not tf.executing_eagerly():
        return None
    rows, index = sizes(state.ids)[0], places_of(request, state, made - 1)
    layers = tuple((moved(key[:rows], index, 2), moved(value[:rows], index, 2)) for key, value in state.cache.layers)
    return KVCache(layers, tuple((key[:rows], value[:rows]) for key, value in state.cache.cross))


def places_of(request: Request, state: Any, more: int) -> tf.Tensor:
    """Where the tokens that the caller gave stand in a cache, and so many after them: (N,), or (R, N) in each row."""
    past, width = request.past or 0, width_of(request, state)
    length = sizes(tf.convert_to_tensor(request.ids))[1]
    read = tf.concat([tf.range(past), tf.range(width - (length - past), width + more)], 0)
    if not tf.executing_eagerly() or (places := request.places) is None:
        return read
    rest = np.arange(length, read.shape[0])[None].repeat(len(places), 0)
    index = tf.gather(read, np.concatenate([places, rest], 1))
    return tf.repeat(index, sizes(state.ids)[0] // len(places), axis=0)


def width_of(request: Request, state: Any) -> Any:
    """How many columns of a cache were read before anything was made."""
    if request.past:
        return bucket(request.past) + bucket(request.ids.shape[1] - request.past)
    return sizes(state.ids)[1] - sizes(state.shown if isinstance(state, State) else state.running.tokens)[-1]


def moved(x: tf.Tensor, index: tf.Tensor, axis: int) -> tf.Tensor:
    """Some of an axis: index (N,), or (R, N) for each row of its own."""
    return tf.gather(x, index, axis=axis, batch_dims=index.shape.rank - 1)


def as_given(request: Request, state: Any, name: str, made: int) -> Iterator[tuple[tf.Tensor, ...]]:
    """Of each step what each layer shows, in the first one for the whole prompts; all in the caller's columns."""
    for step in range(made):
        found = [layer[step] for layer in state.records[name]]  # of (R, 1, E), or (R, H, 1, S)
        keys = places_of(request, state, step)
        if not step:
            found = state.records[f"first_{name}"]  # of (R, N, E), or (R, H, N, W)
            queries = keys[..., request.past or 0 :] - (width_of(request, state) - sizes(found[0])[-2])
            found = [moved(x, queries, -2) for x in found]
        yield tuple(moved(x, keys, -1) if name == "attentions" else x for x in found)


def with_records(output: GenerateOutput, request: Request, state: Any, made: int) -> GenerateOutput:
    """The output with the records of the steps that were made: log_probs (B, N), and of the others a tuple."""
    for name in request.config.records:
        records = state.records.get(name)
        if name in INSIDE:
            setattr(output, name, tuple(as_given(request, state, name, made)))
        elif name != "log_probs":
            setattr(output, name, tuple(tf.unstack(records[:made])))
        elif output.log_probs is None:
            output.log_probs = tf.transpose(records[:made])
    return output


def beam_output(request: Request, state: BeamState, made: int) -> GenerateOutput:
    """The best of the beams: their paths (B, K, N), cut to the longest that is returned."""
    several, longest = request.config.num_return_sequences, made
    tokens, log_probs, beams = state.found.best(several, request.config.fill_token_id)
    if tf.executing_eagerly() and len(tokens):
        longest = int(tf.reduce_max(tf.math.count_nonzero(beams >= 0, -1)))
    output = GenerateOutput(tokens[:, :longest], log_probs=log_probs[:, :longest], beam_indices=beams[:, :longest])
    output.sequences_scores = tf.reshape(state.found.scores[:, :several], [-1])
    return with_records(output, request, state, made)
