"""A call of `generate` as every framework sees it: texts or ids in, padded rows and plain numbers out; the answer back.

All of it is NumPy. Whoever traces ids without values makes the parts that need none by `options_of` and
`new_tokens_after`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
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


@dataclass(frozen=True, eq=False)
class Request:
    """Checked prompts of a model, and what is to follow them; B prompts, T their greatest length."""

    config: GenerationConfig
    model: GPT2Config
    tokenizer: GPT2Tokenizer | None
    prompts: str | Sequence[str] | None  # where texts were given
    given: Array  # (B, given length) int64, the ids as they were given
    ids: Array  # (B, T) int64, padded on the left, no more than the longest row needs
    mask: Array  # (B, T) bool, which of them count
    new_tokens: int  # how many may follow
    options: Options

    @classmethod
    def of(
        cls,
        config: GenerationConfig,
        model: GPT2Config,
        input_ids: Any,
        attention_mask: Any = None,
        tokenizer: GPT2Tokenizer | None = None,
    ) -> Request:
        """Check what a call was given: a text, texts, or ids (B, T) and their mask in NumPy.

        Raises InputError for an id outside the vocabulary, a prompt without a token, and a text beyond `n_positions`.
        """
        prompts = input_ids if texts.are_texts(input_ids) else None
        if prompts is not None:
            inputs.check_text_input(attention_mask is not None, tokenizer)
            rows = [texts.encode(text, cast("GPT2Tokenizer", tokenizer), model) for text in listed(prompts)]
            input_ids, attention_mask = texts.pad(rows)
        ids, mask = checked_rows(input_ids, attention_mask)
        new = new_tokens_after(config, ids.shape[1])
        if len(ids):
            inputs.check_prompts(int(mask.sum(-1).min()))
            inputs.check_ids("input_ids", inputs.Facts.of(ids), model.vocab_size)
            config.check_context(int(mask.sum(-1).max()), new, model.n_positions)
        options = options_of(config, model, len(ids), tokenizer)
        return cls(config, model, tokenizer, prompts, ids, *aligned(ids, mask), new, options)

    @classmethod
    def of_text(
        cls, config: GenerationConfig, model: GPT2Config, text: str, tokenizer: GPT2Tokenizer | None
    ) -> Request:
        """Check what is streamed as text: one text, continued once."""
        config.check_streaming()
        if config.num_return_sequences > 1:
            raise InputError("num_return_sequences: one text is streamed; leave it out, or call generate")
        inputs.check_text("text", text)
        inputs.check_tokenizer(tokenizer)
        return cls.of(config, model, text, None, tokenizer)

    def answer(self, output: GenerateOutput, sequences: Array | None) -> Any:
        """What `generate` returns, of an output whose `sequences` (B * num_return_sequences, T + N) have the prompts.

        sequences: the same in NumPy, which is needed where texts were given.
        """
        if self.prompts is None or sequences is None:
            return output if self.config.return_dict_in_generate else output.sequences
        made = self._trimmed(sequences)
        found = self._spelled(made)
        if not self.config.return_dict_in_generate:
            return found
        prompts = self._each([row[keep].tolist() for row, keep in zip(self.ids, self.mask, strict=True)])
        output.texts = found
        output.token_ids = self._grouped([prompt + ids for prompt, ids in zip(prompts, made, strict=True)])
        return output

    def _trimmed(self, sequences: Array) -> list[list[int]]:
        """The new tokens of each text, up to its end."""
        rows = sequences[:, self.given.shape[1] :].tolist()
        return texts.trim(rows, cast("GPT2Tokenizer", self.tokenizer), self.config, self.model)

    def _spelled(self, made: list[list[int]]) -> Any:
        """Each prompt with what its new tokens spell."""
        prompts = self._each(listed(cast("str | Sequence[str]", self.prompts)))
        new = ("".join(texts.decode(cast("GPT2Tokenizer", self.tokenizer), row, self.config)) for row in made)
        return self._grouped([prompt + text for prompt, text in zip(prompts, new, strict=True)])

    def _each(self, prompts: Sequence[Any]) -> list[Any]:
        """Each prompt as often as it is continued."""
        return [prompt for prompt in prompts for _ in range(self.config.num_return_sequences)]

    def _grouped(self, made: list[Any]) -> Any:
        return texts.grouped(made, isinstance(self.prompts, str), self.config.num_return_sequences)


def listed(prompts: str | Sequence[str]) -> Sequence[str]:
    """The texts of a call that may be given one."""
    return [prompts] if isinstance(prompts, str) else prompts


def checked_rows(ids: Any, mask: Any) -> tuple[Array, Array]:
    """Ids (B, T) int64 and their mask (B, T) bool; without one every id counts."""
    ids = np.asarray(ids)
    inputs.check_shape("input_ids", ids.shape, (None, None))
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
    inputs.check_shape("attention_mask", mask.shape, ids.shape)
    inputs.check_integers("input_ids", inputs.Facts.of(ids))
    return ids.astype(np.int64), mask


def aligned(ids: Array, mask: Array) -> tuple[Array, Array]:
    """Ids and mask (B, T) with padding on the left, and no more of it than the longest row needs."""
    order = mask.argsort(axis=-1, kind="stable")  # hidden tokens first
    hidden = ids.shape[1] - int(mask.sum(-1).max()) if len(ids) else 0
    return np.take_along_axis(ids, order, 1)[:, hidden:], np.take_along_axis(mask, order, 1)[:, hidden:]


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
