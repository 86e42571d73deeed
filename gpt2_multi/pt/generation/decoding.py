"""Decoding in PyTorch: the loop in which a model reads texts into a cache and a strategy chooses what follows.

The model is called as anybody calls it. B prompts, R rows (each prompt in several), T prompt length, N tokens of a
step, V vocabulary. Guided rows are read twice, with what they are led away from after them.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_multi.errors import InputError
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import NO_CALLBACKS, Given, Request, order_of
from gpt2_multi.generation.rules import window_start
from gpt2_multi.model import inputs
from gpt2_multi.pt.attention import Borrowed, KVCache, upcast
from gpt2_multi.pt.generation import graphs
from gpt2_multi.pt.generation.cpu_kernels import Kernels, is_own
from gpt2_multi.pt.generation.packing import borrow
from gpt2_multi.pt.generation.rules import Kept, choose, ends, guide, process, without
from gpt2_multi.pt.layers import to_numpy
from gpt2_multi.pt.model import as_cache

Reader = Callable[[Any, Tensor, int], Tensor]  # (state, tokens, count) -> logits, see `decode_step`
INSIDE = ("hidden_states", "attentions")  # records of what the model shows besides logits


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), booleans
    states: Tensor | None = None  # (B, encoder length, E)
    states_mask: Tensor | None = None  # (B, encoder length)
    types: Tensor | None = None  # (B, T)
    embeds: Tensor | None = None  # (B, T, E), which are read in the place of ids
    negative: Tensor | None = None  # (B, T), the ids of what is guided away from
    negative_mask: Tensor | None = None  # (B, T)
    past: KVCache | Borrowed | None = None  # of the first columns, which are not read again
    first: int = 0  # which of all prompts the first row is
    unseen: int = 0  # how many columns are no part of the caller's text

    @classmethod
    def of(cls, request: Request, device: torch.device, given: Given, past: KVCache | Borrowed | None) -> Prompt:
        """The rows of a request, on a device."""

        def on_device(x: np.ndarray[Any, Any] | None) -> Tensor | None:
            return None if x is None else torch.from_numpy(x).to(device)

        rows = request.ids, request.mask, request.types, *(request.negative or (None, None))
        ids, mask, types, negative, negative_mask = map(on_device, rows)
        embeds = given.inputs_embeds
        if embeds is not None:
            embeds = embeds.take_along_dim(cast(Tensor, on_device(request.order))[..., None], 1)
        encoder = given.encoder_hidden_states, given.encoder_attention_mask
        unseen = 0 if request.given.shape[1] else request.ids.shape[1]
        return cls(ids, mask, *encoder, types, embeds, negative, negative_mask, past, unseen=unseen)  # type: ignore[arg-type]

    def each(self, function: Callable[[Tensor], Tensor]) -> Prompt:
        """The same with every tensor changed."""
        return Prompt(*(function(x) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]

    def repeated(self, rows: int) -> Prompt:
        """Each row so many times."""
        return self.each(lambda x: x.repeat_interleave(rows, 0))

    def doubled(self) -> Prompt:
        """All that is read: after the rows, those that they are guided away from."""
        if self.negative is None:
            return self
        ids, mask = torch.cat([self.ids, self.negative]), torch.cat([self.mask, cast(Tensor, self.negative_mask)])
        return self.each(lambda x: torch.cat([x, x]))._replace(ids=ids, mask=mask)

    def row(self, row: int) -> Prompt:
        """One row alone, without padding as far as nothing beside it needs that."""
        alone = self.each(lambda x: x[row : row + 1])._replace(first=row)
        keep = alone.mask[0] if alone.negative_mask is None else alone.mask[0] | alone.negative_mask[0]
        names = ("ids", "mask", "types", "negative", "negative_mask")
        there = {name: x[:, keep] for name in names if (x := getattr(alone, name)) is not None}
        return alone._replace(**there)


@dataclass
class State:
    """What the loop carries from one token to the next."""

    ids: Tensor  # (R, T + room), the prompts and what was made
    mask: Tensor  # (R, T + room), which of them count
    length: int  # how many of them are there
    shown: Tensor  # (R, room), what the caller sees of what was made: filling where a row is finished
    finished: Tensor  # (R,)
    stop: Tensor  # (R,), the states of the stop strings
    records: dict[str, list[Any]]  # of each step: scores and logits (R, V), log_probs (R,); of INSIDE, of each layer
    first: int = 0  # which of all prompts the first row continues
    unseen: int = 0  # how many columns of ids are no part of the caller's text
    is_guided: bool = False  # whether there are rows that these are led away from
    late: float = math.inf  # when there is no time for more
    step: int = 0  # how many tokens were made
    needed: Tensor | None = None  # () how many of them before all rows were over, where nobody looked in between
    cache: KVCache | None = None  # of all tokens but the last
    keep: Tensor | None = None  # (R, the cache's room), which of its keys count; None where all do
    extra: int = 0  # how many of its keys are no tokens of the text, but of an adapter's
    types: Tensor | None = None  # (R, 1), of each token that is made
    encoder: dict[str, Tensor] = field(default_factory=dict)  # its states (R, encoder length, E) and their mask
    reader: Reader | None = None  # of the tokens after the prompt
    is_watched: bool = False  # whether somebody else's code runs between the steps, and may change the model

    @classmethod
    def of(cls, prompt: Prompt, rows: int, room: int, records: tuple[str, ...], fill: int, **more: Any) -> Self:
        """The state in which nothing is made."""
        ids, mask = prompt.ids, prompt.mask
        if prompt.past is not None:  # whose columns stay where they are, but no rule looks at holes in a text
            order = mask.byte().argsort(dim=1, stable=True)
            ids, mask = ids.gather(1, order), mask.gather(1, order)
        ids, mask = (x.repeat_interleave(rows, 0) for x in (ids, mask))
        shown, stop = ids.new_full((len(ids), room), fill), ids.new_zeros(len(ids))
        whole = F.pad(ids, (0, room)), F.pad(mask, (0, room), value=True)
        more |= {"first": prompt.first, "unseen": prompt.unseen, "is_guided": prompt.negative is not None}
        return cls(*whole, ids.shape[1], shown, stop != 0, stop, {name: [] for name in records}, **more)

    @property
    def made(self) -> int:
        """How many tokens the longest row has."""
        return self.step if self.needed is None else int(self.needed)

    @property
    def is_late(self) -> bool:
        """Whether there is no time for more."""
        return time.monotonic() > self.late


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or a sample, of one token after the other."""

    room: int  # for how many tokens
    rows: int  # of each prompt
    records: tuple[str, ...]  # what is kept of each step
    callbacks: Callbacks = NO_CALLBACKS
    stride: int = 1  # after how many tokens it is looked whether all rows are over
    is_static: bool = field(default=False, kw_only=True)  # whether steps may repeat each other by graphs

    def start(self, prompt: Prompt, options: Options) -> State:
        """The state in which nothing is made."""
        state = State.of(prompt, self.rows, self.room, self.records, options.fill)
        state.needed = None if self.stride == 1 else state.ids.new_zeros(())
        return state

    def is_open(self, state: State) -> bool:
        """Whether anything is to follow."""
        if state.step >= self.room or (state.step and state.is_late):
            return False
        return bool(state.step % self.stride) or not bool(state.finished.all())

    def propose(self, state: State, options: Options) -> Tensor:
        """What is read together with the last token, as it may follow: nothing, (R, 0)."""
        return state.ids[:, :0]

    def update(self, state: State, logits: Tensor, proposed: Tensor, options: Options) -> None:
        """Go on by one token, from the logits (R, 1, V) of the next; of guided rows (2 R, 1, V)."""
        ids, keep, own = state.ids[:, : state.length], state.mask[:, : state.length], own_rules(self, state)
        processed = process(guided(state, upcast(logits[:, 0]), options), ids, keep, state.step, options, own)
        chosen = choose(processed, state.step, options)  # (R,)
        if options.fill < logits.shape[-1]:  # what the cache holds is what the caller sees
            chosen = chosen.masked_fill(state.finished, options.fill)
        record(state, logits[: len(ids), 0], processed, chosen)
        if state.needed is not None:
            state.needed += ~state.finished.all()
        accept(state, chosen, options)
        if self.callbacks.criteria:
            state.finished = state.finished | own_ends(self.callbacks, state, state.ids[:, : state.length])


