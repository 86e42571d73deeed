"""What goes on writing texts: a loaded model with the options of a command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from gpt2_multi.app.backends import Backend
from gpt2_multi.app.terminal import tokenizer_of
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import resolve
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

NEW_TOKENS = 100


@dataclass(frozen=True)
class Writer:
    """A language model and how it goes on.

    config: every option but how many tokens follow. new_tokens: how many these are; None for `NEW_TOKENS`, or as many
    as there is room for. one_text: options with which a single text is there soonest.
    """

    model: Any
    tokenizer: GPT2Tokenizer
    config: GenerationConfig
    new_tokens: int | None = None
    one_text: Mapping[str, Any] | None = None

    @classmethod
    def load(cls, row: Backend, name: str, device: str | None, dtype: str, quantize: str | None) -> Self:
        """The model of a folder or a name, with its own options."""
        place, folder = row.device(device), resolve(name)
        tokenizer = tokenizer_of(str(folder))
        model = row.load(folder, place, dtype, quantization=quantize)
        return cls(model, tokenizer, model.generation_config, one_text=row.one_text)

    @property
    def seed(self) -> int:
        """The seed of every text."""
        seed = self.config.seed
        if isinstance(seed, Sequence):
            raise InputError(f"seed: the model's generation_config.json has {len(seed)} of them; give one")
        return seed or 0

    def count(self, prompt: str, name: str) -> int:
        """How many tokens are to follow a prompt; InputError, which gives it this name, where there is no room."""
        length, most = len(texts.encode(prompt, self.tokenizer, self.model.config)), self.model.config.n_positions
        if length >= most and not self.config.sliding_window:
            raise InputError(f"{name}: {length} tokens leave no room, for the model can read {most}; shorten it")
        if self.new_tokens is not None:
            self.config.check_context(length, self.new_tokens, most)
            return self.new_tokens
        return NEW_TOKENS if self.config.sliding_window else min(NEW_TOKENS, most - length)

    def stream(self, prompt: str, count: int) -> Iterator[str]:
        """What follows a prompt, in pieces, up to a stop string."""
        config = self.config.with_options({"max_new_tokens": count})
        pieces = self.model.stream(prompt, generation_config=config, tokenizer=self.tokenizer, **(self.one_text or {}))
        return texts.before_stops(pieces, config.stops)

    def write(self, prompts: Sequence[str], **options: Any) -> Iterator[list[str]]:
        """What follows each of some prompts, in one text or several: what each gets alone.

        options: of `generate`, where they are not the configuration's.
        """
        counts = ((self.count(prompt, "PROMPT"), prompt) for prompt in prompts)
        for count, group in groupby(counts, lambda pair: pair[0]):
            yield from self._together([prompt for _, prompt in group], {"max_new_tokens": count, **options})

    def _together(self, prompts: list[str], options: Mapping[str, Any]) -> Iterator[list[str]]:
        seeds = {"seed": [self.seed] * len(prompts)} if self.config.do_sample else {}
        how = {"generation_config": self.config, "tokenizer": self.tokenizer, **seeds}
        made = self.model.generate(prompts, **how, **options)
        for prompt, found in zip(prompts, made, strict=True):
            new = (text[len(prompt) :] for text in ([found] if isinstance(found, str) else found))
            yield ["".join(texts.before_stops([text], self.config.stops)) for text in new]
