"""Decoding in PyTorch: the loop in which a model reads texts into a cache and a strategy chooses what follows.

The model is called as anybody calls it. B prompts, R rows (each prompt in several), T prompt length, N tokens of a
step, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_multi.errors import InputError
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Request, aligned
from gpt2_multi.generation.rules import window_start
from gpt2_multi.pt.attention import KVCache, upcast
from gpt2_multi.pt.generation.rules import choose, ends, process
from gpt2_multi.pt.layers import to_numpy


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T), booleans
    states: Tensor | None  # (B, encoder length, E)
    states_mask: Tensor | None  # (B, encoder length)

    @classmethod
    def of(cls, request: Request, device: torch.device, states: Tensor | None, states_mask: Tensor | None) -> Prompt:
        """The rows of a request, on a device."""
        ids, mask = (torch.from_numpy(x).to(device) for x in (request.ids, request.mask))
        return cls(ids, mask, states, states_mask)

    def repeated(self, rows: int) -> Prompt:
        """Each row so many times."""
        return Prompt(*(None if x is None else x.repeat_interleave(rows, 0) for x in self))  # type: ignore[arg-type]

    def row(self, row: int) -> Prompt:
        """One row alone, without padding."""
        ids, mask, *states = (None if x is None else x[row : row + 1] for x in self)
        return Prompt(ids[:, mask[0]], mask[:, mask[0]], *states)  # type: ignore[index]


@dataclass
class State:
    """What the loop carries from one token to the next."""

    ids: Tensor  # (R, T + room), the prompts and what was made
    mask: Tensor  # (R, T + room), which of them count
    length: int  # how many of them are there
    shown: Tensor  # (R, room), what the caller sees of what was made: filling where a row is finished
    finished: Tensor  # (R,)
    stop: Tensor  # (R,), the states of the stop strings
    records: dict[str, list[Tensor]]  # of each step: scores and logits (R, V), log_probs (R,)
    step: int = 0  # how many tokens were made
    cache: KVCache | None = None  # of all tokens but the last
    keep: Tensor | None = None  # (R, the cache's room), which of its keys count; None where all do
    encoder: dict[str, Tensor] = field(default_factory=dict)  # its states (R, encoder length, E) and their mask

    @classmethod
    def of(cls, prompt: Prompt, rows: int, room: int, records: tuple[str, ...], fill: int, **more: Any) -> Self:
        """The state in which nothing is made."""
        ids, mask = (x.repeat_interleave(rows, 0) for x in (prompt.ids, prompt.mask))
        shown, stop = ids.new_full((len(ids), room), fill), ids.new_zeros(len(ids))
        whole = F.pad(ids, (0, room)), F.pad(mask, (0, room), value=True)
        return cls(*whole, ids.shape[1], shown, stop != 0, stop, {name: [] for name in records}, **more)


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or a sample, of one token after the other."""

    room: int  # for how many tokens
    rows: int  # of each prompt
    records: tuple[str, ...]  # what is kept of each step

    def start(self, prompt: Prompt, options: Options) -> State:
        """The state in which nothing is made."""
        return State.of(prompt, self.rows, self.room, self.records, options.fill)

    def is_open(self, state: State) -> bool:
        """Whether anything is to follow."""
        return state.step < self.room and not bool(state.finished.all())

    def propose(self, state: State, options: Options) -> Tensor:
        """What is read together with the last token, as it may follow: nothing, (R, 0)."""
        return state.ids[:, :0]

    def update(self, state: State, logits: Tensor, proposed: Tensor, options: Options) -> None:
        """Go on by one token, from the logits (R, 1, V) of the next."""
        ids, keep = state.ids[:, : state.length], state.mask[:, : state.length]
        processed = process(upcast(logits[:, 0]), ids, keep, state.step, options)
        chosen = choose(processed, state.step, options)  # (R,)
        record(state, logits[:, 0], processed, chosen)
        accept(state, chosen, options)


def prefill(model: Any, prompt: Prompt, state: State) -> Tensor:
    """Read the prompts, or of a text beyond the context what a window shows, into a new cache: -> logits (R, 1, V)"""
    longest = model.config.n_positions
    window = prompt if state.length <= longest else slide(prompt, state, longest)
    rows, (batch, length) = len(state.ids) // len(window.ids), window.ids.shape
    room = min(state.shown.shape[1] - state.step, longest - length)
    state.cache = model.init_cache(batch, length if rows > 1 else length + room)
    state.cache.trusted = True
    state.keep = None if bool(window.mask.all()) else F.pad(window.mask, (0, room), value=True)
    encoder = {"encoder_hidden_states": window.states, "encoder_attention_mask": window.states_mask}
    state.encoder = {name: x for name, x in encoder.items() if x is not None}
    logits = decode_step(model, state, window.ids, 1)
    return logits if rows == 1 else spread(state, logits, rows, room)


def decode_step(model: Any, state: State, tokens: Tensor, count: int) -> Tensor:
    """Read tokens (R, N) after those in the cache: -> the logits after the last `count` of them, (R, count, V)"""
    cache = cast(KVCache, state.cache)
    given: dict[str, Any] = dict(state.encoder)
    past = cache.length + tokens.shape[1]
    if state.keep is not None:
        given["attention_mask"] = state.keep[:, :past]
    if count < tokens.shape[1] and takes(model.forward, "logits_to_keep"):
        given["logits_to_keep"] = count
    output = model(tokens, past_key_values=cache, use_cache=True, return_dict=True, **given)
    if isinstance(output, tuple):
        raise InputError("return_dict: the model gave a tuple, which says no names; its forward has to give an output")
    cache.trusted = False  # whoever kept it may give it other tokens
    state.cache = output.past_key_values  # which is another object where a wrapper took the first apart
    if state.cache is None or state.cache.length != past:
        raise InputError("past_key_values: the model gave no cache with the new tokens; its forward has to return it")
    return output.logits[:, -count:]


@torch.no_grad()
def decode(model: Any, prompt: Prompt, strategy: Any, options: Options) -> Iterator[Any]:
    """The states after each step of a strategy, which is a Sampling, a Lookup or a BeamSearch."""
    state = strategy.start(prompt, options)
    try:
        while strategy.is_open(state):
            proposed = strategy.propose(state, options)
            if state.cache is None or state.cache.length == state.cache.capacity:
                logits = prefill(model, prompt, state)
            else:
                tokens = torch.cat([state.ids[:, state.length - 1 : state.length], proposed], 1)
                logits = decode_step(model, state, tokens, tokens.shape[1])
            strategy.update(state, logits, proposed, options)
            yield state
    finally:
        if state.cache is not None:
            state.cache.trusted = False


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
    state.keep = None if state.keep is None else several(state.keep)
    state.encoder = {name: several(x) for name, x in state.encoder.items()}
    return several(logits)


def record(state: State, logits: Tensor, processed: Tensor, chosen: Tensor | None = None) -> None:
    """Keep what is asked for of a step; filling has the log-probability 0."""
    values = {"logits": logits, "scores": processed}
    for name, kept in state.records.items():
        if chosen is not None and name == "log_probs":
            log_probs = processed.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
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
    ids, mask = (to_numpy(x[:, : state.length]) for x in (state.ids, state.mask))
    counts = mask.cumsum(-1)  # (R, T)
    starts = [window_start(int(count), longest) for count in counts[:, -1]]
    shown = aligned(ids, mask & (counts > np.array(starts)[:, None]))
    window, window_mask = (torch.from_numpy(x).to(prompt.ids.device) for x in shown)
    return prompt.repeated(len(ids) // len(prompt.ids))._replace(ids=window, mask=window_mask)