def own_rules(strategy: Any, state: State) -> Callable[[Tensor], Tensor] | None:
    """The caller's rules as a function of logits (R, V), or None where there are none."""
    if not strategy.callbacks.are_rules:
        return None
    return partial(changed, strategy.callbacks, state, strategy.rows)


def changed(callbacks: Callbacks, state: State, rows: int, logits: Tensor) -> Tensor:
    """Logits (R, V) after the caller's rules."""
    ids = state.ids[:, state.unseen : state.length]
    if callbacks.allowed is not None:
        gone = torch.ones_like(logits, dtype=torch.bool)
        for row, text in enumerate(ids):
            prompt = state.first + row // rows
            gone[row, as_words(callbacks.allowed(prompt, text), prompt, logits.device)] = False
        logits = without(logits, gone)
    for processor in callbacks.processors:
        shape, logits = logits.shape, processor(ids, logits)
        inputs.check_shape("logits_processor", tuple(getattr(logits, "shape", ())), tuple(shape))
    return logits


def as_words(allowed: Any, prompt: int, device: torch.device) -> Tensor:
    """What a function allows: the ids of some words, at least one."""
    found = torch.as_tensor(allowed, device=device)
    if not found.numel():
        raise InputError(f"prefix_allowed_tokens_fn: allows nothing after prompt {prompt}; give one id at least")
    return found.long() if found.dtype != torch.bool else found


