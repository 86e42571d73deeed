"""Generation in TensorFlow: prefill, decode loop, the rules on logits, and the sample that every framework draws alike.

The rules are those of `gpt2_multi.sampling`, on batches: B rows, T prompt length, S keys (prompt and room), V vocabulary.
Every option is a tensor, so that another value traces and compiles nothing; lengths come in buckets for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from gpt2_multi import limits
from gpt2_multi.sampling import PARITY, ROTATIONS, GenerationConfig
from gpt2_multi.tf.attention import Context, KVCache, causal_bias, hiding, key_bias, positions, sizes, widened
from gpt2_multi.tf.checks import check_integers, check_states, extremes, is_concrete, shape

if TYPE_CHECKING:
    from gpt2_multi.tf.heads import TFGPT2LMHeadModel


class Prompt(NamedTuple):
    """Checked input of a generation, each row padded on the left and repeated for every sequence to return."""

    ids: tf.Tensor  # (B, T) int32
    mask: tf.Tensor  # (B, T) bool
    states: tf.Tensor | None  # (B, encoder length, E)
    states_mask: tf.Tensor | None  # (B, encoder length)


class Options(NamedTuple):
    """The options of `GenerationConfig` as tensors."""

    do_sample: tf.Tensor  # () bool
    temperature: tf.Tensor  # () float64
    top_k: tf.Tensor  # () int32; 0 is off
    top_p: tf.Tensor  # () float64
    repetition_penalty: tf.Tensor  # () float64
    no_repeat_ngram_size: tf.Tensor  # () int32
    min_length: tf.Tensor  # () int32
    min_new_tokens: tf.Tensor  # () int32
    seed: tf.Tensor  # () uint64
    ends: tf.Tensor  # (number of end tokens, at least one,) int32; -1 is none
    fill: tf.Tensor  # () int32

    @classmethod
    def of(cls, config: GenerationConfig) -> Options:
        """The tensors of a configuration."""
        real, whole = partial(tf.constant, dtype=tf.float64), partial(tf.constant, dtype=tf.int32)
        return cls(
            tf.constant(config.do_sample),
            real(config.temperature),
            whole(config.top_k or 0),
            real(config.top_p),
            real(config.repetition_penalty),
            whole(config.no_repeat_ngram_size),
            whole(config.min_length),
            whole(config.min_new_tokens or 0),
            tf.constant(config.seed, tf.uint64),
            whole(list(config.eos_token_ids) or [-1]),
            whole(config.fill_token_id),
        )


class State(NamedTuple):
    """What the loop carries from one token to the next."""

    step: tf.Tensor  # () int32, how many tokens were made
    ids: tf.Tensor  # (B, S) int32, the prompt and what was made
    finished: tf.Tensor  # (B,) bool
    cache: KVCache


def generate(
    self: TFGPT2LMHeadModel,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    encoder_hidden_states: tf.Tensor | None = None,
    encoder_attention_mask: tf.Tensor | None = None,
    jit_compile: bool | None = None,
    **options: Any,
) -> tf.Tensor:
    """Continue (B, T) prompts: returns (B * num_return_sequences, T + new) ids, the prompts in front.

    `options` are the fields of `GenerationConfig`, on top of `generation_config` or the model's own. Without
    `attention_mask` every id counts; with it, padding may stand on either side, and each row gets what it gets alone.
    The loop is one function, compiled by XLA unless `jit_compile` is False. Called while another function is traced, it
    becomes a part of that, and always returns the greatest length.
    Raises InputError for an id outside the vocabulary, a text beyond `n_positions` and unusable options, and TypeError
    for an unknown option.
    """
    config = (generation_config or self.generation_config).with_options(options)
    prompt = prepare(self, config, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask)
    new = config.total_length(prompt.ids.shape[1]) - prompt.ids.shape[1]
    input_ids = tf.repeat(tf.convert_to_tensor(input_ids), config.num_return_sequences, axis=0)
    if not new or prompt.ids.shape[0] == 0:
        return tf.pad(input_ids, [(0, 0), (0, new)])
    if tf.executing_eagerly():
        run = self.decoders["xla" if jit_compile in (None, True) else "graph"]
        tokens, made = run(bucketed(prompt), bucket(new), tf.constant(new), Options.of(config))
        tokens = tokens[:, : int(made)]
    else:
        tokens, _ = decode(self, prompt, new, tf.constant(new), Options.of(config))
    return tf.concat([input_ids, tf.cast(tokens, input_ids.dtype)], 1)


def stream_tokens(
    self: TFGPT2LMHeadModel,
    input_ids: tf.Tensor,
    attention_mask: tf.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    encoder_hidden_states: tf.Tensor | None = None,
    encoder_attention_mask: tf.Tensor | None = None,
    jit_compile: bool | None = None,
    **options: Any,
) -> Iterator[tf.Tensor]:
    """What `generate` appends, one column (B * num_return_sequences,) of ids at a time, as soon as it is known."""
    config = (generation_config or self.generation_config).with_options(options)
    prompt = prepare(self, config, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask)
    return _stream(self, config, prompt, jit_compile in (None, True))


def _stream(model: TFGPT2LMHeadModel, config: GenerationConfig, prompt: Prompt, jit: bool) -> Iterator[tf.Tensor]:
    new = config.total_length(prompt.ids.shape[1]) - prompt.ids.shape[1]
    if not new:
        return
    prompt, options = bucketed(prompt), Options.of(config)
    first, following = (model.decoders[f"{name} {'xla' if jit else 'graph'}"] for name in ("begin", "advance"))
    state = first(prompt, bucket(new), options)
    for step in range(new):
        if step:
            state = following(prompt.mask, state, tf.constant(step + 1), options)
        yield shown(prompt, state, options)[:, step]
        if tf.reduce_all(state.finished):
            return


def decoders(model: TFGPT2LMHeadModel) -> dict[str, Callable[..., Any]]:
    """The functions that a model generates with, by how they are compiled."""
    parts = {"": decode, "begin ": begin, "advance ": advance}
    ways = {"graph": False, "xla": True}
    return {
        f"{p}{w}": tf.function(partial(f, model), jit_compile=j, autograph=False)
        for p, f in parts.items()
        for w, j in ways.items()
    }


def bucket(length: int) -> int:
    """The length that is compiled for this one: a multiple of 16, and of a quarter of the power of two below it."""
    size = max(16, 1 << max(length - 1, 0).bit_length() - 3 if length > 16 else 16)
    return -(-length // size) * size


def bucketed(prompt: Prompt) -> Prompt:
    """The prompt with padding before it, up to its bucket's length."""
    more = [(0, 0), (bucket(prompt.ids.shape[1]) - prompt.ids.shape[1], 0)]
    return prompt._replace(ids=tf.pad(prompt.ids, more), mask=tf.pad(prompt.mask, more))


