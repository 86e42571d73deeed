"""The functions in a SavedModel: `tokenize`, `logits` and `generate`, whose options are tensors.

B prompts, T prompt length, R texts of each prompt, N ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.generation.config import OPTIONS, GenerationConfig
from gpt2_multi.generation.options import Options, within
from gpt2_multi.generation.request import NO_CALLBACKS, Given
from gpt2_multi.tf.attention import upcast
from gpt2_multi.tf.generation.beams import BeamState
from gpt2_multi.tf.generation.generate import request_of, strategy_of
from gpt2_multi.tf.generation.rules import as_tensors, ends
from gpt2_multi.tf.generation.tracing import counted, traced
from gpt2_multi.tf.layers import sizes
from gpt2_multi.tf.serve.encoding import repaired
from gpt2_multi.tf.serve.tokenizer import TFGPT2Tokenizer

if TYPE_CHECKING:
    from gpt2_multi.model.config import GPT2Config
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

IDS = [tf.TensorSpec((None, None), tf.int32, name) for name in ("input_ids", "attention_mask")]
SHOWN: dict[str, Any] = dict.fromkeys(
    ("output_scores", "output_logits", "output_hidden_states", "output_attentions"), False
)  # which a signature's answer has no place for
TEXT = [tf.TensorSpec((None,), tf.string, "text")]


class Choices(NamedTuple):
    """The options that every call of `generate` may change, as tensors ()."""

    max_new_tokens: tf.Tensor  # int32
    do_sample: tf.Tensor  # bool
    temperature: tf.Tensor  # float32, or float64 of a model in float64, as of all real numbers here
    top_k: tf.Tensor  # int32; 0 is off
    top_p: tf.Tensor
    repetition_penalty: tf.Tensor
    seed: tf.Tensor  # int64

    @classmethod
    def of(cls, config: GenerationConfig, real: tf.DType) -> Choices:
        """What they are where a call does not say."""
        seed = 0 if config.seed is None else config.seed
        if not isinstance(seed, int) or seed >= 2**63:
            raise InputError(f"seed: expected a whole number below 2**63, found {seed!r}")
        return cls(
            tf.constant(config.total_length(0)),
            tf.constant(config.do_sample),
            tf.constant(config.temperature, real),
            tf.constant(within(config.top_k or 0)),
            tf.constant(config.top_p, real),
            tf.constant(config.repetition_penalty, real),
            tf.constant(seed, tf.int64),
        )

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """What a signature says of them."""
        return [tf.TensorSpec((), value.dtype, name) for name, value in zip(self._fields, self, strict=True)]

    def into(self, options: Options) -> Options:
        """The options of the file, whose seed is 0, with these in their places."""
        reals = ("temperature", "top_p", "repetition_penalty")
        return options._replace(
            do_sample=self.do_sample,
            top_k=self.top_k,
            streams=counted(tf.cast(self.seed, tf.uint64), sizes(options.streams)[0]),
            **{name: tf.cast(getattr(self, name), tf.float64) for name in reals},
        )

    def assertions(self) -> list[tf.Operation]:
        """What they may be, in the words of `GenerationConfig`."""
        fits = {
            "max_new_tokens": self.max_new_tokens >= 0,
            "temperature": (self.temperature >= 1e-9) & tf.math.is_finite(self.temperature),
            "top_k": self.top_k >= 0,
            "top_p": (self.top_p > 0) & (self.top_p <= 1),
            "repetition_penalty": (self.repetition_penalty > 0) & tf.math.is_finite(self.repetition_penalty),
            "seed": self.seed >= 0,
        }
        return [
            tf.debugging.Assert(fit, [f"{name}: expected {OPTIONS[name].words}, found", getattr(self, name)])
            for name, fit in fits.items()
        ]


def signature(function: Callable[..., dict[str, tf.Tensor]], specs: list[tf.TensorSpec]) -> Any:
    """A function as one of the graph."""
    return tf.function(function, input_signature=specs, autograph=False)


def logits_of(model: keras.Model, jit: bool) -> Callable[..., dict[str, tf.Tensor]]:
    """The function behind the signature `logits`."""

    def run(ids: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        return model(ids, attention_mask=mask, use_cache=False, return_dict=True).logits

    compiled = tf.function(run, jit_compile=jit or None, autograph=False)

    def logits(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies(assertions(model, input_ids, attention_mask, 0)):
            return {"logits": compiled(tf.identity(input_ids), tf.identity(attention_mask))}

    return logits


class Continuing:
    """What `generate` makes of ids in a graph, where the options of a call are tensors."""

    def __init__(
        self, model: keras.Model, config: GenerationConfig, tokenizer: GPT2Tokenizer | None, jit: bool
    ) -> None:
        """tokenizer: of the stop strings."""
        self.defaults = Choices.of(config, upcast(tf.zeros((), model.compute_dtype)).dtype)
        self.model, self.tokenizer = model, tokenizer
        self.config = replace(config, seed=0, return_dict_in_generate=False, **SHOWN)
        self.compiled = tf.function(self.run, jit_compile=jit or None, autograph=False)

    def __call__(self, ids: tf.Tensor, mask: tf.Tensor, choices: Choices) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """New tokens (B * R, N), how many each row has up to its end, and whether that was reached."""
        checks = [*choices.assertions(), *self.assertions(mask, choices)]
        with tf.control_dependencies(checks + assertions(self.model, ids, mask, choices.max_new_tokens)):
            ids, mask = tf.identity(ids), tf.identity(mask)
        none = tf.zeros((0, 0), tf.int32), tf.zeros((0,), tf.int32), tf.zeros((0,), tf.bool)  # XLA fails at it
        tokens, lengths, finished = tf.cond(
            tf.shape(ids)[0] > 0, lambda: self.compiled(ids, mask, choices), lambda: none
        )
        return tokens[:, : tf.reduce_max(tf.concat([lengths, [0]], 0))], lengths, finished

    def assertions(self, mask: tf.Tensor, choices: Choices) -> list[tf.Operation]:
        """What only generation needs, as assertions in the graph."""
        drawn = self.config.num_return_sequences == 1 or self.config.num_beams > 1
        several = "num_return_sequences: greedy choice gives one text only; set do_sample"
        empty = "input_ids: a prompt has no token; give at least one, such as the bos_token_id"
        return [
            tf.debugging.Assert(choices.do_sample | drawn, [several]),
            tf.debugging.Assert(tf.reduce_all(tf.reduce_any(tf.cast(mask, tf.bool), -1)), [empty]),
        ]

    def run(self, ids: tf.Tensor, mask: tf.Tensor, choices: Choices) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The same, with room for all tokens; this is what XLA compiles."""
        given = Given(ids, mask, self.tokenizer)
        request, prompt = request_of(self.model, self.config, given)
        options, new, config = choices.into(as_tensors(request.options)), choices.max_new_tokens, self.config
        state = traced(self.model, strategy_of(request, given, NO_CALLBACKS, new), prompt, options, new)
        if isinstance(state, BeamState):
            tokens, _, beams = state.found.best(config.num_return_sequences, config.fill_token_id)
            count = tf.reduce_max(tf.math.count_nonzero(beams >= 0, -1, dtype=tf.int32))
        else:
            tokens, count = state.shown, state.step
        lengths, finished = until_end(tokens, options)
        return tokens, tf.minimum(lengths, count), finished


