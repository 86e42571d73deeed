"""TFGPT2Tokenizer: GPT-2's tokenizer as a Keras layer of core TensorFlow operations, which a SavedModel takes along."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Self, cast

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.errors import TokenizerError
from gpt2_multi.files import arguments
from gpt2_multi.model import inputs
from gpt2_multi.tf.serve.encoding import HIDDEN, Encoder, repaired
from gpt2_multi.tokenizer.encoding.batching import check_size, choose
from gpt2_multi.tokenizer.engine.words import repair
from gpt2_multi.tokenizer.files import GPT2_PARTS, ROLES, AddedToken, Parts
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

MOST_IDS = 1 << 24
PADDINGS = {"longest": "longest", "max_length": "max_length", None: ""}
UNSAID = "unsaid"  # no padding, and no other either


@keras.saving.register_keras_serializable("gpt2_multi")
class TFGPT2Tokenizer(keras.layers.Layer):
    """Texts to ids and back, in the graph: the ids are those of `GPT2Tokenizer`, for every text.

    Called on strings it gives {"input_ids", "attention_mask"}, int32: (B, T) of texts (B,), (T,) of one text, or
    RaggedTensors without padding. Of texts (B,) either has also what a RaggedTensor has, `to_tensor`, which fills with
    0 on the right. Bytes that are not UTF-8 become U+FFFD, as Python replaces them.

    Args:
        vocab: token -> id, as in vocab.json. merges: pairs of tokens, or lines, as in merges.txt.
        max_length: how many tokens a row may have; longer ones are cut, unless `truncation` is False.
        pad_token_id: fills rows, under a mask of 0; by default the pad token's, or else the end token's; assignable.
        padding: "longest", "max_length", or None; by default to `max_length` where that and `pad_token_id` are given,
            else to the longest.
        padding_side, truncation_side: "right" or "left", where rows are filled and cut.
        add_bos_token: put the bos token before each text.
        add_prefix_space: put a space before each text, and what follows a token that is found in it, if there is none.
        split_special_tokens: read control tokens in texts as ordinary text.
        allowed_special: the control tokens that are found in texts, or "all"; by default all, and none with
            `split_special_tokens`.
        tokens: other arguments of `GPT2Tokenizer`: the tokens by their roles, such as eos_token, and
            additional_special_tokens; and added_tokens, pairs of a token as a dict and its id.

    Raises TokenizerError for what cannot be used.
    """

    supports_jit = False  # XLA has no strings

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[Sequence[str]],
        max_length: int | None = None,
        pad_token_id: int | None = None,
        padding: str | None = UNSAID,
        padding_side: str = "right",
        truncation: bool = True,
        truncation_side: str = "right",
        add_bos_token: bool = False,
        add_prefix_space: bool = False,
        split_special_tokens: bool = False,
        allowed_special: Sequence[str] | str | None = None,
        tokens: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(trainable=False, dtype="int32", **options)
        if padding == UNSAID:
            padding = "longest" if max_length is None or pad_token_id is None else "max_length"
        self.settings: dict[str, Any] = {
            "max_length": max_length, "padding": padding, "truncation": truncation,
            "split_special_tokens": split_special_tokens,
            "allowed_special": allowed_special if isinstance(allowed_special, str | None) else sorted(allowed_special),
            "padding_side": padding_side, "truncation_side": truncation_side, "add_bos_token": add_bos_token,
            "add_prefix_space": add_prefix_space,
        }  # fmt: skip
        check_lengths(max_length, padding)
        choose("truncation", truncation, {True: "", False: ""})
        given: dict[str, Any] = {"padding_side": padding_side, "truncation_side": truncation_side}
        self.python = in_python(vocab, merges, add_bos_token=add_bos_token, **given | dict(tokens or {}))
        steps = self.python._parts.steps
        steps.refuse_in_graph()
        self.around = ends_of(self.python)
        outside = recognised(self.python, split_special_tokens, allowed_special)
        self.encoder = Encoder(self.python._bpe, outside, add_prefix_space, steps.digits)
        self.spelling = tf.constant(spellings(self.python))  # (V,) bytes
        self.control = tf.constant(sorted(self.python.control_ids), tf.int64)
        self.pad_token_id = fill_of(self.python) if pad_token_id is None else pad_token_id
        self.encode = traced(self._encode)
        self.built = True

    @property
    def pad_token_id(self) -> int:
        """What rows are filled with."""
        return self._fill

    @pad_token_id.setter
    def pad_token_id(self, at: int) -> None:
        check_size("pad_token_id", at)
        check_room("pad_token_id", at)
        self._fill = at
        self.batches: dict[str, Any] = {}  # by the length that rows are filled to

    @property
    def max_length(self) -> int | None:
        """How many tokens a row may have."""
        length: int | None = self.settings["max_length"]
        return length

    @classmethod
    def from_tokenizer(cls, tokenizer: GPT2Tokenizer, **options: Any) -> Self:
        """The same tokenizer in the graph, ours or of transformers; `options` are arguments of the constructor."""
        inputs.check_tokenizer(tokenizer)
        tokenizer = GPT2Tokenizer.from_tokenizer(tokenizer)
        given: dict[str, Any] = {"add_bos_token": tokenizer.add_bos_token, "padding_side": tokenizer.padding_side}
        given |= {"add_prefix_space": tokenizer.add_prefix_space, "truncation_side": tokenizer.truncation_side}
        given["split_special_tokens"] = tokenizer.split_special_tokens
        return cls(**constructor(tokenizer) | given | options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Load from a folder, or from the Hugging Face hub by name.

        `options` say where the files are, as for `GPT2Tokenizer`, and are arguments of the constructor.
        """
        place, own = arguments.sort(options, arguments.TOKENIZER_ONLY)
        return cls.from_tokenizer(GPT2Tokenizer.from_pretrained(pretrained_model_name_or_path, **place), **own)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, in types of JSON."""
        config = {"name": self.name, "pad_token_id": self.pad_token_id}
        return config | dict(self.settings) | constructor(self.python)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Strings, as a tensor, a list or a symbolic input, to {"input_ids", "attention_mask"}.

        `max_length` takes the place of the constructor's: rows are cut and, but for ragged ones, filled to that length.
        """
        if isinstance(inputs, (str, bytes, list, tuple, np.ndarray)):
            inputs = tf.convert_to_tensor(
                tf.nest.map_structure(sound, inputs) if len(inputs) else tf.zeros(0, tf.string)
            )
        check_texts(inputs)
        return super().__call__(inputs, **options)

    def call(self, inputs: tf.Tensor, max_length: int | None = None) -> dict[str, Any]:
        """The ids and the mask of texts (B,), of (B, 1) as Keras feeds columns, or of one text ()."""
        if inputs.shape.rank == 2 and inputs.shape[1] is None:
            sentence = "inputs: expected one text in each row"
            with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(inputs)[1], 1, sentence)]):
                inputs = tf.identity(inputs)
        check_lengths(max_length, None)
        if (key := str(max_length)) not in self.batches:
            self.batches[key] = traced(partial(self._batch, max_length=max_length))
        output, rows = self.batches[key](tf.reshape(inputs, [-1]))
        if inputs.shape.rank == 0:
            return {name: row[0] for name, row in output.items()}
        if self.settings["padding"] is not None:
            output["input_ids"].to_tensor = rows.to_tensor
            output["attention_mask"].to_tensor = lambda *args, **options: tf.ones_like(rows).to_tensor(*args, **options)
        return dict(output)

    def compute_output_spec(self, inputs: Any, max_length: int | None = None, **options: Any) -> dict[str, Any]:
        """What Keras is told of the output of a symbolic input."""
        width = (max_length or self.width) if self.settings["truncation"] else None
        shape = (width,) if len(inputs.shape) == 0 else (inputs.shape[0], width)
        return {name: keras.KerasTensor(shape, "int32", name=name) for name in ("input_ids", "attention_mask")}

    def _batch(self, texts: tf.Tensor, max_length: int | None) -> tuple[dict[str, Any], tf.RaggedTensor]:
        """The ids and the mask of texts (B,), padded unless they are to be ragged; and the ids as they are ragged."""
        rows = self._encode(texts, max_length)
        if self.settings["padding"] is None:
            return {"input_ids": rows, "attention_mask": tf.ones_like(rows)}, rows
        return self.pad(rows, max_length or self.width), rows

    def _encode(self, texts: tf.Tensor, max_length: int | None = None) -> tf.RaggedTensor:
        """The ids of texts (B,), cut, begun and ended as the options say: (B, None) int32"""
        rows, limit = self.encoder.encode(texts), max_length or self.max_length
        if limit is not None and self.settings["truncation"]:
            room = max(limit - sum(map(len, self.around)), 0)
            rows = rows[:, :room] if self.settings["truncation_side"] == "right" or not room else rows[:, -room:]
        first, last = (
            tf.RaggedTensor.from_tensor(tf.tile(tf.constant(ids, tf.int32, [1, len(ids)]), [rows.nrows(), 1]))
            for ids in self.around
        )
        return tf.concat([first, rows, last], 1) if any(self.around) else rows

    @property
    def width(self) -> int | None:
        """How long all rows are at least."""
        return self.settings["max_length"] if self.settings["padding"] == "max_length" else None

    def pad(self, rows: tf.RaggedTensor, width: int | None = None) -> dict[str, tf.Tensor]:
        """Rows as dense ids and mask, (B, T) int32; at least as long as `width`, if not as the options say."""
        width = width or self.width
        ids = rows.to_tensor(self.pad_token_id, shape=[None, width if self.settings["truncation"] else None])
        if width and not self.settings["truncation"]:  # a row may be longer
            more = tf.maximum(width - tf.shape(ids)[1], 0)
            ids = tf.pad(ids, [(0, 0), (0, more)], constant_values=self.pad_token_id)
        lengths, size = tf.cast(rows.row_lengths(), tf.int32)[:, None], tf.shape(ids)[1]
        place = tf.range(size)
        mask = place < lengths
        if self.settings["padding_side"] == "left":
            order = (place - (size - lengths)) % tf.maximum(size, 1)
            ids, mask = (tf.gather(x, order, batch_dims=1) for x in (ids, mask))
        return {"input_ids": ids, "attention_mask": tf.cast(mask, tf.int32)}

    def id_to_bytes(self, ids: Any) -> tf.Tensor:
        """The bytes of each id, as strings of the shape of `ids`; none for an id that is not known."""
        ids = tf.cast(whole_numbers(ids), tf.int64)
        known = (ids >= 0) & (ids < tf.shape(self.spelling, tf.int64)[0])
        return tf.where(known, tf.gather(self.spelling, tf.where(known, ids, 0)), b"")

    def detokenize(self, ids: Any, skip_special_tokens: bool = False) -> tf.Tensor:
        """The texts (B,) of ids (B, T), dense or ragged, or one of (T,); bytes that are not UTF-8 become U+FFFD."""
        if isinstance(ids, tf.RaggedTensor):
            parts = ids.with_flat_values(self.shown(ids.flat_values, skip_special_tokens))
        else:
            parts = self.shown(whole_numbers(ids), skip_special_tokens)
        raw = tf.strings.reduce_join(parts, -1)
        return tf.reshape(repaired(tf.reshape(raw, [-1])), tf.shape(raw))

    def shown(self, ids: tf.Tensor, skip_special_tokens: bool) -> tf.Tensor:
        """The bytes of each id, or none where it is a control token that is not wanted."""
        parts = self.id_to_bytes(ids)
        hidden = tf.reduce_any(tf.cast(ids, tf.int64)[..., None] == self.control, -1)
        return tf.where(hidden & skip_special_tokens, b"", parts)


