"""What a pipeline is given, and how it is read: texts, chats, and whatever yields them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from gpt2_multi.errors import InputError, described
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

# Arguments of a pipeline's call that say how a prompt is read.
READING = (
    "prefix", "truncation", "padding", "add_special_tokens", "handle_long_generation", "continue_final_message",
    "tokenizer_encode_kwargs", "tools", "documents", "tokenizer",
)  # fmt: skip


def is_message(given: Any) -> bool:
    """Whether it is a part of a chat."""
    return isinstance(given, Mapping) and "role" in given and "content" in given


def is_chat(given: Any) -> bool:
    """Whether it is a chat, a list of messages."""
    return isinstance(given, (list, tuple)) and bool(given) and is_message(given[0])


def check_prompt(prompt: Any) -> None:
    """A prompt is a text, or a chat; InputError for anything else."""
    if not is_chat(prompt):
        inputs.check_text("text_inputs", prompt)
    elif wrong := [message for message in prompt if not is_message(message)]:
        raise InputError(
            f'text_inputs: expected messages {{"role": ..., "content": ...}}, found {wrong[0]!r} in a chat'
        )


def items(given: Any) -> Iterator[Any]:
    """The items of anything that has some; a dataset may have a length and no iterator. Messages are one chat."""
    if hasattr(given, "__iter__"):
        found = iter(given)
    elif hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        found = (given[i] for i in range(len(given)))
    else:
        raise InputError(f"text_inputs: expected a text, or what yields texts, found {type(given).__name__}")
    first = list(next(([item] for item in found), []))
    return iter([[*first, *found]]) if first and is_message(first[0]) else chain(first, found)


@dataclass(frozen=True)
class Reading:
    """How prompts become ids: the arguments of transformers' pipeline, under their names."""

    tokenizer: GPT2Tokenizer
    model: GPT2Config
    prefix: str = ""
    truncation: Any = None
    padding: Any = None  # each prompt is read alone
    add_special_tokens: bool | None = None
    handle_long_generation: str | None = None
    continue_final_message: bool | None = None
    tokenizer_encode_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Any = None
    documents: Any = None

    def __post_init__(self) -> None:
        if self.handle_long_generation not in (None, "hole"):
            raise InputError(f'handle_long_generation: expected None or "hole", found {self.handle_long_generation!r}')
        inputs.check_text("prefix", self.prefix)

    def ids(self, prompt: Any, config: GenerationConfig) -> list[int]:
        """The ids of a prompt; with "hole" as many of the last as leave room for what follows."""
        options = {
            "add_special_tokens": self.add_special_tokens,
            "truncation": self.truncation,
            "max_length": config.max_length if self.truncation else None,
        }
        options = {name: x for name, x in options.items() if x is not None} | dict(self.tokenizer_encode_kwargs)
        ids = self._of_chat(prompt, options) if is_chat(prompt) else self._of_text(prompt, options)
        return ids[-self._room(len(ids), config) :] if self.handle_long_generation else ids

    def _of_text(self, prompt: str, options: Mapping[str, Any]) -> list[int]:
        return texts.encode(self.prefix + prompt, self.tokenizer, self.model, **options)

    def _of_chat(self, messages: Any, options: Mapping[str, Any]) -> list[int]:
        if not hasattr(self.tokenizer, "apply_chat_template"):
            raise InputError("tokenizer: has no apply_chat_template, which chats need; give a GPT2Tokenizer")
        goes_on = self.goes_on(messages)
        options = {name: value for name, value in options.items() if name != "add_special_tokens"}
        chat = {"tools": self.tools, "documents": self.documents, "continue_final_message": goes_on}
        found = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=not goes_on, **chat, **options)
        return list(found["input_ids"] if isinstance(found, Mapping) else found)

    def _room(self, length: int, config: GenerationConfig) -> int:
        """How many ids leave room for the new ones."""
        most = min(getattr(self.tokenizer, "model_max_length", self.model.n_positions), self.model.n_positions)
        new = config.max_new_tokens
        new = max(config.max_length - length, 0) if new is None and config.max_length is not None else new or 20
        if most <= new:
            raise InputError(
                f"handle_long_generation: {new} new tokens leave no room for a prompt in {most}; ask for fewer"
            )
        return most - new

    def goes_on(self, messages: Any) -> bool:
        """Whether a chat's last message is to be continued, as one of the assistant is."""
        given = self.continue_final_message
        return messages[-1]["role"] == "assistant" if given is None else given

    def whole(self, prompt: Any, new: str) -> Any:
        """A prompt and what follows it: a text, or the messages of a chat."""
        if not is_chat(prompt):
            return prompt + new
        *before, last = prompt
        if self.goes_on(prompt):
            return [*before, {**last, "content": last["content"] + new}]
        return [*prompt, {"role": "assistant", "content": new}]


def reading_of(tokenizer: GPT2Tokenizer, model: GPT2Config, options: dict[str, Any]) -> Reading:
    """How prompts are read, by the options that say so, which are taken away."""
    given = {name: options.pop(name) for name in READING if name in options}
    given = {name: value for name, value in given.items() if value is not None}
    check_same(tokenizer, given.pop("tokenizer", tokenizer))
    return Reading(tokenizer, model, **given)


def check_same(tokenizer: Any, given: Any) -> None:
    """A call may name the tokenizer that its pipeline has, as `generate` needs one for stop strings."""
    if given is not tokenizer and vocabulary_of(given) != vocabulary_of(tokenizer):
        raise InputError(
            f"tokenizer: expected the pipeline's own, found {described(given)} of another vocabulary; "
            "make a pipeline with it"
        )


def vocabulary_of(tokenizer: Any) -> Any:
    """Its tokens with their ids, or what cannot be the same as those of another."""
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else tokenizer
