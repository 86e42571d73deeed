"""Decoding in TensorFlow: the loop in which a model reads texts into a cache and a strategy chooses what follows.

The model is called as anybody calls it. B rows, T prompt length, S places (prompt and room), N tokens of a step, V
vocabulary, W columns of a cache and of what is read after it. Guided rows are read twice, with what they are led away
from after them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.request import NO_CALLBACKS, Given, Request
from gpt2_multi.generation.rules import bucket, window_start
from gpt2_multi.model import inputs
from gpt2_multi.tf.attention import KVCache, upcast
from gpt2_multi.tf.generation.cpu_kernels import multiplied_in_parts
from gpt2_multi.tf.generation.rules import choose, ends, guide, process, without
from gpt2_multi.tf.layers import sizes

Records = dict[str, Any]  # of each step: scores and logits (room, B, V), log_probs (room, B); of INSIDE of each layer
Proposed = tuple[tf.Tensor, tf.Tensor | None]  # tokens (B, N) that may follow the last; how many count, (), or all
INSIDE = ("hidden_states", "attentions")  # records of what the model shows besides logits


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left."""

    ids: tf.Tensor  # (B, T) int32
    mask: tf.Tensor  # (B, T) bool
    states: tf.Tensor | None  # (B, encoder length, E)
    states_mask: tf.Tensor | None  # (B, encoder length)
    number: tf.Tensor  # (B,) int32, which of the prompts each is
    unseen: tf.Tensor  # (B,) int32, how many columns at the left are no part of the caller's text
    types: tf.Tensor | None = None  # (B, T) int32
    embeds: tf.Tensor | None = None  # (B, T, E), which are read in the place of ids
    negative: tf.Tensor | None = None  # (B, T) int32, the ids of what is guided away from
    negative_mask: tf.Tensor | None = None  # (B, T) bool
    past: KVCache | None = None  # of the first columns, which are not read again
    seen: tf.Tensor | None = None  # (B, W) bool, of a cache's columns and those read after them which count; or `mask`

    @classmethod
    def of(cls, request: Request, given: Given, past: KVCache | None) -> Prompt:
        """The rows of a request."""
        ids, mask = tf.convert_to_tensor(request.ids), tf.convert_to_tensor(request.mask)
        batch, length = sizes(ids)
        unseen = length if request.past is None and not request.given.shape[1] else 0
        embeds = given.inputs_embeds
        others = request.negative or (None, None)
        types, negative = (None if x is None else tf.cast(x, tf.int32) for x in (request.types, others[0]))
        if embeds is not None:
            embeds = tf.gather(embeds, request.order, axis=1, batch_dims=1)
        negative_mask = None if negative is None else tf.convert_to_tensor(others[1])
        encoder = given.encoder_hidden_states, given.encoder_attention_mask
        columns = tf.cast(ids, tf.int32), mask, *encoder, tf.range(batch), tf.fill([batch], unseen)
        return cls(*columns, types, embeds, negative, negative_mask, past if request.past else None)

    def repeated(self, rows: int) -> Prompt:
        """Each row so many times."""
        return self if rows == 1 else Prompt(*(None if x is None else tf.repeat(x, rows, axis=0) for x in self))

    def doubled(self) -> Prompt:
        """All that is read: after the rows, those that they are guided away from."""
        if self.negative is None:
            return self
        twice = Prompt(*(None if x is None else tf.concat([x, x], 0) for x in self))
        ids, mask = tf.concat([self.ids, self.negative], 0), tf.concat([self.mask, self.negative_mask], 0)
        return twice._replace(ids=ids, mask=mask, negative=None, negative_mask=None)

    def row(self, row: int) -> Prompt:
        """One row alone."""
        return Prompt(*(None if x is None else x[row : row + 1] for x in self))

    def bucketed(self) -> Prompt:
        """With padding before it, up to its bucket's length."""
        more = bucket(self.ids.shape[1]) - self.ids.shape[1]

        def filled(x: tf.Tensor) -> tf.Tensor:
            return tf.pad(x, [(0, 0), (more, 0)] + [(0, 0)] * (x.shape.rank - 2))

        names = ("ids", "mask", "types", "embeds", "negative", "negative_mask")
        there = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return self._replace(unseen=self.unseen + more, **{name: filled(x) for name, x in there.items()})

    def text(self) -> Prompt:
        """What rules look at: no cache, and no hole in a text whose columns stayed where they were."""
        if self.past is None:
            return self
        _, ids, mask = align(self.mask, self.ids, self.mask)
        return self._replace(ids=ids, mask=mask, past=None, seen=None)

    def after(self, request: Request) -> Prompt:
        """Prompts of which a cache holds the first columns; the rest of them is read, up to its bucket's length."""
        held, rest = np.split(request.mask, [request.past or 0], 1)
        room, more = (bucket(x.shape[1]) - x.shape[1] for x in (held, rest))
        seen = np.concatenate([np.pad(held, [(0, 0), (0, room)]), np.pad(rest, [(0, 0), (more, 0)])], 1)
        return self._replace(seen=tf.constant(seen), past=roomy(self.past, room))


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
    number: tf.Tensor  # (B,) int32, which of the prompts each row continues
    unseen: tf.Tensor  # (B,) int32, how many columns at the left are no part of the caller's text
    cache: KVCache  # of all tokens but the last
    keep: tf.Tensor  # (B, the cache's capacity) bool, which of its keys count; of guided rows twice as many
    helper: tuple[Any, ...] = ()  # an assistant's cache, which of its keys count, and the types of the prompt, if any


