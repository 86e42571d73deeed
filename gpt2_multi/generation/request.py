"""A call of `generate` as every framework sees it: texts or ids in, padded rows and plain numbers out; the answer back.

All of it is NumPy. Whoever traces ids without values makes the parts that need none by `options_of` and
`new_tokens_after`.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.generation import texts
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.config import GenerationConfig, as_generation_config
from gpt2_multi.generation.config.table import OF_CALLS
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.rules import noise_streams
from gpt2_multi.generation.stopping import stop_table
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.outputs import GenerateOutput

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]

_lock = Lock()
_next: int | None = None  # the first stream of noise that no text has had since set_seed
NO_CALLBACKS = Callbacks()
# Of what a call brings, the tensors; and those in whose place texts may stand, with their masks.
TENSORS = (
    "input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "encoder_hidden_states", "encoder_attention_mask",
    "negative_prompt_ids", "negative_prompt_attention_mask",
)  # fmt: skip
WORDS = (("input_ids", "attention_mask"), ("negative_prompt_ids", "negative_prompt_attention_mask"))


class Given(NamedTuple):
    """What a call of `generate` brings beside its options, in tensors of the framework (docs/generation.md)."""

    input_ids: Any = None
    attention_mask: Any = None
    tokenizer: GPT2Tokenizer | None = None
    token_type_ids: Any = None
    inputs_embeds: Any = None
    past_key_values: Any = None
    encoder_hidden_states: Any = None
    encoder_attention_mask: Any = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    logits_processor: Any = None
    prefix_allowed_tokens_fn: Any = None
    stopping_criteria: Any = None
    streamer: Any = None
    assistant_model: Any = None

    @classmethod
    def of(
        cls, own: GenerationConfig, input_ids: Any, attention_mask: Any, config: Any, more: Mapping[str, Any]
    ) -> tuple[Given, GenerationConfig]:
        """The arguments of a call, and what a model with an `own` configuration is to do by its options.

        `inputs` is another name of the first; a configuration may stand second too, as in transformers. Raises
        TypeError for what is neither an argument nor an option.
        """
        if hasattr(attention_mask, "to_dict") and config is None:
            attention_mask, config = None, attention_mask
        more = {name: value for name, value in more.items() if value is not None or name not in OF_CALLS}
        arguments = [*cls._fields[2:], "inputs"]
        GenerationConfig.check_names(more, arguments)
        if more.get("inputs") is not None and input_ids is not None:
            raise InputError("inputs: is another name of input_ids; give one of the two")
        first = more.get("inputs") if input_ids is None else input_ids
        given = cls(first, attention_mask, **{name: more[name] for name in cls._fields[2:] if name in more})
        return given, as_generation_config(own).resolve(
            config, {name: value for name, value in more.items() if name not in arguments}
        )

    @property
    def arrays(self) -> dict[str, Any]:
        """What is there and has to be a tensor: not texts, and no mask of theirs, which cannot be used."""
        words = [given for given in WORDS if texts.are_texts(getattr(self, given[0]))]
        return {
            name: x for name in TENSORS if (x := getattr(self, name)) is not None and not any(name in w for w in words)
        }

    @property
    def callbacks(self) -> Callbacks:
        """The functions of the caller, checked."""
        rules = self.logits_processor, self.prefix_allowed_tokens_fn
        return Callbacks.of(*rules, self.stopping_criteria, self.streamer)


@dataclass(frozen=True, eq=False)
class Request:
    """Checked prompts of a model, and what is to follow them; B prompts, T their greatest length.

    Where embeddings stand for ids, these are `vocab_size`, which no rule knows and no model can read.
    """

    config: GenerationConfig
    model: GPT2Config
    tokenizer: GPT2Tokenizer | None
    prompts: str | Sequence[str] | None  # where texts were given
    given: Array  # (B, given length) int64, the ids as they were given; (B, 0) where there were none
    ids: Array  # (B, T) int64, padded on the left, no more than the longest row needs
    mask: Array  # (B, T) bool, which of them count
    new_tokens: int  # how many may follow
    options: Options
    callbacks: Callbacks = NO_CALLBACKS
    order: Array | None = None  # (B, T), where each column stood; the first is repeated in what was filled up
    types: Array | None = None  # (B, T) int64, token_type_ids
    negative: tuple[Array, Array] | None = None  # (B, T) each, ids and mask of what is guided away from
    past: int | None = None  # how many columns are in the cache that was given, and are not read again
    width: int = 0  # how many columns the prompts had

    @property
    def places(self) -> Array | None:
        """Which column of `ids` each that was given is, (B, width), any for padding; None where all stay in place."""
        order = cast(Array, self.order)
        if order.shape[1] == self.width and (order == np.arange(self.width)).all():
            return None
        places = np.zeros((len(order), self.width), np.int64)
        np.put_along_axis(places, order, np.arange(order.shape[1])[None], 1)
        return places

    @classmethod
    def of(
        cls,
        config: GenerationConfig,
        model: GPT2Config,
        input_ids: Any,
        attention_mask: Any = None,
        tokenizer: GPT2Tokenizer | None = None,
        callbacks: Callbacks = NO_CALLBACKS,
        *,
        token_type_ids: Any = None,
        embeds: inputs.Facts | None = None,
        past: int | None = None,
        negative: tuple[Any, Any] = (None, None),
        batch: int = 1,
    ) -> Request:
        """Check what a call was given: a text, texts, or ids (B, T) and their mask in NumPy, or None.

        None is a text that begins, in so many rows as `batch` says, unless there are `embeds` (B, T, E).
        token_type_ids: (B, T). past: how many tokens are in the cache, if there is one. negative: ids and mask, or
        texts, for `guidance_scale`.
        Raises InputError for an id outside the vocabulary, a prompt without a token, and a text beyond `n_positions`.
        """
        callbacks.check(config)
        prompts = input_ids if texts.are_texts(input_ids) else None
        given, ids, mask = rows_of(config, model, input_ids, attention_mask, tokenizer, embeds, batch)
        width, new = ids.shape[1], new_tokens_after(config, ids.shape[1])
        check_beside(config, embeds is not None, token_type_ids is not None, past is not None)
        check_rows(config, model, mask, new, past)
        types = None if token_type_ids is None else types_of(token_type_ids, ids.shape, model)
        as_given = callbacks.see_ids and width + new <= model.n_positions
        order = order_of(mask, as_given) if past is None else np.indices(mask.shape)[1]
        ids, mask = np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
        types = None if types is None else np.take_along_axis(types, order, 1)
        rules = options_of(config, model, len(ids), tokenizer), callbacks
        request = cls(
            config, model, tokenizer, prompts, given, ids, mask, new, *rules, order, types, None, past, width
        )  # fmt: skip
        return request._guided(*negative)

    def _guided(self, negative: Any, negative_mask: Any) -> Request:
        """The same beside what `guidance_scale` leads away from: by default the last token of each row."""
        if not self.config.is_guided:
            if negative is not None or negative_mask is not None:
                warnings.warn("negative_prompt_ids changes nothing without guidance_scale", stacklevel=4)
            return self
        others = self.ids[:, -1:], self.mask[:, -1:]
        if negative is not None:
            others = aligned(*negative_rows(self, negative, negative_mask))
            self.config.check_context(int(others[1].sum(-1).max(initial=0)), self.new_tokens, self.model.n_positions)
        width = max(self.ids.shape[1], others[0].shape[1])
        ids, mask, order = (widened(x, width) for x in (self.ids, self.mask, cast(Array, self.order)))
        return replace(
            self, ids=ids, mask=mask, order=order, negative=(widened(others[0], width), widened(others[1], width))
        )

    def answer(self, output: GenerateOutput, sequences: Array | None) -> Any:
        """What `generate` returns, of an output whose `sequences` (B * num_return_sequences, T + N) have the prompts.

        sequences: the same in NumPy, which is needed where texts were given.
        """
        if self.prompts is None or sequences is None:
            return output if self.config.return_dict_in_generate else output.sequences
        made = self._trimmed(sequences)
        prompts = self._each([row[keep].tolist() for row, keep in zip(self.ids, self.mask, strict=True)])
        found = self._spelled(prompts, made)
        if not self.config.return_dict_in_generate:
            return found
        output.texts = found
        output.token_ids = self._grouped([prompt + ids for prompt, ids in zip(prompts, made, strict=True)])
        return output

    def _trimmed(self, sequences: Array) -> list[list[int]]:
        """The new tokens of each text, up to its end."""
        rows = sequences[:, self.given.shape[1] :].tolist()
        return texts.trim(rows, cast("GPT2Tokenizer", self.tokenizer), self.config, self.model)

    def _spelled(self, before: list[list[int]], made: list[list[int]]) -> Any:
        """Each prompt with what its new tokens spell."""
        prompts = self._each(listed(cast("str | Sequence[str]", self.prompts)))
        tokenizer = cast("GPT2Tokenizer", self.tokenizer)
        new = (texts.spelled(tokenizer, ids, self.config, first) for first, ids in zip(before, made, strict=True))
        return self._grouped([prompt + text for prompt, text in zip(prompts, new, strict=True)])

    def _each(self, prompts: Sequence[Any]) -> list[Any]:
        """Each prompt as often as it is continued."""
        return [prompt for prompt in prompts for _ in range(self.config.num_return_sequences)]

    def _grouped(self, made: list[Any]) -> Any:
        return texts.grouped(made, isinstance(self.prompts, str), self.config.num_return_sequences)


def check_streamed(config: GenerationConfig, given: Given, is_text: bool = True) -> None:
    """What is streamed is known token by token, and a text is one that is continued once."""
    config.check_streaming()
    if given.streamer is not None:
        raise InputError("streamer: the tokens are given one by one anyway; leave it out, or call generate")
    if is_text and config.num_return_sequences > 1:
        raise InputError("num_return_sequences: one text is streamed; leave it out, or call generate")
    if is_text:
        inputs.check_text("text", given.input_ids)
        inputs.check_tokenizer(given.tokenizer)


def listed(prompts: str | Sequence[str]) -> Sequence[str]:
    """The texts of a call that may be given one."""
    return [prompts] if isinstance(prompts, str) else prompts


def rows_of(
    config: GenerationConfig,
    model: GPT2Config,
    ids: Any,
    mask: Any,
    tokenizer: GPT2Tokenizer | None,
    embeds: inputs.Facts | None,
    batch: int,
) -> tuple[Array, Array, Array]:
    """Ids as they were given, (B, given length), and what is read: ids and mask (B, T)."""
    shape = None if embeds is None else inputs.check_source(model, {"inputs_embeds": embeds}).shape[:2]
    if texts.are_texts(ids):
        ids, mask = encoded(ids, mask, tokenizer, model)
    elif ids is None and shape is None:
        inputs.check_begin(config.bos_token_id, model.vocab_size)
        ids = np.full((batch, 1), config.bos_token_id)
    if ids is None:
        ids, mask = checked_rows(np.full(cast("tuple[int, int]", shape), model.vocab_size), mask)
        return ids[:, :0], ids, mask
    ids, mask = checked_rows(ids, mask)
    inputs.check_ids("input_ids", inputs.Facts.of(ids), model.vocab_size)
    if shape is not None:
        inputs.check_shape("inputs_embeds", shape, ids.shape)
    return ids, ids, mask


def encoded(
    prompts: str | Sequence[str], mask: Any, tokenizer: GPT2Tokenizer | None, model: GPT2Config
) -> tuple[Array, Array]:
    """Texts, which bring no mask, as ids and mask (B, T)."""
    inputs.check_text_input(mask is not None, tokenizer)
    return texts.pad([texts.encode(text, cast("GPT2Tokenizer", tokenizer), model) for text in listed(prompts)])


def check_rows(config: GenerationConfig, model: GPT2Config, mask: Array, new: int, past: int | None) -> None:
    """Every row has a token, its text fits the context, and after a cache there is something to read."""
    if len(mask):
        inputs.check_prompts(int(mask.sum(-1).min()))
        config.check_context(int(mask.sum(-1).max()), new, model.n_positions)
    if past is not None:
        inputs.check_continued(mask.shape[1], past, bool(mask[:, -1].all()))


def checked_rows(ids: Any, mask: Any) -> tuple[Array, Array]:
    """Ids (B, T) int64 and their mask (B, T) bool; without one every id counts."""
    ids = np.asarray(ids)
    inputs.check_shape("input_ids", ids.shape, (None, None))
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
    inputs.check_shape("attention_mask", mask.shape, ids.shape)
    inputs.check_integers("input_ids", inputs.Facts.of(ids))
    return ids.astype(np.int64), mask


def types_of(given: Any, shape: tuple[int, ...], model: GPT2Config) -> Array:
    """token_type_ids (B, T) int64: they are ids, one for each token."""
    types: Array = np.asarray(given)
    found = inputs.Facts.of(types)
    inputs.check_shape("token_type_ids", found.shape, shape)
    inputs.check_ids("token_type_ids", found, model.vocab_size)
    return types.astype(np.int64, copy=False)


def check_beside(config: GenerationConfig, has_embeds: bool, has_types: bool, has_past: bool) -> None:
    """What cannot be given together."""
    given = {"inputs_embeds": has_embeds, "token_type_ids": has_types, "past_key_values": has_past}
    options = {
        "sliding_window": config.sliding_window,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "guidance_scale": config.is_guided,
    }
    cannot = {
        "inputs_embeds": ["sliding_window", "prompt_lookup_num_tokens", "guidance_scale", "past_key_values"],
        "token_type_ids": ["guidance_scale"],
        "past_key_values": ["sliding_window", "prompt_lookup_num_tokens", "guidance_scale"],
    }
    for name, others in cannot.items():
        if found := [other for other in others if given[name] and {**given, **options}[other]]:
            raise InputError(f"{name}: cannot be used with {found[0]}; leave out one of the two")


def check_assisted(request: Request, given: Given) -> None:
    """An assistant is a model of the same vocabulary, for one text after the other."""
    config, assistant, name = request.config, given.assistant_model, "assistant_model"
    if assistant is None:
        return
    inputs.check_assistant(assistant, request.model.vocab_size)
    several = len(request.ids) * config.num_return_sequences > 1
    cannot = {
        "num_beams": config.num_beams > 1,
        "sliding_window": config.sliding_window,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "inputs_embeds": given.inputs_embeds is not None,
        "past_key_values": given.past_key_values is not None,
        "return_dict_in_generate and several texts": config.return_dict_in_generate and several,
        "output_hidden_states": config.output_hidden_states,
        "output_attentions": config.output_attentions,
    }
    if found := [other for other, is_there in cannot.items() if is_there]:
        raise InputError(f"{name}: cannot be used with {found[0]}; leave out one of the two")


def order_of(mask: Array, as_given: bool = False) -> Array:
    """Where each column stood, (B, T), when padding goes to the left and stays only as far as the longest row needs it.

    mask: (B, given length). `as_given`, none of it goes.
    """
    order = mask.argsort(axis=-1, kind="stable")  # hidden tokens first
    hidden = mask.shape[1] - int(mask.sum(-1).max()) if len(mask) and not as_given else 0
    return order[:, hidden:]


def aligned(ids: Array, mask: Array) -> tuple[Array, Array]:
    """Ids and mask (B, T) with padding on the left, and no more of it than the longest row needs."""
    order = order_of(mask)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)


def widened(x: Array, width: int) -> Array:
    """Rows (B, T) with zeros on the left: (B, width)"""
    return np.pad(x, [(0, 0), (width - x.shape[1], 0)])


def negative_rows(request: Request, given: Any, mask: Any) -> tuple[Array, Array]:
    """What is guided away from, one row for each prompt, as ids and mask."""
    if texts.are_texts(given):
        given, mask = encoded(given, mask, request.tokenizer, request.model)
    given = np.asarray(given)
    keep = np.ones(given.shape, bool) if mask is None else np.asarray(mask) != 0
    inputs.check_shape("negative_prompt_ids", given.shape, (len(request.ids), None))
    inputs.check_shape("negative_prompt_attention_mask", keep.shape, given.shape)
    inputs.check_ids("negative_prompt_ids", inputs.Facts.of(given), request.model.vocab_size)
    if not keep.any(-1).all():
        raise InputError("negative_prompt_ids: a row has no token; give at least one, such as the bos_token_id")
    return given.astype(np.int64), keep


def new_tokens_after(config: GenerationConfig, prompt: int | None) -> int:
    """How many tokens may follow prompts of this length; None is a length that is not known while tracing."""
    if prompt is None and config.max_new_tokens is None and config.max_length is not None:
        raise InputError("max_length: the prompt's length is not known while tracing; give max_new_tokens instead")
    return config.total_length(prompt or 0) - (prompt or 0)


def options_of(config: GenerationConfig, model: GPT2Config, prompts: int, tokenizer: GPT2Tokenizer | None) -> Options:
    """The options as numbers, for so many prompts: with the stop strings' table and the noise of every row."""
    config.check_vocabulary(model.vocab_size)
    stops = stop_table(config.stops, tokenizer, model.vocab_size)
    return Options.of(config, stops, noise_streams(seed_of(config, prompts), prompts, config.rows))


def set_seed(seed: int) -> None:
    """Set the seed of what is sampled without one, and of Python's, NumPy's and the imported frameworks' generators.

    Calls of `generate` after it go on where the last one ended, so that equal calls give different texts, and the same
    ones again after the same `set_seed`. Raises InputError for anything but a whole number from 0 to 2**32 - 1.
    """
    global _next
    inputs.check_seed(seed)
    seed = int(seed)
    with _lock:
        _next = seed
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].random.set_seed(seed)


def seed_of(config: GenerationConfig, prompts: int) -> int | Sequence[int]:
    """The seed of a call: its own, or where `set_seed` left off, or 0."""
    global _next
    if config.seed is not None:
        return config.seed
    with _lock:
        if not config.do_sample or _next is None:
            return 0
        first, _next = _next, (_next + prompts * config.rows) % 2**64
    return first
