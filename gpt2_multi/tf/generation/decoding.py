"""Decoding in TensorFlow: the loop in which a model reads texts into a cache and a strategy chooses what follows.

The model is called as anybody calls it. B rows, T prompt length, S places (prompt and room), N tokens of a step, V
vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import Request
from gpt2_multi.generation.rules import bucket, window_start
from gpt2_multi.tf.attention import KVCache, upcast
from gpt2_multi.tf.generation.rules import choose, ends, process
from gpt2_multi.tf.layers import sizes

Records = dict[str, tf.Tensor]  # of each step: scores and logits (room, B, V), log_probs (room, B)
Proposed = tuple[tf.Tensor, tf.Tensor]  # tokens (B, N) that may follow the last, and how many of them count ()


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: tf.Tensor  # (B, T) int32
    mask: tf.Tensor  # (B, T) bool
    states: tf.Tensor | None  # (B, encoder length, E)
    states_mask: tf.Tensor | None  # (B, encoder length)

    @classmethod
    def of(cls, request: Request, states: tf.Tensor | None = None, states_mask: tf.Tensor | None = None) -> Prompt:
        """The rows of a request."""
        ids, mask = tf.convert_to_tensor(request.ids), tf.convert_to_tensor(request.mask)
        return cls(tf.cast(ids, tf.int32), mask, states, states_mask)

    def repeated(self, rows: int) -> Prompt:
        """Each row so many times."""
        return self if rows == 1 else Prompt(*(None if x is None else tf.repeat(x, rows, axis=0) for x in self))

    def row(self, row: int) -> Prompt:
        """One row alone."""
        return Prompt(*(None if x is None else x[row : row + 1] for x in self))

    def bucketed(self) -> Prompt:
        """With padding before it, up to its bucket's length."""
        more = [(0, 0), (bucket(self.ids.shape[1]) - self.ids.shape[1], 0)]
        return self._replace(ids=tf.pad(self.ids, more), mask=tf.pad(self.mask, more))


class State(NamedTuple):
    """What the loop carries from one token to the next."""

    step: tf.Tensor  # () int32, how many tokens were made
    length: tf.Tensor  # () int32, how many of the ids are there
    ids: tf.Tensor  # (B, S) int32, the prompt and what was made
    mask: tf.Tensor  # (B, S) bool, which of them count
    shown: tf.Tensor  # (B, room) int32, what the caller sees of what was made: filling where a row is finished
    finished: tf.Tensor  # (B,) bool
    stop: tf.Tensor  # (B,) int32, of the stop strings
    records: Records
    cache: KVCache  # of all tokens but the last
    keep: tf.Tensor  # (B, the cache's capacity) bool, which of its keys count


class Sampling(NamedTuple):
    """Greedy choice, or a sample, of one token after the other."""

    room: Any  # for how many tokens
    rows: int  # of each prompt
    records: tuple[str, ...]  # what is kept of each step
    guesses: int = 0  # how many tokens are read at most before it is known that they follow

    def start(self, model: keras.Model, prompt: Prompt, options: Options) -> State:
        """The state in which nothing is made."""
        batch, length = sizes(prompt.ids)
        room = [(0, 0), (0, self.room)]
        ids, mask = tf.pad(prompt.ids, room), tf.pad(prompt.mask, room, constant_values=True)
        shown, stop = tf.fill((batch, self.room), options.fill), tf.zeros(batch, tf.int32)
        records, keep = blank(model, batch, self.room, self.records), prompt.mask
        step, length = tf.constant(0), tf.convert_to_tensor(length)
        return State(step, length, ids, mask, shown, stop > 0, stop, records, KVCache(), keep)

    def is_open(self, state: State) -> tf.Tensor:
        """Whether anything is to follow."""
        return ~tf.reduce_all(state.finished)

    def propose(self, state: State, options: Options) -> Proposed | None:
        """What is read together with the last token, as it may follow: nothing."""
        return None

    def update(
        self, state: State, logits: tf.Tensor, proposed: Proposed | None, until: tf.Tensor, options: Options
    ) -> State:
        """Go on by one token, from the logits (B, 1, V) of the next."""
        logits = logits[:, 0]
        processed = process(upcast(logits), state.ids, written(state), state.length, state.step, options)
        chosen = choose(processed, state.step, options)  # (B,)
        return accept(state._replace(records=record(state, logits, processed, chosen)), chosen, options)


def prefill(model: keras.Model, prompt: Prompt, room: Any, rows: int) -> tuple[KVCache, tf.Tensor]:
    """Read prompts up to their last token, which the first step reads, and go on with each in so many rows.

    Returns the cache, which has room for so many tokens more, and which of its keys count.
    """
    past = model(
        prompt.ids[:, :-1],
        attention_mask=prompt.mask[:, :-1],
        encoder_hidden_states=prompt.states,
        encoder_attention_mask=prompt.states_mask,
        use_cache=True,
        return_dict=True,
    ).past_key_values
    mask = prompt.repeated(rows).mask
    return past.spread(rows, room), tf.pad(mask, [(0, 0), (0, room - 1)], constant_values=True)