class Sampling(NamedTuple):
    """Greedy choice, or a sample, of one token after the other."""

    room: Any  # for how many tokens
    rows: int  # of each prompt
    records: tuple[str, ...]  # what is kept of each step
    is_guided: bool = False  # whether there are rows that these are led away from
    callbacks: Callbacks = NO_CALLBACKS
    guesses: int = 0  # how many tokens are read at most before it is known that they follow
    assistant: Any = None  # a model that makes them

    def start(self, model: keras.Model, prompt: Prompt, options: Options) -> State:
        """The state in which nothing is made."""
        batch, length = sizes(prompt.ids)
        room = [(0, 0), (0, self.room)]
        ids, mask = tf.pad(prompt.ids, room), tf.pad(prompt.mask, room, constant_values=True)
        shown, stop = tf.fill((batch, self.room), options.fill), tf.zeros(batch, tf.int32)
        records, keep = blank(model, batch, self.room, self.records), prompt.mask
        step, length, texts = tf.constant(0), tf.convert_to_tensor(length), (prompt.number, prompt.unseen)
        return State(step, length, ids, mask, shown, stop > 0, stop, records, *texts, KVCache(), keep)

    def is_open(self, state: State) -> tf.Tensor:
        """Whether anything is to follow."""
        return ~tf.reduce_all(state.finished)

    def finish(self, state: State, options: Options) -> State:
        """The state in which nothing is to follow, as there is no time for more."""
        return state._replace(finished=tf.ones_like(state.finished))

    def propose(self, state: State, options: Options) -> tuple[State, Proposed | None]:
        """What is read together with the last token, as it may follow: nothing."""
        return state, None

    def update(
        self, state: State, logits: tf.Tensor, proposed: Proposed | None, new: tf.Tensor, options: Options
    ) -> State:
        """Go on by one token, from the logits (B, 1, V) of the next, or (2 B, 1, V) where rows are guided."""
        logits, led = guided(logits[:, 0], options, self.is_guided)
        kept = process(led, state.ids, written(state), state.length, state.step, options, own_rules(self, state))
        processed, chosen = kept.logits, choose(kept, state.step, options)  # (B,)
        state = accept(state._replace(records=record(state, logits, processed, chosen)), chosen, options)
        over = own_ends(self.callbacks, state.ids, processed, state)
        return state._replace(finished=state.finished | over)


def own_rules(strategy: Any, state: Any) -> Any:
    """The caller's rules as a function of logits (B, V), or None where there are none."""
    return partial(changed, strategy.callbacks, state) if strategy.callbacks.are_rules else None


def changed(callbacks: Callbacks, state: Any, logits: tf.Tensor) -> tf.Tensor:
    """Logits (B, V) after the caller's rules."""
    ids, length = text(state, state.ids)
    if (allowed := callbacks.allowed) is not None:
        vocab = sizes(logits)[1]
        logits = without(logits, ~each_allowed(allowed, state.number, ids, length, vocab))
    for processor in callbacks.processors:
        after = tf.convert_to_tensor(processor(ids, logits, length))
        inputs.check_shape("logits_processor", after.shape, logits.shape)
        logits = tf.cast(after, logits.dtype)
    return logits


