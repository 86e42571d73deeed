"""Generation in Flax: `generate`, `stream` and `score`, which check their input and choose how the loop goes on.

The loop is compiled. Lengths come in buckets, so that another prompt rarely compiles anything. Under the user's `jit`,
`params` being an argument, the loop becomes a part of that. B prompts, R rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt2_multi.errors import InputError
from gpt2_multi.flax.attention import upcast
from gpt2_multi.flax.checks import as_array, check_states, is_concrete
from gpt2_multi.flax.generation.beams import BeamSearch
from gpt2_multi.flax.generation.decoding import Prompt, Sampling, State, align, decode, prefill, slide
from gpt2_multi.flax.generation.lookup import Lookup
from gpt2_multi.flax.generation.rules import as_tensors
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.generation import scoring, texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Request, new_tokens_after, options_of
from gpt2_multi.generation.rules import bucket
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


def generate(
    self: Any,
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
    Another `__call__`, and methods that are intercepted, steer the loop; it is compiled anew at each call then.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown option.
    """
    config = self.generation_config.resolve(generation_config, options)
    states, states_mask = encoder_hidden_states, encoder_attention_mask
    request = request_of(self, config, input_ids, attention_mask, tokenizer, states, states_mask)
    output = run(self, self.fitting(params), request, Prompt.of(request, states, states_mask))
    given = as_array("input_ids", input_ids if request.prompts is None else request.given)
    prompts = jnp.repeat(given, config.num_return_sequences, axis=0)
    output.sequences = jnp.concatenate([prompts, output.sequences.astype(prompts.dtype)], 1)
    return request.answer(output, None if request.prompts is None else np.asarray(output.sequences))


