"""Generation in PyTorch: `generate`, `stream`, `stream_tokens` and `score`, between texts or ids and the loop.

B rows, T prompt length, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Array, Given, Request, check_assisted, check_streamed
from gpt2_multi.model import inputs
from gpt2_multi.model.outputs import GenerateOutput
from gpt2_multi.pt.attention import KVCache, upcast
from gpt2_multi.pt.generation.beams import BeamSearch, BeamState
from gpt2_multi.pt.generation.decoding import Prompt, Sampling, State, decode
from gpt2_multi.pt.generation.lookup import Assisted, Lookup
from gpt2_multi.pt.generation.rules import as_tensors
from gpt2_multi.pt.layers import facts, is_at_hand, to_numpy
from gpt2_multi.pt.model import as_cache
from gpt2_multi.pt.state import check_alike

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer


STRIDE = 8  # tokens that another device makes before it is asked whether all rows are over


def generate(
    self: Any,
    input_ids: Any = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
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
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown argument.
    """
    brought, config = Given.of(self.generation_config, input_ids, attention_mask, generation_config, given)
    with brought.callbacks.ended():
        request, prompt = request_of(self, config, brought)
        output = run(self, request, prompt, brought)
        front = torch.from_numpy(request.given).to(prompt.ids.device).repeat_interleave(config.num_return_sequences, 0)
        output.sequences = torch.cat([front, output.sequences], 1)
        return request.answer(output, None if request.prompts is None else to_numpy(output.sequences))


def stream(
    self: Any,
    text: str,
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: GPT2Tokenizer,
    **given: Any,
) -> Iterator[str]:
    """What `generate` appends to a text, piece by piece; no piece ends within a character."""
    given = {"tokenizer": tokenizer, **given}
    brought, config = Given.of(self.generation_config, text, None, generation_config, given)
    check_streamed(config, brought)
    request, prompt = request_of(self, config, brought)
    made = columns(self, request, prompt, brought)
    return texts.decode(tokenizer, (int(column[0]) for column in made), config, request.given[0].tolist())


def stream_tokens(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    **given: Any,
) -> Iterator[Tensor]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    brought, config = Given.of(self.generation_config, input_ids, attention_mask, generation_config, given)
    check_streamed(config, brought, is_text=False)
    if brought.input_ids is not None:
        facts("input_ids", brought.input_ids)  # of ids alone: a stream of texts is `stream`
    return columns(self, *request_of(self, config, brought), brought)


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

    check_alike(self, "texts", (texts, stride, batch_size))
    was_training = self.training
    try:
        self.eval()  # dropout would score another model
        return scoring.score(partial(log_probs, self), texts, tokenizer, self.config, stride, batch_size)
    finally:
        self.train(was_training)


@torch.no_grad()
def log_probs(model: Any, ids: Array, mask: Array) -> tuple[Array, Array]:
    """Of each id but the first its log-probability, given those before it, and whether none is likelier.

    (B, T) -> (B, T - 1) of both. The last id is not read, so that there may be one more than the model has positions.
    """
    given, keep = (torch.from_numpy(x).to(model.device) for x in (ids, mask))
    logits = model(given[:, :-1], attention_mask=keep[:, :-1], use_cache=False, return_dict=True).logits
    chosen = logits.gather(-1, given[:, 1:, None]).squeeze(-1)
    found = upcast(chosen) - upcast(logits).logsumexp(-1)
    return to_numpy(found), to_numpy(logits.argmax(-1) == given[:, 1:])


def request_of(model: Any, config: GenerationConfig, given: Given) -> tuple[Request, Prompt]:
    """Check what was given, and take it from tensors to NumPy."""
    found = {name: facts(name, x) for name, x in given.arrays.items()}
    stays = "inputs_embeds", "encoder_hidden_states", "encoder_attention_mask"
    arrays: dict[str, Any] = {name: to_numpy(x) for name, x in given.arrays.items() if name not in stays}
    rows = given._replace(**arrays)
    past = given.past_key_values
    past = None if past is None else as_cache(past, model.config.n_layer)
    states = found.get("encoder_hidden_states")
    request = Request.of(
        config, model.config, rows.input_ids, rows.attention_mask, given.tokenizer, given.callbacks,
        token_type_ids=rows.token_type_ids, embeds=found.get("inputs_embeds"),
        past=None if past is None else past.length, batch=1 if states is None else states.shape[0] or 0,
        negative=(rows.negative_prompt_ids, rows.negative_prompt_attention_mask),
    )  # fmt: skip
    inputs.check_states(model.config, len(request.ids), found)
    check_assisted(request, given)
    if hasattr(model, "device_mesh"):
        check_alike(
            model, "input_ids", (request.ids.tolist(), request.mask.tolist(), config.to_dict()), config.max_time
        )
    if past is not None:
        check_past(model, past, request)
    where = [x.device for x in (given.input_ids, given.inputs_embeds) if isinstance(x, Tensor)]
    return request, Prompt.of(request, [*where, model.device][0], given, past)


