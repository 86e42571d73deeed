"""Decoding in TensorFlow: a model that reads texts into a cache, and the loop that lets it choose token after token.

B rows, T prompt length, S places (prompt and room), V vocabulary. What the rules see, the whole of each row, is the
`Prompt` and the ids of the `State`; what the model sees is a `Prompt` too, the same one unless a window slides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from gpt2_multi.generation.rules import bucket, window_start
from gpt2_multi.tf.attention import Context, KVCache, Pair, causal_bias, hiding, key_bias, positions, sizes, widened
from gpt2_multi.tf.generation.rules import Options, choose, over, process

if TYPE_CHECKING:
    from gpt2_multi.tf.heads import TFGPT2LMHeadModel

Records = dict[str, tf.Tensor]  # of each step: scores and logits (room, B, V), log_probs (room, B)


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: tf.Tensor  # (B, T) int32
    mask: tf.Tensor  # (B, T) bool
    states: tf.Tensor | None  # (B, encoder length, E)
    states_mask: tf.Tensor | None  # (B, encoder length)

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
    ids: tf.Tensor  # (B, S) int32, the prompt and what was made
    shown: tf.Tensor  # (B, room) int32, what the caller sees of it: filling where a row is finished
    finished: tf.Tensor  # (B,) bool
    stop: tf.Tensor  # (B,) int32, of the stop strings
    records: Records
    cache: KVCache


def decode(
    model: TFGPT2LMHeadModel,
    prompt: Prompt,
    room: Any,
    until: tf.Tensor,
    options: Options,
    rows: int,
    wanted: tuple[str, ...],
) -> State:
    """Up to `until` tokens in each of `rows` rows after a prompt, in a cache that has room for `room`."""
    cache, prompt = begin(model, prompt, room, rows), prompt.repeated(rows)
    return advance(model, prompt, prompt, start(model, prompt, room, options, wanted, cache), until, options)


def start(
    model: TFGPT2LMHeadModel, prompt: Prompt, room: Any, options: Options, wanted: Iterable[str], cache: KVCache
) -> State:
    """The state in which nothing is made. wanted: the names of what is recorded."""
    batch = sizes(prompt.ids)[0]
    ids, shown = tf.pad(prompt.ids, [(0, 0), (0, room)]), tf.fill((batch, room), options.fill)
    records = blank(model, batch, room, wanted)
    return State(tf.constant(0), ids, shown, tf.zeros(batch, tf.bool), tf.zeros(batch, tf.int32), records, cache)


def blank(model: TFGPT2LMHeadModel, batch: Any, room: Any, wanted: Iterable[str]) -> Records:
    """Records of steps that are yet to come."""
    kind, vocab = tf.as_dtype(model.compute_dtype), model.transformer.wte.input_dim
    wide = widened(tf.zeros((), kind)).dtype
    sorts = {"scores": ((vocab,), wide), "logits": ((vocab,), kind), "log_probs": ((), wide)}
    return {name: tf.zeros((room, batch, *sorts[name][0]), sorts[name][1]) for name in wanted}


def begin(model: TFGPT2LMHeadModel, prompt: Prompt, room: Any, rows: int) -> KVCache:
    """The cache of a prompt up to its last token, which is the first that the loop feeds, for each row `rows` times."""
    body, ids, mask = model.transformer, prompt.ids[:, :-1], prompt.mask[:, :-1]
    length = sizes(ids)[1]
    bias = causal_bias(length, length, 0, mask, tf.as_dtype(model.compute_dtype))
    context = Context(bias, KVCache(), [], states=prompt.states, cross_presents=[])
    if prompt.states is not None and prompt.states_mask is not None:
        context.states_bias = key_bias(prompt.states_mask, bias.dtype)
    cache = body.run(body.embed(ids, positions(ids, mask, 0)), context).past_key_values
    cross = tuple(widely(pair, rows, 0) for pair in cache.cross)
    return KVCache(tuple(widely(pair, rows, room + 1) for pair in cache.layers), cross, tf.convert_to_tensor(length))


def widely(pair: Pair, rows: int, room: Any) -> Pair:
    """Keys and values (B, H, S, D) with each row so many times, and room for more."""
    key, value = (
        tf.pad(x if rows == 1 else tf.repeat(x, rows, axis=0), [(0, 0), (0, 0), (0, room), (0, 0)]) for x in pair
    )
    return key, value


def advance(
    model: TFGPT2LMHeadModel, prompt: Prompt, window: Prompt, state: State, until: tf.Tensor, options: Options
) -> State:
    """Feed the last token of each row and choose the next, until `until` are made or no row goes on.

    The cache is that of `window`, and of what was made since.
    """
    length = sizes(prompt.ids)[1]

    def going(state: State) -> tf.Tensor:
        return (state.step < until) & ~tf.reduce_all(state.finished)

    def once(state: State) -> tuple[State]:
        place = length + state.step
        logits, cache = follow(model, window, state.cache, tf.gather(state.ids, [place - 1], axis=1))
        keep = written(prompt.mask, state.ids, state.step)
        processed = process(widened(logits), state.ids, keep, place, state.step, options)
        chosen = choose(processed, state.step, options)
        records = recorded(state, logits, processed, chosen)
        return (accept(state._replace(cache=cache, records=records), chosen, place, options),)

    return tf.while_loop(going, once, (state,))[0]


def follow(model: TFGPT2LMHeadModel, window: Prompt, cache: KVCache, tokens: tf.Tensor) -> tuple[tf.Tensor, KVCache]:
    """The logits (B * N, V) after each of these tokens (B, N), and the cache with them."""
    body, (batch, length), count = model.transformer, sizes(window.mask), sizes(tokens)[1]
    room = sizes(cache.layers[0][0])[2] - length
    ahead = cache.filled - length + tf.range(count)  # (N,), places after the prompt
    seen = tf.range(room) <= ahead[:, None]  # (N, room)
    parts = (window.mask[:, None, None, :], (batch, 1, count, length)), (seen, (batch, 1, count, room))
    keep = tf.concat([tf.broadcast_to(part, shape) for part, shape in parts], -1)  # (B, 1, N, S)
    context = Context(hiding(keep, tf.as_dtype(model.compute_dtype)), cache, [])
    if cache.cross and window.states_mask is not None:
        context.states_bias = key_bias(window.states_mask, context.bias.dtype)
    places = tf.reduce_sum(tf.cast(window.mask, tf.int32), -1, keepdims=True) + ahead  # (B, N)
    outputs = body.run(body.embed(tokens, tf.minimum(places, body.wpe.input_dim - 1)), context)
    after = outputs.past_key_values
    hidden = tf.reshape(outputs.last_hidden_state, (-1, outputs.last_hidden_state.shape[-1]))
    return model.logits(hidden), KVCache(after.layers, cache.cross, after.filled)


def accept(state: State, chosen: tf.Tensor, place: tf.Tensor, options: Options) -> State:
    """The state with one more token in each row (B,), at `place`."""
    ended, stop = over(chosen, state.stop, options)
    seen = tf.where(state.finished, options.fill, chosen)
    return state._replace(
        step=state.step + 1,
        ids=put(state.ids, chosen, place),
        shown=put(state.shown, seen, state.step),
        finished=state.finished | ended,
        stop=stop,
    )


def put(row: tf.Tensor, value: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
    """Rows (..., N) with these values (...) at `place`."""
    return tf.where(tf.range(sizes(row)[-1]) == place, value[..., None], row)


def recorded(state: State, logits: tf.Tensor, processed: tf.Tensor, chosen: tf.Tensor) -> Records:
    """The records with those of one more step; filling has the log-probability 0."""
    step = {"logits": logits, "scores": processed}
    if "log_probs" in state.records:
        log_probs = tf.gather(tf.nn.log_softmax(processed), chosen, batch_dims=1)
        step["log_probs"] = tf.where(state.finished, tf.zeros((), processed.dtype), log_probs)
    return noted(state.records, state.step, step)


def noted(records: Records, step: tf.Tensor, values: Records) -> Records:
    """The records with these values at a step."""
    at = tf.reshape(step, (1, 1))
    return {name: tf.tensor_scatter_nd_update(kept, at, values[name][None]) for name, kept in records.items()}


def written(mask: tf.Tensor, ids: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """Which of the ids (B, S) are there and count, after so many steps."""
    (batch, length), places = sizes(mask), sizes(ids)[1]
    made = tf.broadcast_to(tf.range(places - length) < step, (batch, places - length))
    return tf.concat([mask, made], 1)


def segments(
    model: TFGPT2LMHeadModel, prompt: Prompt, state: State, new: int, options: Options, jit: bool, stride: int
) -> Iterator[State]:
    """The states after every `stride` tokens, or where a window is full, of texts that a window slides over."""
    first, following = (model.decoders[f"{name} {'xla' if jit else 'graph'}"] for name in ("begin", "advance"))
    step, longest = 0, model.transformer.wpe.input_dim
    while step < new:
        window, count = slid(longest, prompt, state)
        full = min(step + longest - count + 1, new)
        state = state._replace(cache=first(window, bucket(longest - count), 1))
        while step < full:
            step = min(step + stride, full)
            state = following(prompt, window, state, tf.constant(step), options)
            yield state
            if tf.reduce_all(state.finished):
                return


def slid(longest: int, prompt: Prompt, state: State) -> tuple[Prompt, int]:
    """What the window shows of each row, and how many tokens that are at most; see `sampling.window_start`."""
    length = prompt.ids.shape[1] + int(state.step)
    mask = written(prompt.mask, state.ids, state.step).numpy()[:, :length]
    counts = mask.cumsum(-1)
    starts = np.array([window_start(int(count), longest) for count in counts[:, -1]])
    count = int((counts[:, -1] - starts).max())
    part = slice(length - count, length)
    shown = tf.constant((mask & (counts > starts[:, None]))[:, part])
    return prompt._replace(ids=state.ids[:, part], mask=shown).bucketed(), count
