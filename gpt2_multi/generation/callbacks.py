"""What a caller brings to a generation: functions on logits, ends of his own, and what tokens are streamed to.

They are functions on tensors of the framework. R rows, V vocabulary, T ids so far. In PyTorch:

- logits_processor: ids (R, T), logits (R, V) -> (R, V)
- prefix_allowed_tokens_fn: the prompt's number, ids (T,) -> a list of ids
- stopping_criteria: ids (R, T), the scores so far where they are asked for, or None -> a bool, or booleans (R,)

In TensorFlow and JAX ids have room for more, S in all, and the length so far, (), comes after the other arguments:

- logits_processor: ids (R, S), logits (R, V), length -> (R, V)
- prefix_allowed_tokens_fn: the prompt's number, ids (S,), length -> booleans (V,)
- stopping_criteria: ids (R, S), logits (R, V), length -> booleans (R,)

In TensorFlow and JAX they are traced once into the compiled loop, and ids from `length` on mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.stopping.spelling import Speller, own
from gpt2_multi.model import inputs

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Function = Callable[..., Any]


class LogitsProcessor:
    """What changes the logits that a token is chosen by; any function of the same arguments does."""

    def __call__(self, input_ids: Any, scores: Any, *length: Any) -> Any:
        """(R, V) for the ids so far and the logits (R, V)."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__; define it")


class LogitsProcessorList(list[Function]):
    """Processors, one after the other."""

    def __call__(self, input_ids: Any, scores: Any, *length: Any) -> Any:
        """What the last gives, each being given what the one before gives."""
        for processor in self:
            scores = processor(input_ids, scores, *length)
        return scores


class StoppingCriteria:
    """What says whether a text is over; any function of the same arguments does."""

    def __call__(self, input_ids: Any, scores: Any, *length: Any) -> Any:
        """One answer, or one for each row (R,)."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__; define it")


class StoppingCriteriaList(list[Function]):
    """Criteria, of which one is enough."""

    def __call__(self, input_ids: Any, scores: Any, *length: Any) -> Any:
        """Whether any of them says so."""
        is_over: Any = False
        for criterion in self:
            is_over = is_over | criterion(input_ids, scores, *length)
        return is_over


class TextStreamer:
    """Prints a text while it is made, whole characters only.

    `decode_kwargs` are arguments of the tokenizer's `decode`, such as `skip_special_tokens`. A subclass that does
    something else with the pieces overrides `on_finalized_text`.
    """

    def __init__(self, tokenizer: GPT2Tokenizer, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        inputs.check_tokenizer(tokenizer)
        tokenizer.decode([], **decode_kwargs)  # which refuses what it does not take
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._begin()

    def _begin(self) -> None:
        self.next_tokens_are_prompt = True
        skips = self.decode_kwargs.get("skip_special_tokens")
        skipped = own(self.tokenizer).control_ids if skips else ()
        self._speller = Speller(self.tokenizer, skipped, **self.decode_kwargs)

    def put(self, value: Any) -> None:
        """Take ids of one row, (1, T) or (N,): the prompt's, then the new ones."""
        ids = np.asarray(value)
        if ids.ndim > 1 and len(ids) > 1:
            raise InputError(f"streamer: prints one text, found {len(ids)} rows; give one prompt, or use stream_tokens")
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            self._speller.follow(ids.reshape(-1).tolist())
        elif text := self._speller.put(ids.reshape(-1).tolist()):
            self.on_finalized_text(text)

    def end(self) -> None:
        """Give what is left, and the end of the line; the next text may begin."""
        rest = self._speller.end()
        self._begin()
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Pieces of a text for another thread to iterate over, which waits `timeout` seconds for each, or for ever."""

    def __init__(
        self, tokenizer: GPT2Tokenizer, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Keep a piece for the other thread; None is the end."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece


@dataclass(frozen=True, eq=False)
class Callbacks:
    """What a call brings, checked. Two with the same functions are equal, so that a compiled loop is found again."""

    processors: tuple[Function, ...] = ()
    allowed: Function | None = None  # prefix_allowed_tokens_fn
    criteria: tuple[Function, ...] = ()
    streamer: Any = None  # which no compiled loop knows of

    @classmethod
    def of(
        cls,
        logits_processor: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
    ) -> Callbacks:
        """Check what a call was given; InputError for what is no function, or no streamer."""
        if prefix_allowed_tokens_fn is not None:
            check_function("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn)
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise InputError(f"streamer: expected methods put and end, found {type(streamer).__name__}; add them")
        processors = functions("logits_processor", logits_processor)
        return cls(processors, prefix_allowed_tokens_fn, functions("stopping_criteria", stopping_criteria), streamer)

    @property
    def are_rules(self) -> bool:
        """Whether they change logits."""
        return bool(self.processors) or self.allowed is not None

    @property
    def see_ids(self) -> bool:
        """Whether any looks at ids, in whose columns it may count."""
        return self.are_rules or bool(self.criteria)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Within it tokens are streamed; whoever waits for them is told of the end, however it comes."""
        try:
            yield
        finally:
            if self.streamer is not None:
                self.streamer.end()

    def check(self, config: GenerationConfig) -> None:
        """What is streamed is not known better later."""
        if self.streamer is not None and config.num_beams > 1:
            raise InputError("streamer: beams are not known before the end; leave out num_beams or streamer")

    def _key(self) -> tuple[Any, ...]:
        return tuple(map(identity, (*self.processors, None, self.allowed, *self.criteria)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Callbacks) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def functions(name: str, given: Any) -> tuple[Function, ...]:
    """A function, or some, as a tuple."""
    if given is None:
        return ()
    several = tuple(given) if isinstance(given, Iterable) else (given,)  # a list of them may be called, too
    for function in several:
        check_function(name, function)
    return several


def check_function(name: str, given: object) -> None:
    """What is to be called is a function."""
    if not callable(given):
        raise InputError(f"{name}: expected a function, found {type(given).__name__}; give what can be called")


def identity(function: Any) -> Any:
    """What a function is recognised by: itself, or its place in memory where it cannot be a key."""
    try:
        hash(function)
    except TypeError:
        return id(function)
    return function