def own_ends(callbacks: Callbacks, state: State, ids: Tensor) -> Tensor:
    """Which rows are over by the caller's criteria: ids (R, T) with the token that was chosen -> (R,)"""
    over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    scores = tuple(state.records["scores"]) if "scores" in state.records else None
    for criterion in callbacks.criteria:
        over = over | torch.as_tensor(criterion(ids[:, state.unseen :], scores), device=ids.device)
    return over


def guided(state: State, logits: Tensor, options: Options) -> Tensor:
    """The logits (R, V); of guided rows, (2 R, V), led away from the others."""
    if not state.is_guided:
        return logits
    own, others = logits.chunk(2)
    return guide(own, others, options.guidance_scale)


def prefill(model: Any, prompt: Prompt, state: State) -> Tensor:
    """Read the prompts, or of a text beyond the context what a window shows, into a new cache: -> logits (R, 1, V)"""
    longest, is_steered = model.config.n_positions - state.extra, steers(model)
    past = prompt.past if prompt.past is not None and prompt.past.length else None
    window = prompt if state.length <= longest or past is not None else slide(prompt, state, longest)
    rows, window = len(state.ids) // len(window.ids), window.doubled()
    batch, length = window.ids.shape
    room = state.shown.shape[1] - state.step
    room = room if past is not None else min(room, longest - length)
    if past is not None:
        state.cache = roomy(past, 0 if rows > 1 else length + room - past.length)
    elif is_steered:
        state.cache = None  # who steers may begin with keys of its own
    else:
        state.cache = model.init_cache(batch, length if rows > 1 else length + room)
        state.cache.trusted = True
    state.keep = None if bool(window.mask.all()) else F.pad(window.mask, (0, room), value=True)
    encoder = {"encoder_hidden_states": window.states, "encoder_attention_mask": window.states_mask}
    state.encoder = {name: x for name, x in encoder.items() if x is not None}
    state.types = window.types
    read = window.ids if window.embeds is None else window.embeds
    start = 0 if state.cache is None else state.cache.length
    logits = forward(model, state, read[:, start:], 1, window.ids[:, :start])
    if is_steered and past is None:
        return spread(state, logits, rows, adapted_room(model, state, length, room))
    return logits if rows == 1 else spread(state, logits, rows, room)


def adapted_room(model: Any, state: State, length: int, room: int) -> int:
    """For how many new tokens there is room, now that it is known how many keys an adapter has put before the text."""
    longest, left = model.config.n_positions, state.shown.shape[1] - state.step
    state.extra = cast(KVCache, state.cache).length - length
    if state.length + left <= longest:  # the text alone would need no window
        inputs.check_context(state.length + state.extra, left, longest)
    return min(room, longest - state.extra - length)