def prepare(
    model: TFGPT2LMHeadModel,
    config: GenerationConfig,
    ids: Any,
    mask: Any,
    states: tf.Tensor | None,
    states_mask: tf.Tensor | None,
) -> Prompt:
    """Check the input, move padding to the left, and repeat each row `num_return_sequences` times."""
    ids = tf.convert_to_tensor(ids)
    limits.check_shape("input_ids", shape(ids), (None, None))
    mask = tf.ones_like(ids, tf.bool) if mask is None else tf.cast(mask, tf.bool)
    limits.check_shape("attention_mask", shape(mask, *ids.shape), shape(ids))
    check_integers("input_ids", ids)
    check_states(model.transformer, ids.shape[0], states, states_mask)
    counts = tf.reduce_sum(tf.cast(mask, tf.int32), -1)
    if is_concrete(ids) and len(ids):
        limits.check_prompts(int(tf.reduce_min(counts)))
        limits.check_ids("input_ids", *extremes(ids), model.transformer.wte.input_dim)
        new = config.total_length(ids.shape[1]) - ids.shape[1]
        limits.check_context(int(tf.reduce_max(counts)), new, model.transformer.wpe.input_dim)
    order = tf.argsort(tf.cast(mask, tf.int32), axis=-1, stable=True)  # hidden tokens first
    aligned = (tf.gather(tf.cast(x, d), order, batch_dims=1) for x, d in ((ids, tf.int32), (mask, tf.bool)))
    given = (*aligned, states, states_mask)
    return Prompt(*(None if x is None else tf.repeat(x, config.num_return_sequences, axis=0) for x in given))