def stream(
    self: Any,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    params: Tree | None = None,
    **options: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    config = self.generation_config.resolve(generation_config, options)
    request = Request.of_text(config, self.config, text, tokenizer)
    made = columns(self, self.fitting(params), request, Prompt.of(request, None, None))
    return texts.decode(tokenizer, (int(column[0]) for column in made), config)


def stream_tokens(
    self: Any,
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
    states, states_mask = encoder_hidden_states, encoder_attention_mask
    request = request_of(self, config, input_ids, attention_mask, tokenizer, states, states_mask)
    prompt, params = Prompt.of(request, states, states_mask), self.fitting(params)
    if is_traced(params, prompt):
        raise InputError("stream_tokens: cannot give one token after the other while it is traced; call generate there")
    return columns(self, params, request, prompt)


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
    return scoring.score(partial(log_probs, self, params), texts, tokenizer, self.config, stride, batch_size)


def log_probs(model: Any, params: Tree | None, ids: scoring.Array, mask: scoring.Array) -> scoring.Array:
    """The log-probability of each id but the first, given those before it: (B, T) -> (B, T - 1)

    Lengths are filled up to a bucket, so that few are compiled.
    """
    length = ids.shape[1]
    more = [(0, 0), (0, min(bucket(length), model.config.n_positions) - length)]
    ids, mask = np.pad(ids, more), np.pad(mask, more)
    logits = model(ids, mask, params=params, return_dict=True).logits[:, :-1]
    return np.asarray(_log_probs_of(logits, ids[:, 1:]))[:, : length - 1]


@jax.jit
def _log_probs_of(logits: Array, ids: Array) -> Array:
    logits = upcast(logits)
    return jnp.take_along_axis(logits, ids[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)


def request_of(
    model: Any,
    config: GenerationConfig,
    ids: Any,
    mask: Any,
    tokenizer: GPT2Tokenizer | None,
    states: Any,
    states_mask: Any,
) -> Request:
    """What a call was given, checked, but for the values of ids and a mask that are traced."""
    if not texts.are_texts(ids):
        ids, mask = as_array("input_ids", ids), as_array("attention_mask", mask)
    if is_traced(ids, mask):
        request = traced_request(model, config, ids, mask, tokenizer)
    else:
        ids, mask = (np.asarray(x) if isinstance(x, Array) else x for x in (ids, mask))
        request = Request.of(config, model.config, ids, mask, tokenizer)
    states, states_mask = as_array("encoder_hidden_states", states), as_array("encoder_attention_mask", states_mask)
    check_states(model.config, len(request.ids), states, states_mask)
    return request


def traced_request(
    model: Any, config: GenerationConfig, ids: Array, mask: Array | None, tokenizer: GPT2Tokenizer | None
) -> Request:
    """The same for ids (B, T) and a mask of which only the shapes are known."""
    inputs.check_shape("input_ids", ids.shape, (None, None))
    mask = jnp.ones(ids.shape, bool) if mask is None else mask != 0
    inputs.check_shape("attention_mask", mask.shape, ids.shape)
    inputs.check_integers("input_ids", ids.dtype, bool(jnp.issubdtype(ids.dtype, jnp.integer)))
    new, options = new_tokens_after(config, ids.shape[1]), options_of(config, model.config, len(ids), tokenizer)
    traced: Any = (ids, *align(ids, mask))
    return Request(config, model.config, tokenizer, None, traced[0], traced[1], traced[2], new, options)


def is_traced(*trees: Any) -> bool:
    """Whether anything in these trees has no value yet."""
    return not all(map(is_concrete, jax.tree.leaves(trees)))


def strategy_of(request: Request) -> Sampling:
    """How a request goes on."""
    config, guesses = request.config, request.config.prompt_lookup_num_tokens
    room = bucket(request.new_tokens + (guesses or 0))
    if guesses is not None:
        return Lookup(room, guesses=guesses)
    return (BeamSearch if config.num_beams > 1 else Sampling)(room, config.rows, config.records)


@dataclass(frozen=True)
class Decoders:
    """The compiled functions of a model; `decode` writes over the state that it is given."""

    start: Callable[..., State]
    prefill: Callable[..., dict[str, Any]]
    decode: Callable[..., State]

    @classmethod
    def of(cls, model: Any) -> Decoders:
        """Those of a model, which are compiled when they are first called."""
        return cls(
            jax.jit(lambda strategy, prompt, options: strategy.start(model, prompt, options), static_argnums=0),
            jax.jit(partial(prefill, model), static_argnums=(2, 3)),
            jax.jit(partial(decode, model), static_argnums=2, donate_argnums=1),
        )


def columns(model: Any, params: Tree, request: Request, prompt: Prompt) -> Iterator[Array]:
    """One token of each row, (R,), after the other, until the length, or until all are finished."""
    if not request.new_tokens or not len(prompt.ids):
        return iter(())
    model.renew()
    made = [columns_of(states_of(model, params, request, *part, stride=1)) for part in parts_of(request, prompt)]
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


def parts_of(request: Request, prompt: Prompt) -> list[tuple[Prompt, Options]]:
    """What goes on together: all rows, but with guesses, of which some come true in one row only, each row alone."""
    options = as_tensors(request.options)
    if request.config.prompt_lookup_num_tokens is None:
        return [(prompt, options)]
    return [(prompt.row(row), options.row(row)) for row in range(len(prompt.ids))]


def states_of(
    model: Any, params: Tree, request: Request, prompt: Prompt, options: Options, stride: int
) -> Iterator[State]:
    """The states after every `stride` tokens or more, and where a window is full, which slides and is read anew."""
    new, longest, strategy = request.new_tokens, model.config.n_positions, strategy_of(request)
    sliding, room = request.config.sliding_window, min(max(longest // 2, 1), request.new_tokens)
    state, step, until = model.decoders.start(strategy, prompt, options), 0, 0 if sliding else new
    if not sliding:
        state = state._replace(**model.decoders.prefill(params, prompt, strategy.room, strategy.rows))
    while step < new:
        if step == until:
            window = slide(prompt.repeated(strategy.rows), state, longest)
            until = min(step + min(longest + 1 - int(window.mask.sum(-1).max()), room), new)
            state = state._replace(**model.decoders.prefill(params, window, bucket(room), 1))
        reached = min(step + stride, until)
        state = model.decoders.decode(params, state, strategy, reached, new, options)
        yield state
        if reached == new or not strategy.is_open(state):
            return
        step = int(state.step)


def run(model: Any, params: Tree, request: Request, prompt: Prompt) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, new), and what the options ask to be recorded."""
    config, new = request.config, request.new_tokens
    rows = len(prompt.ids) * config.num_return_sequences
    if not new or not rows:
        nothing = {"log_probs": jnp.zeros((rows, new)), "scores": (), "logits": ()}
        return with_records(GenerateOutput(jnp.zeros((rows, new), jnp.int32)), config, nothing, 0)
    check_guided(config, is_traced(params, prompt))
    model.renew()
    if config.sliding_window or config.prompt_lookup_num_tokens is not None:
        states = (states_of(model, params, request, *part, stride=new) for part in parts_of(request, prompt))
        ends = [list(parts)[-1] for parts in states]
        made = max(int(end.step) for end in ends)
        shown = jnp.concatenate([end.shown for end in ends])[:, :made]
        return with_records(GenerateOutput(shown), config, ends[0].records, made)
    strategy, options = strategy_of(request), as_tensors(request.options)
    state = model.decoders.start(strategy, prompt, options)
    state = state._replace(**model.decoders.prefill(params, prompt, strategy.room, strategy.rows))
    state = model.decoders.decode(params, state, strategy, new, new, options)
    made = int(state.step) if is_concrete(state.step) else new
    if config.num_beams > 1:
        return beam_output(config, state, made, new)
    return with_records(GenerateOutput(state.shown[:, :made]), config, state.records, made)


def check_guided(config: GenerationConfig, traced: bool) -> None:
    """A loop that is guided from outside cannot be part of another function."""
    for name, is_on in (
        ("sliding_window", config.sliding_window),
        ("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens is not None),
    ):
        if traced and is_on:
            raise InputError(f"{name}: cannot be used while generate is traced; leave it out, or call it outside")


def with_records(
    output: GenerateOutput, config: GenerationConfig, records: Mapping[str, Any], made: int
) -> GenerateOutput:
    """The output with the records of so many steps: scores and logits a tuple, log_probs (R, made)."""
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
    return with_records(output, config, state.records, made)