def roomy(past: KVCache | Borrowed, room: int) -> KVCache:
    """A copy of a cache, with room for more tokens."""
    layers = [(F.pad(k, (0, 0, 0, room)), F.pad(v, (0, 0, 0, room))) for k, v in past]
    cache = KVCache(layers, past.length, preallocated=room > 0, trusted=True)
    cache.cross = list(past.cross)
    return cache


def decode_step(model: Any, state: State, tokens: Tensor, count: int) -> Tensor:
    """Read tokens (R, N) after those in the cache: -> the logits after the last `count` of them, (R, count, V)"""
    if state.reader is None or state.is_watched:
        state.reader = reader_of(model, state, tokens.numel())
    return state.reader(state, tokens, count)


def reader_of(model: Any, state: State, rows: int) -> Reader:
    """What reads the tokens of a step, so many rows: the model, or where nobody would see that, quicker calls."""
    is_simple = state.types is None and not state.encoder and not any(name in state.records for name in INSIDE)
    is_filled = isinstance(state.cache, KVCache) and state.cache.preallocated and state.cache.length > 0
    if is_simple and is_filled and is_own(model):
        loan = None if state.is_watched else borrow(model, rows, state.shown.shape[1] - state.step)
        return partial(read_by_kernels, Kernels.of(model, loan))
    return partial(forward, model)


def read_by_kernels(kernels: Kernels, state: State, tokens: Tensor, count: int) -> Tensor:
    """What `forward` gives, by other means."""
    state.cache = cast(KVCache, state.cache).fork()
    keep = None if state.keep is None else state.keep[:, : state.cache.length + tokens.shape[1]]
    return kernels.read(tokens, state.cache, keep, count)


def forward(model: Any, state: State, tokens: Tensor, count: int, before: Tensor | None = None) -> Tensor:
    """Read tokens (R, N) by a call of the model: -> the logits after the last `count` of them, (R, count, V)

    before: (R, S), the ids in the cache, where those of the state are not these.
    """
    cache, length = state.cache, tokens.shape[1]
    past = length if cache is None else cache.length + length
    given: dict[str, Any] = dict(state.encoder)
    if state.keep is not None:
        given["attention_mask"] = state.keep[:, : past - state.extra]
    if state.types is not None:  # a token that is made has the type of the one before it
        given["token_type_ids"] = state.types[:, -length:].expand(-1, length)
        state.types = state.types[:, -1:]
    given |= {f"output_{name}": True for name in INSIDE if name in state.records}
    if is_steered := steers(model):
        given = steered(model, state, before, tokens, given)
    if count < length and takes(model.forward, "logits_to_keep"):
        given["logits_to_keep"] = count
    if has_choices := getattr(model, "head", "") == "double_heads":  # each row is one
        given = {name: x[:, None] if isinstance(x, Tensor) else x for name, x in given.items()}
        tokens = tokens[:, None]
    read = () if is_steered or tokens.is_floating_point() else (tokens,)
    if not (is_steered or read):
        given["inputs_embeds"] = tokens
    output = model(*read, **{"past_key_values": cache, "use_cache": True, **given, "return_dict": True})
    if isinstance(output, tuple):
        raise InputError("return_dict: the model gave a tuple, which says no names; its forward has to give an output")
    keep_cache(model, state, output.past_key_values, past)
    see(state, output)
    return (output.logits[:, 0] if has_choices else output.logits)[:, -count:]


def keep_cache(model: Any, state: State, found: Any, past: int) -> None:
    """Go on with the cache that a call gave, which is another object where a wrapper took the first apart."""
    if state.cache is not None:
        state.cache.trusted = False  # whoever kept it may give it other tokens
    elif found is not None:
        found = as_cache(found, model.config.n_layer)
        past = max(past, found.length)  # with an adapter's keys before the text
        found = found.copied() if isinstance(found, Borrowed) else found
    if found is None or found.length != past:
        raise InputError("past_key_values: the model gave no cache with the new tokens; its forward has to return it")
    state.cache = found