def decode(
    model: TFGPT2LMHeadModel, prompt: Prompt, room: Any, new: tf.Tensor, options: Options
) -> tuple[tf.Tensor, tf.Tensor]:
    """Up to `new` tokens after a prompt, in a cache that has room for `room`: (B, room) ids and how many were made."""
    state = begin(model, prompt, room, options)
    state = advance(model, prompt.mask, state, new, options)
    return shown(prompt, state, options), state.step


def begin(model: TFGPT2LMHeadModel, prompt: Prompt, room: Any, options: Options) -> State:
    """Fill the cache with the prompt, and choose the first token."""
    body, (batch, length) = model.transformer, sizes(prompt.ids)
    bias = causal_bias(length, length, 0, prompt.mask, tf.as_dtype(model.compute_dtype))
    context = Context(bias, KVCache(), [], states=prompt.states, cross_presents=[])
    if prompt.states is not None and prompt.states_mask is not None:
        context.states_bias = key_bias(prompt.states_mask, bias.dtype)
    hidden, cache = body.run(body.embed(prompt.ids, positions(prompt.ids, prompt.mask, 0)), context).to_tuple()
    longer = [(0, 0), (0, 0), (0, room), (0, 0)]
    layers = tuple((tf.pad(key, longer), tf.pad(value, longer)) for key, value in cache.layers)
    ids, finished = tf.pad(prompt.ids, [(0, 0), (0, room)]), tf.zeros(batch, tf.bool)
    state = State(tf.constant(0), ids, finished, KVCache(layers, cache.cross, tf.convert_to_tensor(length)))
    return accept(state, choose(model.logits(hidden[:, -1]), prompt.mask, state, options), length, options)


def advance(model: TFGPT2LMHeadModel, mask: tf.Tensor, state: State, until: tf.Tensor, options: Options) -> State:
    """Choose and feed back one token per row and step, until `until` are made or no row goes on."""
    (_, length), keys = sizes(mask), sizes(state.ids)[1]
    counts = tf.reduce_sum(tf.cast(mask, tf.int32), -1)  # (B,), the position of the first new token
    keep = tf.concat([mask, tf.ones((sizes(mask)[0], keys - length), tf.bool)], 1)  # (B, S)

    def going(state: State) -> tf.Tensor:
        return (state.step < until) & ~tf.reduce_all(state.finished)

    def once(state: State) -> tuple[State]:
        logits, cache = follow(model, keep, counts, state, length)
        state = state._replace(cache=cache)
        return (accept(state, choose(logits, mask, state, options), length, options),)

    return tf.while_loop(going, once, (state,))[0]


def follow(
    model: TFGPT2LMHeadModel, keep: tf.Tensor, counts: tf.Tensor, state: State, length: Any
) -> tuple[tf.Tensor, KVCache]:
    """The logits (B, V) after the last token of each row, and the cache with it."""
    body, place = model.transformer, length + state.step - 1  # where the last token stands
    token = tf.gather(state.ids, place, axis=1)[:, None]  # (B, 1)
    seen = keep & (tf.range(sizes(keep)[1]) <= place)
    bias = hiding(seen[:, None, None, :], tf.as_dtype(model.compute_dtype))
    cross = state.cache.cross
    x = body.embed(token, (counts + state.step - 1)[:, None])
    hidden, cache = body.run(x, Context(bias, state.cache, [])).to_tuple()
    return model.logits(hidden[:, 0]), KVCache(cache.layers, cross, cache.filled)


def accept(state: State, chosen: tf.Tensor, length: Any, options: Options) -> State:
    """The state with one more token in each row (B,)."""
    here = tf.range(sizes(state.ids)[1]) == length + state.step
    ids = tf.where(here, chosen[:, None], state.ids)
    ended = tf.reduce_any(chosen[:, None] == options.ends, -1)
    return State(state.step + 1, ids, state.finished | ended, state.cache)


