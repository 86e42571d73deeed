"""OpenAI's form: what each field of a request may be, and how answers and refusals are spelled."""

from __future__ import annotations

import json
import re
import reprlib
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn

from gpt2_multi.app.serve.engine import Token
from gpt2_multi.errors import nearest, shortened
from gpt2_multi.model.fields import Field, is_real, is_whole

STOPS = 4  # stop strings of a request, as OpenAI has it
CHOICES = 128  # completions of a prompt
LONGEST = 1024  # bytes of stop strings: each is searched for in every text
MODEL_OWNER = "gpt2-multi"
NEVER = -9999.0  # the log-probability of what cannot be, as JSON has no infinity
DONE = "data: [DONE]\n\n"
RETRY = {"retry-after": "1"}  # a header: after how many seconds to ask again


class RequestError(Exception):
    """What is answered in the place of a completion; `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object that OpenAI answers."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        kind = "requests" if self.status == HTTPStatus.TOO_MANY_REQUESTS else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def shown(name: str) -> str:
    """A name that a request has, cut where it is too long for a sentence."""
    return shortened(name, 60)


def refused(name: str, why: str) -> RequestError:
    """The refusal of a field."""
    return RequestError(400, f"{name}: {why}", name)


def wrong(name: str, expected: str, found: object) -> RequestError:
    """The refusal of a field that holds the wrong thing."""
    return refused(name, f"expected {expected}, found {reprlib.repr(found)}")


# --- fields ----------------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_whole(item, 0, 2**31 - 1) for item in value)


def _is_prompt(value: Any) -> bool:
    if not isinstance(value, list):
        return _is_text(value)
    return _are_ids(value) or (bool(value) and (all(map(_is_text, value)) or all(map(_are_ids, value))))


def _are_stops(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return len(stops) <= STOPS and all(isinstance(stop, str) and stop for stop in stops)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch("0|[1-9][0-9]{,8}", key) and is_real(bias, -100, 100) for key, bias in value.items()
    )


def _are_stream_options(value: Any) -> bool:
    names = {"include_usage", "include_obfuscation"}
    return isinstance(value, dict) and value.keys() <= names and all(isinstance(item, bool) for item in value.values())


def _whole(least: int, most: int = 2**31 - 1) -> Field:
    words = f"a whole number from {least}" + (f" to {most}" if most < 2**31 - 1 else "")
    return Field(lambda value: is_whole(value, least, most), words)


def _real(least: float, most: float) -> Field:
    return Field(lambda value: is_real(value, least, most), f"a number from {least} to {most}")


TRUTH = Field(lambda value: isinstance(value, bool), "true or false")
TEXT = Field(_is_text, "a text")
CHECKS: Mapping[str, Field] = {
    "model": TEXT,
    "prompt": Field(_is_prompt, "a text, a list of texts, a list of ids, or a list of lists of ids, none empty"),
    "max_tokens": _whole(0),
    "temperature": _real(0, 2),
    "top_p": _real(0, 1),
    "n": _whole(1, CHOICES),
    "best_of": _whole(1, CHOICES),
    "stop": Field(_are_stops, f"a text, or a list of up to {STOPS}, none of them empty"),
    "seed": Field(lambda value: is_whole(value, -(2**63), 2**64 - 1), "a whole number from -2**63 to 2**64 - 1"),
    "logprobs": _whole(0, 5),
    "echo": TRUTH,
    "logit_bias": Field(_is_bias, "an object of ids and numbers from -100 to 100"),
    "presence_penalty": _real(-2, 2),
    "frequency_penalty": _real(-2, 2),
    "suffix": TEXT,
    "user": TEXT,
    "stream": TRUTH,
    "stream_options": Field(_are_stream_options, "an object with include_usage, true or false"),
    "top_k": _whole(0),
    "min_p": _real(0, 1),
    "repetition_penalty": _real(0.01, 100),
}


@dataclass(frozen=True)
class Fields:
    """The fields of POST /v1/completions, with OpenAI's defaults, and three more of vLLM and llama.cpp; null is unsaid.

    temperature 0 is greedy choice, and top_p 0 leaves the likeliest token alone. `user` is a label for the caller's own
    use. A seed that is negative counts from 2**64 down; without one a request gets its own.
    """

    seed: int
    model: str | None = None
    prompt: Any = ""
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    best_of: int | None = None
    stop: Any = None
    logprobs: int | None = None
    echo: bool = False
    logit_bias: Mapping[str, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None
    user: str | None = None
    stream: bool = False
    stream_options: Mapping[str, bool] | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Fields:
        """The fields of an object, checked one by one and together; RequestError for what cannot be done."""
        for name, value in given.items():
            if name not in CHECKS:
                raise RequestError(
                    400, f"{shown(name)}: is no field of this request{nearest(name, CHECKS)}", shown(name)
                )
            if value is not None and not CHECKS[name].fits(value):
                raise wrong(name, CHECKS[name].words, value)
        said = {name: value for name, value in given.items() if value is not None}
        seed = said.pop("seed", None)
        seed = secrets.randbits(53) if seed is None else seed % 2**64  # the first of which JavaScript reads whole
        asked = cls(seed, **said)
        asked._check_together()
        return asked

    def _check_together(self) -> None:
        if self.suffix:
            raise refused("suffix", "GPT-2 only goes on from a prompt, and cannot fill in; leave it out")
        if self.best_of is not None and self.best_of < self.n:
            raise refused("best_of", f"expected at least n, which is {self.n}, found {self.best_of}")
        if self.stream and self.candidates > self.n:
            raise refused("best_of", "the best are not known before the end; leave out stream or best_of")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "is for streams; leave it out, or set stream")
        if (self.stream_options or {}).get("include_obfuscation"):
            raise refused("stream_options", "include_obfuscation is not here; leave it out")
        if sum(len(stop.encode()) for stop in self.stops) > LONGEST:
            raise refused("stop", f"expected {LONGEST} bytes in all at most; give shorter texts")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, if any."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def candidates(self) -> int:
        """Of how many completions of a prompt the best are chosen."""
        return self.best_of or self.n

    @property
    def prompts(self) -> Sequence[Any]:
        """Each prompt, a text or a list of ids."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