def prepare_inputs_for_generation(
    self: Any,
    input_ids: Tensor,
    past_key_values: Any = None,
    *,
    next_sequence_length: int | None = None,
    **inputs: Any,
) -> dict[str, Any]:
    """The next call's arguments in a loop: of (B, T) ids, those that the cache lacks, the last one at least.

    A subclass or an adapter (PEFT sets it on the model) steers `generate` by one of its own, which gets the ids so far,
    their `attention_mask`, and the cache, None before the prompt is read.
    """
    if past_key_values is not None and next_sequence_length is None:
        next_sequence_length = max(input_ids.shape[1] - int(past_key_values.get_seq_length()), 1)
    new = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
    read = {} if inputs.get("inputs_embeds") is not None else {"input_ids": new}
    return {**read, "past_key_values": past_key_values, **inputs}


def _update_model_kwargs_for_generation(
    self: Any, outputs: Any, model_kwargs: dict[str, Any], **_: Any
) -> dict[str, Any]:
    """What the next call of somebody else's loop is given, by what the last one gave; captum calls it."""
    next_kwargs = {**model_kwargs, "past_key_values": outputs.past_key_values}
    if (mask := model_kwargs.get("attention_mask")) is not None:
        next_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones((len(mask), 1))], 1)
    if (types := model_kwargs.get("token_type_ids")) is not None:
        next_kwargs["token_type_ids"] = torch.cat([types, types[:, -1:]], 1)
    if (places := model_kwargs.get("cache_position")) is not None:
        next_kwargs["cache_position"] = places[-1:] + 1
    return next_kwargs