def shown(prompt: Prompt, state: State, options: Options) -> tf.Tensor:
    """What the caller sees of the tokens that were made: a finished row is filled, (B, room)."""
    tokens = state.ids[:, sizes(prompt.ids)[1] :]
    ends = tf.reduce_any(tokens[..., None] == options.ends, -1)
    made = tf.range(sizes(tokens)[1]) < state.step
    over = tf.cumsum(tf.cast(ends & made, tf.int32), axis=-1, exclusive=True) > 0
    return tf.where(over | ~made, options.fill, tokens)


def choose(logits: tf.Tensor, mask: tf.Tensor, state: State, options: Options) -> tf.Tensor:
    """The next token of each row, from the model's logits (B, V): -> (B,)"""
    logits = widened(logits)
    lengths = tf.reduce_sum(tf.cast(mask, tf.int32), -1, keepdims=True) + state.step  # (B, 1); padding does not count
    keep = written(mask, state)
    logits = when(options.repetition_penalty != 1, lambda x: penalise(x, state.ids, keep, options), logits)
    size = options.no_repeat_ngram_size
    logits = when(size > 0, lambda x: ban_repeats(x, state.ids, keep, sizes(mask)[1] + state.step, size), logits)
    short = (lengths < options.min_length) | (state.step < options.min_new_tokens)
    logits = without(logits, short & is_end(logits, options))
    return tf.cond(
        options.do_sample,
        lambda: sample(warp(logits, options), options.seed, state.step),
        lambda: tf.argmax(logits, -1, output_type=tf.int32),
    )


def when(condition: tf.Tensor, change: Callable[[tf.Tensor], tf.Tensor], logits: tf.Tensor) -> tf.Tensor:
    """The logits, changed if the condition holds; what is not needed is not computed."""
    return tf.cond(condition, lambda: change(logits), lambda: logits)


def without(logits: tf.Tensor, gone: tf.Tensor) -> tf.Tensor:
    """The logits with some tokens ruled out."""
    return tf.where(gone, tf.constant(-float("inf"), logits.dtype), logits)


def written(mask: tf.Tensor, state: State) -> tf.Tensor:
    """Which of the ids (B, S) are there and count."""
    (batch, length), keys = sizes(mask), sizes(state.ids)[1]
    made = tf.broadcast_to(tf.range(keys - length) < state.step, (batch, keys - length))
    return tf.concat([mask, made], 1)


def is_end(logits: tf.Tensor, options: Options) -> tf.Tensor:
    """Which ids of the vocabulary are end tokens, (V,)."""
    return tf.reduce_any(tf.range(sizes(logits)[1])[:, None] == options.ends, -1)


def warp(logits: tf.Tensor, options: Options) -> tf.Tensor:
    """Temperature, top-k and top-p."""
    logits = logits / tf.cast(options.temperature, logits.dtype)
    logits = when(options.top_k > 0, lambda x: keep_top_k(x, options.top_k), logits)
    return when(options.top_p < 1, lambda x: keep_top_p(x, options.top_p), logits)


def mark(logits: tf.Tensor, ids: tf.Tensor, marked: tf.Tensor) -> tf.Tensor:
    """Which tokens (B, V) are marked somewhere in a row: ids (B, S), marked (B, S) -> booleans."""
    batch, length = sizes(ids)
    row = tf.repeat(tf.range(batch), length)
    index = tf.stack([row, tf.reshape(ids, [-1])], -1)
    return tf.scatter_nd(index, tf.cast(tf.reshape(marked, [-1]), tf.int32), tf.shape(logits)) > 0