def check_past(model: Any, past: Any, request: Request) -> None:
    """A cache fits the prompts and what the model computes in, and has room if it is to be written in place."""
    if past.layers:
        key = past.layers[0][0]
        inputs.check_cache(key.shape[0], str(key.dtype), len(request.ids), str(model.dtype))
    if past.capacity is not None and request.config.rows == 1:
        new = request.ids.shape[1] - past.length + request.new_tokens - 1
        inputs.check_room(max(new, 0), past.length, past.capacity)


def stride_of(request: Request, prompt: Prompt) -> int:
    """After how many tokens to look whether all is over, where nobody sees those that are too many."""
    config, own = request.config, request.callbacks
    is_watched = config.return_dict_in_generate or own.see_ids or own.streamer is not None or prompt.past is not None
    return 1 if is_watched or is_at_hand(prompt.ids) else STRIDE


def strategy_of(model: Any, request: Request, given: Given, stride: int) -> Sampling | BeamSearch:
    """How tokens are chosen."""
    config, room, own = request.config, request.new_tokens, request.callbacks
    if config.num_beams > 1:
        records = tuple(name for name in config.records if name != "log_probs")  # which the paths have
        return BeamSearch(room, config.rows, records, torch.promote_types(model.dtype, torch.float32), own, stride)
    if given.assistant_model is not None:
        return Assisted(room, 1, config.records, own, 1, config.num_assistant_tokens, given.assistant_model)
    if config.prompt_lookup_num_tokens is not None:
        return Lookup(room, 1, config.records, own, 1, config.prompt_lookup_num_tokens)
    is_static = config.cache_implementation == "static" and not config.return_dict_in_generate
    return Sampling(room, config.rows, config.records, own, stride, is_static=is_static)