def each_allowed(allowed: Callable[..., Any], number: Any, ids: Any, length: Any, vocab: int) -> tf.Tensor:
    """What a function allows in each row, (B, V)."""
    kind = tf.TensorSpec((vocab,), tf.bool)
    try:
        return tf.map_fn(
            lambda row: as_words(allowed(row[0], row[1], length), vocab), (number, ids), fn_output_signature=kind
        )
    except Exception:
        # map_fn leaves it set, and then nothing is computed again in a backward pass.
        tf.compat.v1.get_variable_scope().set_caching_device(None)
        raise


def as_words(allowed: Any, vocab_size: int) -> tf.Tensor:
    """What a function allows, which has to be a boolean for each word of the vocabulary."""
    found = tf.convert_to_tensor(allowed)
    if found.dtype != tf.bool or not found.shape.is_compatible_with((vocab_size,)):
        raise InputError(
            f"prefix_allowed_tokens_fn: expected booleans ({vocab_size},), found {found.dtype.name} {found.shape}; in "
            "TensorFlow it says of each id whether it may follow"
        )
    return found


def own_ends(callbacks: Callbacks, ids: tf.Tensor, processed: tf.Tensor, state: Any) -> tf.Tensor:
    """Which rows are over by the caller's criteria, after tokens that were chosen by these logits: (B,)"""
    (ids, length), over = text(state, ids), tf.zeros(sizes(ids)[0], tf.bool)
    for criterion in callbacks.criteria:
        over |= tf.cast(criterion(ids, processed, length), tf.bool)
    return over