def compute_transition_scores(
    self: Any,
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """What the new tokens of `generate`'s answer scored, (R, N), as transformers has it; 0 where a beam is finished."""
    steps = torch.stack(tuple(scores))  # (N, rows, V)
    steps = steps.log_softmax(-1) if normalize_logits else steps
    tokens = sequences[:, sequences.shape[1] - len(steps) :]
    rows = torch.arange(len(tokens), device=tokens.device)[:, None] if beam_indices is None else beam_indices
    found = steps[torch.arange(len(steps), device=tokens.device), rows.clamp(min=0), tokens]
    return found.masked_fill(rows < 0, 0.0)


def steers(model: Any) -> bool:
    """Whether somebody else decides what a step's call is given."""
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    return prepare is not None and getattr(prepare, "__func__", None) is not prepare_inputs_for_generation


def steered(model: Any, state: State, before: Tensor | None, tokens: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """What a call that reads tokens (R, N) is given by who steers."""
    if before is None:
        last = state.length - 1
        before = state.ids[:, last - cast(KVCache, state.cache).length + state.extra : last]
        before = before.repeat(len(tokens) // len(before), 1)
    if tokens.is_floating_point():
        given, tokens = given | {"inputs_embeds": tokens}, state.ids.new_zeros(tokens.shape[:2])
    ids = torch.cat([before, tokens], 1)
    mask = given.pop("attention_mask", None)
    mask = torch.ones_like(ids) if mask is None else mask.long()
    call: dict[str, Any] = model.prepare_inputs_for_generation(
        ids, past_key_values=state.cache, attention_mask=mask, use_cache=True, next_sequence_length=tokens.shape[1],
        **given,
    )  # fmt: skip
    if state.is_guided and (wide := call.get("attention_mask")) is not None and wide.shape[1] > mask.shape[1]:
        call["attention_mask"] = wide = wide.clone()
        wide[len(wide) // 2 :, : wide.shape[1] - mask.shape[1]] = 0  # an adapter's prompt leads the rows alone
    return call


def see(state: State, output: Any) -> None:
    """Keep what is asked for of the inside of a call, for all rows but those that others are led away from."""
    for name in INSIDE:
        if name in state.records:
            layers = getattr(output, name)
            rows = len(layers[0]) // (2 if state.is_guided else 1)
            state.records[name].append(tuple(x[:rows] for x in layers))


@torch.no_grad()
def decode(
    model: Any, prompt: Prompt, strategy: Any, options: Options, until: float = math.inf, is_watched: bool = False
) -> Iterator[Any]:
    """The states after each step of a strategy, which is a Sampling, a Lookup or a BeamSearch.

    until: when, on the monotonic clock, there is no time for more tokens. is_watched: whether somebody else's code runs
    between the steps.
    """
    state = strategy.start(prompt, options)
    state.late, state.is_watched = until, is_watched
    try:
        while strategy.is_open(state):
            if state.step == 1 and is_repeated(model, prompt, strategy, state):
                yield from graphs.repeated(model, strategy, state, options)
                continue
            proposed = state.ids[:, :0] if state.extra else strategy.propose(state, options)  # adapters read one by one
            if state.cache is None or state.cache.length == state.cache.capacity:
                logits = prefill(model, prompt, state)
            else:
                tokens = torch.cat([state.ids[:, state.length - 1 : state.length], proposed], 1)
                tokens = tokens if prompt.negative is None else tokens.repeat(2, 1)
                logits = decode_step(model, state, tokens, tokens.shape[1])
            strategy.update(state, logits, proposed, options)
            yield state
    finally:
        if state.cache is not None:
            state.cache.trusted = False
        state.reader = None  # which may use packed weights


def is_repeated(model: Any, prompt: Prompt, strategy: Any, state: State) -> bool:
    """Whether steps may repeat each other where they are: nobody wants to see more than tokens, or steers them."""
    if not getattr(strategy, "is_static", False) or state.is_watched or state.records or prompt.past is not None:
        return False
    is_more = state.is_guided or state.encoder or state.extra or steers(model)
    fits = prompt.ids.shape[1] + strategy.room <= model.config.n_positions
    return fits and not is_more and graphs.is_served(model, state.ids)


def takes(function: Any, name: str) -> bool:
    """Whether a function has an argument of this name, or takes any."""
    parameters = inspect.signature(function).parameters.values()
    return any(name == one.name or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def spread(state: State, logits: Tensor, rows: int, room: int) -> Tensor:
    """Go on with each prompt that was read in so many rows, with room for more tokens: their logits."""

    def several(x: Tensor) -> Tensor:
        return x.repeat_interleave(rows, 0)

    narrow = cast(KVCache, state.cache)
    layers = [(F.pad(several(k), (0, 0, 0, room)), F.pad(several(v), (0, 0, 0, room))) for k, v in narrow]
    state.cache = KVCache(layers, narrow.length, preallocated=True, trusted=True)
    state.cache.cross = [(several(k), several(v)) for k, v in narrow.cross]
    state.keep, state.types = (None if x is None else several(x) for x in (state.keep, state.types))
    state.encoder = {name: several(x) for name, x in state.encoder.items()}
    for name in INSIDE:
        if state.records.get(name):
            state.records[name][-1] = tuple(map(several, state.records[name][-1]))
    return several(logits)


def record(state: State, logits: Tensor, processed: Kept, chosen: Tensor | None = None) -> None:
    """Keep what is asked for of a step; filling has the log-probability 0."""
    if not state.records:
        return
    scores = processed.whole(logits.shape[-1])
    values = {"logits": logits, "scores": scores}
    for name, kept in state.records.items():
        if name in INSIDE:
            continue
        if chosen is not None and name == "log_probs":
            log_probs = scores.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
            values[name] = log_probs.masked_fill(state.finished, 0)
        kept.append(values[name])


def accept(state: State, chosen: Tensor, options: Options) -> None:
    """One more token in each row, (R,)."""
    state.shown[:, state.step] = chosen.masked_fill(state.finished, options.fill)
    ended, state.stop = ends(chosen, state.stop, options)
    state.finished = state.finished | ended
    state.ids[:, state.length] = chosen
    state.step, state.length = state.step + 1, state.length + 1


def slide(prompt: Prompt, state: State, longest: int) -> Prompt:
    """What a window shows of each row by now; see `rules.window_start`."""
    mask = to_numpy(state.mask[:, : state.length])
    counts = mask.cumsum(-1)  # (R, T)
    starts = [window_start(int(count), longest) for count in counts[:, -1]]
    order = torch.from_numpy(order_of(mask := mask & (counts > np.array(starts)[:, None]))).to(prompt.ids.device)
    wide = prompt.repeated(len(state.ids) // len(prompt.ids))
    ids, keep = state.ids.take_along_dim(order, 1), torch.from_numpy(mask).to(order.device).take_along_dim(order, 1)
    types = wide.types
    if types is not None:
        types = torch.cat([types, types[:, -1:].expand(-1, state.step)], 1).take_along_dim(order, 1)
    return wide._replace(ids=ids, mask=keep, types=types)