def parts(strategy: Sampling | BeamSearch, request: Request, prompt: Prompt) -> list[tuple[Prompt, Options]]:
    """The prompts that a loop is given at once, as tensors with their options: all, but one by one with guesses."""
    options, rows = as_tensors(request.options, prompt.ids.device), request.config.rows
    if not strategy.room or not len(prompt.ids):
        return []
    count = len(prompt.ids) * rows
    if not isinstance(strategy, Lookup) or (isinstance(strategy, Assisted) and count == 1):
        return [(prompt, options)]
    return [(prompt.row(i // rows), options.row(i)) for i in range(count)]


def loops(
    model: Any, request: Request, prompt: Prompt, given: Given, stride: int = 1, is_watched: bool = True
) -> list[Iterator[State]]:
    """The states of each part, after each of its steps."""
    strategy, config = strategy_of(model, request, given, stride), request.config
    until = math.inf if config.max_time is None else time.monotonic() + config.max_time
    split = parts(strategy, request, prompt)
    return [decode(model, part, strategy, options, until, is_watched) for part, options in split]


def columns(model: Any, request: Request, prompt: Prompt, given: Given) -> Iterator[Tensor]:
    """One token of each row after the other, until the length, or until all are finished."""
    fill = prompt.ids.new_full((1,), request.options.fill)
    made = [columns_of(states) for states in loops(model, request, prompt, given)]
    return (torch.cat(column) for column in zip_longest(*made, fillvalue=fill))


def columns_of(states: Iterator[State]) -> Iterator[Tensor]:
    """The columns (R,) that each state has more than the one before."""
    seen = 0
    for state in states:
        yield from state.shown[:, seen : state.step].unbind(1)
        seen = state.step


def streamed(states: Iterator[State], streamer: Any) -> Iterator[State]:
    """The states, whose new columns (R,) a streamer gets as soon as they are there."""
    seen = 0
    for state in states:
        for column in state.shown[:, seen : state.step].unbind(1):
            streamer.put(column.cpu())
        seen = state.step
        yield state


def run(model: Any, request: Request, prompt: Prompt, given: Given) -> GenerateOutput:
    """All new tokens (B * num_return_sequences, N), and what the options ask to be recorded."""
    config, streamer = request.config, request.callbacks.streamer
    is_watched = request.callbacks.see_ids or streamer is not None
    made = loops(model, request, prompt, given, stride_of(request, prompt), is_watched)
    if streamer is not None:
        inputs.check_together(len(made))
        streamer.put(torch.from_numpy(request.given).repeat_interleave(config.num_return_sequences, 0))
        made = [streamed(states, streamer) for states in made]
    finals: list[State] = []
    for states in made:
        *_, state = states
        finals.append(state)
    if not finals:
        nothing = prompt.ids.new_zeros(len(prompt.ids) * config.num_return_sequences, request.new_tokens)
        output = GenerateOutput(nothing, log_probs=torch.zeros(nothing.shape))
        return with_records(output, config, {name: [] for name in config.records})
    longest = max(state.made for state in finals)
    if isinstance(state, BeamState):
        output = beam_output(config, state)
    else:
        output = GenerateOutput(torch.cat([state.shown for state in finals])[:, :longest])
        is_wanted = config.return_dict_in_generate or prompt.past is not None  # which may be the caller's to fill
        if is_wanted and len(finals) == 1:
            output.past_key_values = kept(request, state, given, prompt.past)
    return with_records(output, config, as_given(request, state))


def kept(request: Request, state: State, given: Given, past: Any) -> Any:
    """The cache to go on from: the caller's own where it is written in place, or else a new one."""
    if request.config.sliding_window or state.extra:  # it has other columns than the text
        return None
    cache, rows, places = cast(KVCache, state.cache), len(state.ids), places_of(request, state)
    layers = [(k[:rows], v[:rows]) for k, v in cache]
    if past is not None and request.config.rows == 1 and (past.preallocated or not isinstance(past, KVCache)):
        for layer, pair in enumerate(layers):
            past.extend(layer, *(x[:, :, past.length :] for x in pair))
        past.length = cache.length
        return given.past_key_values
    if places is not None:
        layers = [(moved(k, places, 2, request), moved(v, places, 2, request)) for k, v in layers]
    found = KVCache(layers, layers[0][0].shape[2])
    found.cross = [(k[:rows], v[:rows]) for k, v in cache.cross]
    return found


def places_of(request: Request, state: State) -> Tensor | None:
    """Which of the columns that were read each that was given is, (R, W); None where they are the same."""
    places = request.places
    if places is None or request.config.sliding_window:
        return None
    return torch.from_numpy(places).to(state.ids.device).repeat_interleave(len(state.ids) // len(places), 0)


def moved(x: Tensor, places: Tensor, dim: int, request: Request) -> Tensor:
    """One of a dimension's columns for each that was given, and those that were made after them."""
    rest = torch.arange(request.ids.shape[1], x.shape[dim], device=x.device)
    index = torch.cat([places, rest.expand(len(places), -1)], 1)
    return x.take_along_dim(index.view(len(index), *(-1 if i == dim else 1 for i in range(1, x.dim()))), dim)


def as_given(request: Request, state: State) -> dict[str, list[Any]]:
    """The records, in which what is of columns is of those that were given."""
    places, records = places_of(request, state), dict(state.records)
    if places is not None and records.get("hidden_states"):
        first, *rest = records["hidden_states"]
        records["hidden_states"] = [tuple(moved(x, places, 1, request) for x in first), *rest]
    if places is not None and records.get("attentions"):
        first, *rest = records["attentions"]
        steps = [tuple(moved(x, places, 2, request) for x in first), *rest]
        records["attentions"] = [tuple(moved(x, places, 3, request) for x in layers) for layers in steps]
    return records


def with_records(output: GenerateOutput, config: GenerationConfig, records: dict[str, list[Any]]) -> GenerateOutput:
    """The output with the records of all steps: log_probs (B, N), and of the others a tuple."""
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
    return output