def in_python(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], added_tokens: Sequence[Any] = (), **options: Any
) -> GPT2Tokenizer:
    """The tokenizer in Python, from what a configuration says in types of JSON."""
    added = {AddedToken(**token): at for token, at in added_tokens}
    parts = Parts.of(options.pop("parts"))[0] if "parts" in options else GPT2_PARTS
    tokenizer = GPT2Tokenizer(dict(vocab), cast(Any, list(merges)), added_tokens=added, parts=parts, **options)
    for token, at in added.items():  # with the flags that the tokens of roles have lost
        tokenizer._control.add(token, at)
    return tokenizer


def traced(function: Any) -> Any:
    """A function of texts (B,) as a graph."""
    made = tf.function(function, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    made._omit_frequent_tracing_warning = True  # five tokenizers are no mistake
    return made


def ends_of(tokenizer: GPT2Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that are put before a text, and after it."""
    row = tokenizer._row()
    at = next(at for at, piece in enumerate(row) if piece.of is not None)
    first, last = ([i for piece in part for i in piece.ids] for part in (row[:at], row[at:]))
    return first, last


def check_lengths(max_length: Any, padding: Any) -> None:
    """Padding to a length needs one."""
    choose("padding", padding, PADDINGS)
    if max_length is not None:
        check_size("max_length", max_length, 1)
    if padding == "max_length" and max_length is None:
        raise TokenizerError('padding: "max_length" needs max_length; give it, or take "longest"')


def sound(text: Any) -> Any:
    """A text as UTF-8 can hold it."""
    return repair(text) if isinstance(text, str) else text


def check_texts(inputs: Any) -> None:
    """Texts are one, or a row of them."""
    if not isinstance(inputs, (tf.Tensor, keras.KerasTensor)):
        raise TokenizerError(f"inputs: expected texts, as a tensor or a list, found {type(inputs).__name__}")
    if inputs.dtype != "string":
        raise TokenizerError(f"inputs: expected texts, found numbers of {tf.as_dtype(inputs.dtype).name}")
    shape = tf.TensorShape(inputs.shape)
    if shape.rank is None or shape.rank > 2 or (shape.rank == 2 and shape[1] not in (None, 1)):
        raise TokenizerError(f"inputs: expected a text or texts of shape (batch,), found shape {shape}")


def whole_numbers(ids: Any) -> tf.Tensor:
    """Ids as a tensor of integers; where there are none, of any type."""
    ids = tf.convert_to_tensor(ids)
    if not ids.dtype.is_integer and ids.shape.num_elements() != 0:
        raise TokenizerError(f"ids: expected whole numbers, found {ids.dtype.name}")
    return ids if ids.dtype.is_integer else tf.zeros(ids.shape, tf.int32)


def fill_of(tokenizer: GPT2Tokenizer) -> int:
    """What rows are filled with: the pad token, or else the end token, or 0."""
    return next((at for at in (tokenizer.pad_token_id, tokenizer.eos_token_id) if at is not None), 0)


def recognised(tokenizer: GPT2Tokenizer, split_special_tokens: bool, allowed_special: Any) -> list[dict[str, int]]:
    """The tokens that are found in texts before words are, in groups that are searched for one after the other.

    A control token that is not allowed has the id HIDDEN.
    """
    allowed, _ = tokenizer._choose_control(split_special_tokens, allowed_special)
    tokens, ids = tokenizer._control.tokens, dict(tokenizer._control.ids)
    ids |= {name: HIDDEN for name, token in tokens.items() if token.special and name not in allowed}
    for name, token in tokens.items():
        if ids[name] != HIDDEN and (token.lstrip or token.rstrip or token.single_word):
            raise TokenizerError(
                f"added token {name!r}: lstrip, rstrip and single_word are not there in a graph; leave them out, or "
                "read control tokens as text with split_special_tokens=True"
            )
    if not tokenizer._bpe.complete and tokenizer.unk_token_id is None:
        raise TokenizerError("vocab: lacks a byte, and there is no unk_token; add the byte, or name an unk_token")
    groups = ({name: ids[name] for name in group} for group in tokenizer._control.groups())
    return [group for group in groups if set(group.values()) != {HIDDEN}]


def check_room(name: str, at: int) -> None:
    """Tables have room for every id up to the greatest."""
    if at >= MOST_IDS:
        raise TokenizerError(f"{name}: expected an id below {MOST_IDS}, found {at}")


def spellings(tokenizer: GPT2Tokenizer) -> list[bytes]:
    """The bytes of every id from 0 on."""
    raw, last = tokenizer._bytes, max(tokenizer._bytes, default=0)
    check_room("vocab", last)
    return [raw.get(at, b"") for at in range(last + 1)]


def constructor(tokenizer: GPT2Tokenizer) -> dict[str, Any]:
    """A tokenizer as the constructor's arguments, in types of JSON."""
    roles = {role: getattr(tokenizer, role) for role in ROLES}
    added = [[asdict(token), at] for at, token in tokenizer.added_tokens_decoder.items()]
    tokens = {**roles, "additional_special_tokens": tokenizer.additional_special_tokens, "added_tokens": added}
    tokens |= {"add_eos_token": True} if tokenizer.add_eos_token else {}
    if tokenizer._parts != GPT2_PARTS:
        tokens["parts"] = tokenizer._parts.to_json(tokenizer.add_prefix_space)
    merges = [list(pair) for pair in tokenizer._bpe.merges]
    return {"vocab": dict(tokenizer._vocab), "merges": merges, "tokens": tokens}