# --- JSON ------------------------------------------------------------------------------------------------------------


def read(body: bytes) -> Mapping[str, Any]:
    """The object that is the body of a request; RequestError for what is not plain JSON in UTF-8."""
    try:
        found = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_distinct)
        json.dumps(found, ensure_ascii=False).encode()  # which no half of a surrogate pair survives
    except UnicodeEncodeError:
        raise RequestError(400, "the body holds half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body has to be UTF-8; it is not at byte {error.start}") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the body has to be JSON: {shortened(str(error))}") from None
    if not isinstance(found, dict):
        raise RequestError(400, f"the body has to be a JSON object, found {type(found).__name__}")
    return found


def check_query(names: Iterable[str]) -> None:
    """RequestError where the address has a field of the body, which nobody would read; OpenAI's clients add others."""
    for name in names:
        if name in CHECKS:
            raise refused(name, "belongs into the body, not into the address")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of whose names none is there twice: of two values one would be ignored."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(twice)!r} is there twice")
    return found


def event(value: Mapping[str, Any]) -> str:
    """An object as one of a stream's server-sent events."""
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What every part of an answer says."""

    id: str
    model: str
    fingerprint: str
    seed: int
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, choices: Iterable[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """An object of OpenAI's kind `text_completion`; the seed is what asks for the same text again."""
        own = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**own, "choices": list(choices), "system_fingerprint": self.fingerprint, "seed": self.seed, **more}


def choice(
    index: int, text: str, logprobs: Mapping[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """A completion, or a piece of one, whose finish_reason is null until the last."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def logprobs(tokens: Iterable[Token], start: int) -> dict[str, Any]:
    """The tokens of a text that begins at `start`, their log-probabilities, and the likeliest in the place of each."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        found["tokens"].append(token.text)
        found["text_offset"].append(start + token.offset)
        own = None if token.log_prob is None else max(token.log_prob, NEVER)
        top = {text: max(log_prob, NEVER) for _, text, log_prob in token.top}
        found["token_logprobs"].append(own)
        found["top_logprobs"].append(None if own is None else {**top, token.text: own})
    return found


def usage(prompt: int, new: int) -> dict[str, int]:
    """The numbers of tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def model_card(name: str, created: int, longest: int) -> dict[str, Any]:
    """An object of OpenAI's kind `model`, and how many tokens it reads, as vLLM says it."""
    return {"id": name, "object": "model", "created": created, "owned_by": MODEL_OWNER, "max_model_len": longest}