def until_end(tokens: tf.Tensor, options: Options) -> tuple[tf.Tensor, tf.Tensor]:
    """How many of a row's tokens (N, W) there are up to its end, and whether it has one: (N,) each."""
    rows, width = sizes(tokens)
    zeros = tf.zeros((rows,), tf.int32)

    def once(
        column: tf.Tensor, length: tf.Tensor, finished: tf.Tensor, state: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        ended, state = ends(tf.gather(tokens, column, axis=1), state, options)
        return column + 1, length + tf.cast(~finished, tf.int32), finished | ended, state

    start = tf.constant(0), zeros, tf.zeros((rows,), tf.bool), zeros
    _, lengths, finished, _ = tf.while_loop(lambda column, *_: column < width, once, start)
    return lengths, finished


def of_ids(continuing: Continuing) -> dict[str, Any]:
    """The signatures `generate` and `serving_default` of ids."""
    default, several = continuing.defaults, continuing.config.num_return_sequences

    def generate(
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor,
        max_new_tokens: tf.Tensor = default.max_new_tokens,
        do_sample: tf.Tensor = default.do_sample,
        temperature: tf.Tensor = default.temperature,
        top_k: tf.Tensor = default.top_k,
        top_p: tf.Tensor = default.top_p,
        repetition_penalty: tf.Tensor = default.repetition_penalty,
        seed: tf.Tensor = default.seed,
    ) -> dict[str, tf.Tensor]:
        choices = Choices(max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed)
        tokens, _, finished = continuing(input_ids, attention_mask, choices)
        return {"ids": tf.concat([tf.repeat(input_ids, several, axis=0), tokens], 1), "finished": finished}

    whole = signature(generate, IDS + default.specs)

    def briefly(input_ids: tf.Tensor, attention_mask: tf.Tensor) -> dict[str, tf.Tensor]:
        return whole(input_ids, attention_mask)

    return {"generate": whole, "serving_default": signature(briefly, IDS)}


def of_texts(continuing: Continuing, layer: TFGPT2Tokenizer) -> dict[str, Any]:
    """The signatures `tokenize`, `generate` and `serving_default` of texts."""
    default, several, config = continuing.defaults, continuing.config.num_return_sequences, continuing.config

    def tokenize(text: tf.Tensor) -> dict[str, tf.Tensor]:
        return layer.pad(layer.encode(text))

    def generate(
        text: tf.Tensor,
        max_new_tokens: tf.Tensor = default.max_new_tokens,
        do_sample: tf.Tensor = default.do_sample,
        temperature: tf.Tensor = default.temperature,
        top_k: tf.Tensor = default.top_k,
        top_p: tf.Tensor = default.top_p,
        repetition_penalty: tf.Tensor = default.repetition_penalty,
        seed: tf.Tensor = default.seed,
    ) -> dict[str, tf.Tensor]:
        choices = Choices(max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed)
        rows = begun(layer.encode(text), continuing.model.config)
        tokens, lengths, finished = continuing(rows.to_tensor(), tf.ones_like(rows).to_tensor(), choices)
        new = tf.RaggedTensor.from_tensor(tokens, lengths)
        is_end = tf.reduce_any(tokens[..., None] == tf.constant(config.eos_token_ids, tf.int32), -1)
        shown = layer.detokenize(tf.RaggedTensor.from_tensor(tf.where(is_end, -1, tokens), lengths))
        prompts = tf.gather(rows, tf.repeat(tf.range(tf.shape(text)[0]), several))
        return {
            "text": tf.strings.join([tf.repeat(repaired(text), several), shown]),
            "ids": tf.concat([prompts, new], 1).to_tensor(config.fill_token_id),
            "finished": finished,
        }

    whole = signature(generate, TEXT + default.specs)

    def briefly(text: tf.Tensor) -> dict[str, tf.Tensor]:
        return whole(text)

    tokenizing, brief = signature(tokenize, TEXT), signature(briefly, TEXT)
    return {"tokenize": tokenizing, "generate": whole, "serving_default": brief}


def begun(rows: tf.RaggedTensor, model: GPT2Config) -> tf.RaggedTensor:
    """Rows of ids, of which those without any are begun by the model's `bos_token_id`."""
    empty, start = tf.cast(rows.row_lengths() == 0, tf.int64), model.bos_token_id
    sentence = f"text: a text is empty, and bos_token_id {start} of the model starts none; give a prompt"
    there = start is not None and 0 <= start < model.vocab_size
    with tf.control_dependencies([tf.debugging.Assert(there | (tf.reduce_sum(empty) == 0), [sentence])]):
        first = tf.fill([tf.reduce_sum(empty)], start if there else 0)
    return tf.concat([tf.RaggedTensor.from_row_lengths(first, empty, validate=False), rows], 1)


def assertions(model: keras.Model, ids: tf.Tensor, mask: tf.Tensor, new: Any) -> list[tf.Operation]:
    """What eager calls look at before they run, as assertions in the graph."""
    vocab, room = model.transformer.wte.input_dim, model.transformer.wpe.input_dim
    lengths = tf.reduce_sum(tf.cast(tf.cast(mask, tf.bool), tf.int32), -1)
    return [
        tf.debugging.assert_equal(tf.shape(ids), tf.shape(mask), "attention_mask: expected input_ids' shape"),
        tf.debugging.assert_non_negative(ids, "input_ids: an id is negative"),
        tf.debugging.assert_less(ids, vocab, f"input_ids: an id is outside the vocabulary of {vocab}"),
        tf.debugging.assert_less_equal(
            new, room - lengths, f"a prompt and max_new_tokens are more than n_positions {room}, which can be read"
        ),
    ]