def penalise(logits: tf.Tensor, ids: tf.Tensor, keep: tf.Tensor, options: Options) -> tf.Tensor:
    """Make each token that a row has seen less likely (Keskar et al. 2019, section 4.1)."""
    penalty = tf.cast(options.repetition_penalty, logits.dtype)
    return tf.where(mark(logits, ids, keep), tf.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban_repeats(logits: tf.Tensor, ids: tf.Tensor, keep: tf.Tensor, length: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Rule out every token that would repeat an n-gram of its row's ids (B, S); windows over padding do not count."""
    place = tf.range(sizes(ids)[1])

    def narrowed(back: tf.Tensor, repeats: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        before = tf.maximum(place - back, 0)
        equal = tf.gather(ids, before, axis=1) == tf.gather(ids, length - back, axis=1)[:, None]
        return back + 1, repeats & equal & tf.gather(keep, before, axis=1) & (place >= back)

    _, repeats = tf.while_loop(lambda back, _: back < size, narrowed, (tf.constant(1), keep))
    return without(logits, mark(logits, ids, repeats))


def keep_top_k(logits: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
    """Keep the k greatest logits, and what ties with the k-th."""
    keys = ordered(logits)
    least = greatest(keys, lambda key: tf.math.count_nonzero(keys >= key, -1, keepdims=True, dtype=tf.int32) >= k)
    return without(logits, keys < least)


def keep_top_p(logits: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
    """Keep the fewest most likely tokens whose probability reaches p, at least one; lower ids first."""
    keys, probs, p = ordered(logits), tf.nn.softmax(logits), tf.cast(p, logits.dtype)

    def mass(where: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.where(where, probs, 0), -1, keepdims=True)

    last = greatest(keys, lambda key: mass(keys >= key) >= p)  # what reaches p
    tied = keys == last
    before = mass(keys > last) + tf.cumsum(tf.where(tied, probs, 0), axis=-1, exclusive=True)
    return without(logits, (keys < last) | (tied & (before >= p)))


def ordered(logits: tf.Tensor) -> tf.Tensor:
    """Unsigned integers in the order of these floats: the bits, all flipped where the sign is set, else the sign."""
    kind = tf.uint64 if logits.dtype == tf.float64 else tf.uint32
    bits = tf.bitcast(logits + 0, kind)  # + 0: the two zeros are one
    sign = tf.constant(1 << kind.size * 8 - 1, kind)
    return tf.where(bits >= sign, ~bits, bits | sign)


def greatest(keys: tf.Tensor, holds: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """The greatest key of each row for which a condition holds that holds for all lower ones, bit by bit: (B, 1).

    It needs no sort, which XLA does by one comparison after the other.
    """
    width, one = keys.dtype.size * 8, tf.constant(1, keys.dtype)

    def lower(bit: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tried = found | tf.bitwise.left_shift(one, tf.cast(bit, keys.dtype))
        return bit - 1, tf.where(holds(tried), tried, found)

    start = tf.zeros((sizes(keys)[0], 1), keys.dtype)
    return tf.while_loop(lambda bit, _: bit >= 0, lower, (tf.constant(width - 1), start))[1]


def sample(logits: tf.Tensor, seed: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
    """Draw from softmax(logits) by Gumbel noise (Maddison et al. 2014): (B, V) -> (B,)"""
    batch, vocab = sizes(logits)
    stream = seed + tf.cast(tf.range(batch), tf.uint64)[:, None]  # (B, 1), wraps around
    low, high = (tf.cast(tf.bitwise.right_shift(stream, tf.constant(s, tf.uint64)), tf.uint32) for s in (0, 32))
    x0, _ = threefry2x32((low, high), (tf.cast(step, tf.uint32), tf.cast(tf.range(vocab), tf.uint32)))
    uniform = (tf.cast(tf.bitwise.right_shift(x0, tf.constant(9, tf.uint32)), logits.dtype) + 0.5) * 2.0**-23
    return tf.argmax(logits - tf.math.log(-tf.math.log(uniform)), -1, output_type=tf.int32)


def threefry2x32(
    keys: tuple[tf.Tensor, tf.Tensor], counter: tuple[tf.Tensor, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """`sampling.threefry2x32` on uint32 tensors, which wrap around."""
    words = (keys[0], keys[1], keys[0] ^ keys[1] ^ tf.constant(PARITY, tf.uint32))
    x0, x1 = counter[0] + words[0], counter[1] + words[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ rotated(x1, rotation)
        x0 = x0 + words[(group + 1) % 3]
        x1 = x1 + words[(group + 2) % 3] + tf.constant(group + 1, tf.uint32)
    return x0, x1


def rotated(word: tf.Tensor, by: int) -> tf.Tensor:
    """32-bit words rotated to the left."""
    left, right = (tf.constant(bits, tf.uint32) for bits in (by, 32 - by))
    return tf.bitwise.left_shift(word, left) | tf.bitwise.right_shift(word, right)