def decode_step(
    model: keras.Model, prompt: Prompt, state: State, proposed: Proposed | None
) -> tuple[tf.Tensor, KVCache]:
    """Read the last token of each row and what is proposed after it: the logits (B, 1 + N, V), and the cache with them.

    Where nothing proposed counts, it is not read.
    """

    def read(tokens: tf.Tensor) -> tuple[tf.Tensor, KVCache]:
        output = model(
            tokens,
            past_key_values=state.cache,
            attention_mask=state.keep,
            encoder_hidden_states=prompt.states,
            encoder_attention_mask=prompt.states_mask,
            use_cache=True,
            return_dict=True,
        )
        return output.logits, output.past_key_values

    def alone() -> tuple[tf.Tensor, KVCache]:
        logits, cache = read(last)
        return tf.pad(logits, [(0, 0), (0, sizes(tokens)[1]), (0, 0)]), cache

    last = tf.gather(state.ids, [state.length - 1], axis=1)  # (B, 1)
    if proposed is None:
        return read(last)
    tokens, count = proposed
    return tf.cond(count > 0, lambda: read(tf.concat([last, tokens], 1)), alone)


def decode(model: keras.Model, prompt: Prompt, strategy: Any, state: Any, until: tf.Tensor, options: Options) -> Any:
    """The state of a Sampling, a Lookup or a BeamSearch when `until` tokens are made, or nothing is to follow."""

    def is_open(state: Any) -> tf.Tensor:
        return (state.step < until) & strategy.is_open(state)

    def once(state: Any) -> tuple[Any]:
        proposed = strategy.propose(state, options)
        logits, cache = decode_step(model, prompt, state, proposed)
        return (strategy.update(state._replace(cache=cache), logits, proposed, until, options),)

    return tf.while_loop(is_open, once, (state,))[0]


def blank(model: keras.Model, batch: Any, room: Any, wanted: tuple[str, ...]) -> Records:
    """Records of steps that are yet to come."""
    kind, vocab = tf.as_dtype(model.compute_dtype), model.config.vocab_size
    wide = upcast(tf.zeros((), kind)).dtype
    sorts = {"scores": ((vocab,), wide), "logits": ((vocab,), kind), "log_probs": ((), wide)}
    return {name: tf.zeros((room, batch, *sorts[name][0]), sorts[name][1]) for name in wanted}


def record(state: Any, logits: tf.Tensor, processed: tf.Tensor, chosen: tf.Tensor | None = None) -> Records:
    """The records with those of one more step; filling has the log-probability 0."""
    values = {"logits": logits, "scores": processed}
    if chosen is not None and "log_probs" in state.records:
        log_probs = tf.gather(tf.nn.log_softmax(processed), chosen, batch_dims=1)
        values["log_probs"] = tf.where(state.finished, tf.zeros((), processed.dtype), log_probs)
    at = tf.reshape(state.step, (1, 1))
    new = {name: tf.cast(values[name], kept.dtype)[None] for name, kept in state.records.items()}
    return {name: tf.tensor_scatter_nd_update(kept, at, new[name]) for name, kept in state.records.items()}


def accept(state: State, chosen: tf.Tensor, options: Options) -> State:
    """The state with one more token in each row, (B,)."""
    ended, stop = ends(chosen, state.stop, options)
    return state._replace(
        step=state.step + 1,
        length=state.length + 1,
        ids=put(state.ids, chosen, state.length),
        shown=put(state.shown, tf.where(state.finished, options.fill, chosen), state.step),
        finished=state.finished | ended,
        stop=stop,
    )


def written(state: Any) -> tf.Tensor:
    """Which of the ids are there and count: (B, S)"""
    return state.mask & (tf.range(sizes(state.mask)[1]) < state.length)


def put(row: tf.Tensor, value: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
    """Rows (..., N) with these values (...) at `place`."""
    return tf.where(tf.range(sizes(row)[-1]) == place, value[..., None], row)


def slide(prompt: Prompt, state: State, longest: int) -> tuple[Prompt, int]:
    """What a window shows of each row by now, and how many tokens that are at most; see `rules.window_start`."""
    length = int(state.length)
    mask = state.mask.numpy()[:, :length]
    counts = mask.cumsum(-1)  # (B, length)
    starts = np.array([window_start(int(count), longest) for count in counts[:, -1]])
    count = int((counts[:, -1] - starts).max())
    part = slice(length - count, length)
    shown = tf.constant((mask & (counts > starts[:, None]))[:, part])
    return prompt._replace(ids=state.ids[:, part], mask=shown).bucketed(), count


def align(ids: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Ids and mask (B, T) with padding on the left, where they are traced and have no values yet."""
    order = tf.argsort(tf.cast(mask, tf.int32), axis=-1, stable=True)  # hidden tokens first
    return tf.gather(ids, order, batch_dims=1), tf.gather(mask, order, batch_dims=1)
