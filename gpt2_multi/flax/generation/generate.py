"""Generation in Flax: `generate`, `stream` and `score`, which check their input and choose how the loop goes on.

The loop is compiled. Lengths come in buckets, so that another prompt rarely compiles anything. Under the user's `jit`,
`params` being an argument, the loop becomes a part of that. B prompts, R rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt2_multi.errors import InputError
from gpt2_multi.flax.generation.beams import BeamSearch
from gpt2_multi.flax.generation.decoders import kernels_of, log_probs_of, states_of
from gpt2_multi.flax.generation.decoding import Prompt, Sampling, State
from gpt2_multi.flax.generation.lookup import Lookup
from gpt2_multi.flax.generation.rules import as_tensors
from gpt2_multi.flax.generation.tracing import check_guided, is_traced, traced_request
from gpt2_multi.flax.layers import as_array, facts, is_concrete
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Array as NumPyArray
from gpt2_multi.generation.request import Request
from gpt2_multi.generation.rules import bucket
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput

if TYPE_CHECKING:
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
    from gpt2_multi.generation import scoring  # which few programs need

    return scoring.score(partial(log_probs, self, params), texts, tokenizer, self.config, stride, batch_size)


def log_probs(model: Any, params: Tree | None, ids: NumPyArray, mask: NumPyArray) -> NumPyArray:
    """The log-probability of each id but the first, given those before it: (B, T) -> (B, T - 1)

    Lengths are filled up to a bucket, so that few are compiled.
    """
    length = ids.shape[1]
    more = [(0, 0), (0, min(bucket(length), model.config.n_positions) - length)]
    ids, mask = np.pad(ids, more), np.pad(mask, more)
    logits = model(ids, mask, params=params, return_dict=True).logits[:, :-1]
    return np.asarray(log_probs_of(logits, ids[:, 1:]))[:, : length - 1]


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
    encoder = {"encoder_hidden_states": states, "encoder_attention_mask": states_mask}
    found = {name: facts(as_array(name, x)) for name, x in encoder.items() if x is not None}
    inputs.check_states(model.config, len(request.ids), found)
    return request


def strategy_of(request: Request) -> Sampling:
    """How a request goes on."""
    config, guesses = request.config, request.config.prompt_lookup_num_tokens
    room = bucket(request.new_tokens + (guesses or 0))
    if guesses is not None:
        return Lookup(room, guesses=guesses)
    return (BeamSearch if config.num_beams > 1 else Sampling)(room, config.rows, config.records)


def parts(request: Request, prompt: Prompt) -> list[tuple[Prompt, Options]]:
    """What goes on together: all rows; but each row alone with guesses, which come true in one row and not in another.

    Nothing, where there is no row, or no token to come.
    """
    if not request.new_tokens or not len(prompt.ids):
        return []
    options = as_tensors(request.options)
    if request.config.prompt_lookup_num_tokens is None:
        return [(prompt, options)]
    return [(prompt.row(row), options.row(row)) for row in range(len(prompt.ids))]


def columns(model: Any, params: Tree, request: Request, prompt: Prompt) -> Iterator[Array]:
    """One token of each row, (R,), after the other, until the length, or until all are finished."""
    model.renew()
    strategy, each = strategy_of(request), parts(request, prompt)
    made = [columns_of(states_of(model, params, request, strategy, *part, 1, {})) for part in each]
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


def run(model: Any, params: Tree, request: Request, prompt: Prompt) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, new), and what the options ask to be recorded."""
    config, new = request.config, request.new_tokens
    rows = len(prompt.ids) * config.num_return_sequences
    if not new or not rows:
        nothing = {"log_probs": jnp.zeros((rows, new)), "scores": (), "logits": ()}
        return with_records(GenerateOutput(jnp.zeros((rows, new), jnp.int32)), config, nothing, 0)
    check_guided(config, is_traced(params, prompt))
    model.renew()
    strategy, each = strategy_of(request), parts(request, prompt)
    kernels = kernels_of(model, params, strategy, each[0][0])
    if config.sliding_window or config.prompt_lookup_num_tokens is not None:
        loops = (states_of(model, params, request, strategy, *part, new, kernels) for part in each)
        ends = [list(loop)[-1] for loop in loops]
    else:
        ((prompt, options),) = each
        state = model.decoders.start(strategy, prompt, options)
        state = state._replace(**model.decoders.prefill(params, prompt, strategy.room, strategy.rows))
        ends = [model.decoders.decode(params, state, strategy, new, new, options, kernels)]
    made = max(int(end.step) if is_concrete(end.step) else new for end in ends)
    if config.num_beams > 1:
        return beam_output(config, ends[0], made, new)
    shown = jnp.concatenate([end.shown for end in ends]) if len(ends) > 1 else ends[0].shown
    return with_records(GenerateOutput(shown[:, :made]), config, ends[0].records, made)


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