def text(state: Any, ids: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Ids (B, S) as the caller knows them, from his first column on, and how many there are."""
    first = tf.reduce_max(state.unseen)
    return tf.roll(ids, -first, axis=1), state.length - first


def guided(logits: tf.Tensor, options: Options, is_guided: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """The model's logits of each row (B, V), and those led away from the others', if there are others."""
    if not is_guided:
        return logits, upcast(logits)
    logits, others = tf.split(logits, 2)
    return logits, guide(upcast(logits), upcast(others), options.guidance_scale)


def read(model: keras.Model, prompt: Prompt, whole: bool, records: tuple[str, ...]) -> tuple[Any, tf.Tensor]:
    """The output for prompts, or for all but their last tokens, with a cache that grows; and which columns count."""
    prompt, past = prompt.doubled(), prompt.past
    seen, end = prompt.mask if prompt.seen is None else prompt.seen, None if whole else -1
    first = sizes(prompt.ids)[1] - sizes(seen)[1] + (0 if past is None else past.length)
    ids, types, embeds = (None if x is None else x[:, first:end] for x in (prompt.ids, prompt.types, prompt.embeds))
    output = forward(
        model,
        ids if embeds is None else None,
        seen[:, :end],
        records,
        inputs_embeds=embeds,
        token_type_ids=types,
        encoder_hidden_states=prompt.states,
        encoder_attention_mask=prompt.states_mask,
        past_key_values=past,
    )
    return output, seen


def begins(strategy: Any, prompt: Prompt) -> bool:
    """Whether prompts are read to their end before the loop, which reads what was made of them."""
    is_shown = any(name in strategy.records for name in INSIDE)
    return is_shown or any(part is not None for part in (prompt.embeds, prompt.past, prompt.negative))


def prefill(model: keras.Model, prompt: Prompt, room: Any, rows: int) -> tuple[KVCache, tf.Tensor]:
    """Read prompts up to their last token, which the first step reads, and go on with each in so many rows.

    Returns the cache, which has room for so many tokens more, and which of its keys count.
    """
    output, seen = read(model, prompt, False, ())
    return output.past_key_values.spread(rows, room + 1), spread(seen, rows, room)


def begin(model: keras.Model, prompt: Prompt, strategy: Any, state: Any, new: tf.Tensor, options: Options) -> Any:
    """The state after the first token, where prompts are read to their end: embeddings, or after a cache, or shown."""
    output, seen = read(model, prompt, True, strategy.records)
    room = strategy.room + strategy.guesses
    keep = spread(seen, strategy.rows, room)
    records = dict(state.records)
    for name in (name for name in INSIDE if name in strategy.records):
        first = tuple(tf.repeat(x, strategy.rows, axis=0)[: sizes(state.ids)[0]] for x in getattr(output, name))
        last = [sizes(x)[-1] if name == "hidden_states" else sizes(keep)[1] for x in first]
        shapes = [(strategy.room, *sizes(x)[:-2], 1, size) for x, size in zip(first, last, strict=True)]
        records[name] = tuple(tf.zeros(shape, x.dtype) for shape, x in zip(shapes, first, strict=True))
        records[f"first_{name}"] = first
    cache = output.past_key_values.spread(strategy.rows, room)
    state = state._replace(cache=cache, keep=keep, records=records)
    return strategy.update(state, tf.repeat(output.logits[:, -1:], strategy.rows, axis=0), None, new, options)


def roomy(past: KVCache | None, room: int) -> KVCache | None:
    """A cache that grows, with so many columns more, which no mask may show."""
    if past is None:
        return None
    more = [(0, 0), (0, 0), (0, room), (0, 0)]
    return KVCache(tuple((tf.pad(key, more), tf.pad(value, more)) for key, value in past), past.cross)


def decode_step(
    model: keras.Model, prompt: Prompt, state: Any, proposed: Proposed | None
) -> tuple[tf.Tensor, KVCache, Records]:
    """Read the last token of each row and what is proposed after it: the logits (B, 1 + N, V), and the cache with them.

    Where nothing proposed counts, it is not read. And the records of what the model shows besides logits.
    """

    def after(tokens: tf.Tensor) -> tuple[tf.Tensor, KVCache, Records]:
        tokens = tokens if prompt.negative is None else tf.concat([tokens, tokens], 0)
        window = prompt.doubled()
        output = forward(
            model,
            tokens,
            state.keep,
            state.records,
            token_type_ids=None if window.types is None else tf.repeat(window.types[:, -1:], sizes(tokens)[1], axis=1),
            encoder_hidden_states=window.states,
            encoder_attention_mask=window.states_mask,
            past_key_values=state.cache,
        )
        return output.logits, output.past_key_values, see(state, output)

    def alone() -> tuple[tf.Tensor, KVCache, Records]:
        logits, *others = after(last)
        return tf.pad(logits, [(0, 0), (0, sizes(tokens)[1]), (0, 0)]), *others

    last = tf.gather(state.ids, [state.length - 1], axis=1)  # (B, 1)
    if proposed is None:
        return after(last)
    tokens, count = proposed
    both = partial(after, tf.concat([last, tokens], 1))
    return both() if count is None else tf.cond(count > 0, both, alone)


def forward(model: keras.Model, ids: tf.Tensor | None, mask: tf.Tensor, records: Any, **given: Any) -> Any:
    """What the model makes of tokens (B, N); one with a head for choices is given one of each row."""
    given = {name: x for name, x in given.items() if x is not None}
    given |= {f"output_{name}": True for name in INSIDE if name in records}
    if model.head != "double_heads":
        return model(ids, attention_mask=mask, use_cache=True, return_dict=True, **given)
    single = {name: given[name][:, None] for name in ("token_type_ids", "inputs_embeds") if name in given}
    ids = None if ids is None else ids[:, None]
    output = model(ids, attention_mask=mask[:, None], use_cache=True, return_dict=True, **given | single)
    output.logits = output.logits[:, 0]
    return output


def see(state: Any, output: Any) -> Records:
    """The records with what the model shows besides logits, of all rows but those that others are led away from."""
    inside = {name: getattr(output, name) for name in INSIDE if name in state.records}
    return state.records | {
        name: tuple(noted(*pair, state.step) for pair in zip(state.records[name], layers, strict=True))
        for name, layers in inside.items()
    }


def decode(
    model: keras.Model, prompt: Prompt, strategy: Any, state: Any, until: tf.Tensor, new: tf.Tensor, options: Options
) -> Any:
    """The state of a strategy when `until` of `new` tokens are made, or nothing is to follow."""

    def is_open(state: Any) -> tf.Tensor:
        return (state.step < until) & strategy.is_open(state)

    def once(state: Any) -> tuple[Any]:
        state, proposed = strategy.propose(state, options)
        logits, cache, records = decode_step(model, prompt, state, proposed)
        return (strategy.update(state._replace(cache=cache, records=records), logits, proposed, new, options),)

    return tf.while_loop(is_open, once, (state,))[0]


def decode_in_place(model: keras.Model, prompt: Prompt, strategy: Any, state: Any, *given: Any) -> Any:
    """`decode` by XLA, which writes into caches that are flat, and copies others at each step; and by `cpu_kernels`."""
    state = with_caches(state, lambda cache, keep: cache.flat())
    with multiplied_in_parts(model, getattr(strategy, "assistant", None)):
        state = decode(model, prompt, strategy, state, *given)
    return with_caches(state, lambda cache, keep: cache.of_rows(sizes(keep)[0]))


def with_caches(state: Any, change: Callable[[KVCache, tf.Tensor], KVCache]) -> Any:
    """The state with another form of its cache, and of an assistant's; `change` is told which of the keys count."""
    state = state._replace(cache=change(state.cache, state.keep))
    if not (helper := getattr(state, "helper", ())):
        return state
    return state._replace(helper=(change(*helper[:2]), *helper[1:]))


def spread(seen: tf.Tensor, rows: int, room: Any) -> tf.Tensor:
    """Which columns count, (B, W), of each row so many times, and with room for more tokens, all of which count."""
    return tf.pad(tf.repeat(seen, rows, axis=0), [(0, 0), (0, room)], constant_values=True)


def blank(model: keras.Model, batch: Any, room: Any, wanted: tuple[str, ...]) -> Records:
    """Records of steps that are yet to come."""
    kind, vocab = tf.as_dtype(model.compute_dtype), model.config.vocab_size
    wide = upcast(tf.zeros((), kind)).dtype
    sorts = {"scores": ((vocab,), wide), "logits": ((vocab,), kind), "log_probs": ((), wide)}
    return {name: tf.zeros((room, batch, *sorts[name][0]), sorts[name][1]) for name in wanted if name in sorts}


def record(state: Any, logits: tf.Tensor, processed: tf.Tensor, chosen: tf.Tensor | None = None) -> Records:
    """The records with those of one more step; filling has the log-probability 0."""
    values = {"logits": logits, "scores": processed}
    if chosen is not None and "log_probs" in state.records:
        log_probs = tf.gather(tf.nn.log_softmax(processed), chosen, batch_dims=1)
        values["log_probs"] = tf.where(state.finished, tf.zeros((), processed.dtype), log_probs)
    there = {name: x for name, x in values.items() if name in state.records}
    return state.records | {name: noted(state.records[name], x, state.step) for name, x in there.items()}


def noted(kept: tf.Tensor, value: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """A record (room, R, ...) with the value of a step, of its R rows."""
    value = tf.cast(value[: sizes(kept)[1]], kept.dtype)
    return tf.tensor_scatter_nd_update(kept, tf.reshape(step, (1, 1)), value[None])


def accept(state: State, chosen: tf.Tensor, options: Options) -> State:
    """The state with one more token in each row, (B,)."""
    ended, stop = ends(chosen, state.stop, options)
    shown = tf.where(state.finished, options.fill, chosen)
    return state._replace(
        step=state.step + 1,
        length=state.length + 1,
        ids=put(state.ids, tf.where(shown < sizes(options.stops)[1], shown, chosen), state.length),  # what can be read
        shown=put(state.shown, shown, state.step),
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
    types = prompt.types
    if types is not None:
        types = tf.concat([types, tf.repeat(types[:, -1:], length - types.shape[1], axis=1)], 1)[:, part]
    return prompt._replace(ids=state.ids[:, part], mask=shown, types=types).bucketed(), count


def align(mask: tf.Tensor, *rows: tf.Tensor | None) -> list[Any]:
    """Where each column stands when padding is on the left, (B, T), and rows so; of a mask that has no values yet."""
    order = tf.argsort(tf.cast(mask, tf.int32), axis=-1, stable=True)  # hidden tokens first
    return [order, *(None if x is None else tf.gather(x, order, batch_dims=1) for x in rows)]
