"""A request for completions: its rows at the engine, and the answer that is made of what they hear."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from gpt2_multi.app.serve import protocol
from gpt2_multi.app.serve.engine import Done, Engine, Event, Full, Job, Piece, Ticket, Token
from gpt2_multi.app.serve.protocol import RETRY, Fields, Head, RequestError
from gpt2_multi.errors import GPT2Error
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.stopping.spelling import text_of
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

LEAST_TEMPERATURE = 1e-9  # below which a sample is the likeliest token
FAILURES = {  # why a row ended before its end, and what is answered then
    "deadline": (504, "the time for a request was over; ask for fewer tokens, or start the server with --timeout"),
    "cancelled": (503, "the server ends; ask again later"),
    "error": (500, "the model failed; see the server's log"),
}


@dataclass(frozen=True)
class Served:
    """A model that answers: its engine, and what a request is checked against.

    timeout: the seconds that a request may take.
    """

    name: str
    engine: Engine
    tokenizer: GPT2Tokenizer
    config: GPT2Config
    generation: GenerationConfig
    fingerprint: str
    capacity: int  # completions that may wait at once
    timeout: float

    def jobs(self, asked: Fields) -> list[Job]:
        """What a request asks of the engine: candidates of the first prompt, then of the next, and so on."""
        self.check_name(asked.model)
        rows = len(asked.prompts) * asked.candidates
        if rows > self.capacity:
            raise protocol.refused("prompt", f"{rows} completions are more than the {self.capacity} that may wait")
        for token in asked.logit_bias or {}:
            if int(token) >= self.config.vocab_size:
                raise protocol.wrong("logit_bias", f"ids below {self.config.vocab_size}", token)
        prompts = [self._ids(prompt, asked.max_tokens) for prompt in asked.prompts]
        each = [ids for ids in prompts for _ in range(asked.candidates)]
        config, deadline = self._generation(asked), time.monotonic() + self.timeout
        return [self._job(asked, config, ids, row, deadline) for row, ids in enumerate(each)]

    def check_name(self, name: str | None) -> None:
        """RequestError where a request asks for another model."""
        if name not in (None, self.name):
            message = f"model: {protocol.shown(name)} is not served here, but {self.name}"
            raise RequestError(404, message, "model", "model_not_found")

    def _ids(self, prompt: Any, new: int) -> tuple[int, ...]:
        """The ids of a prompt, which have to leave room for new ones."""
        most = self.config.n_positions
        try:
            ids = texts.encode(prompt, self.tokenizer, self.config) if isinstance(prompt, str) else prompt
            inputs.check_vocabulary("prompt", min(ids), max(ids), self.config.vocab_size)
        except GPT2Error as error:
            raise RequestError(400, str(error), "prompt") from None
        if len(ids) + new > most:
            raise RequestError(
                400,
                f"This model's maximum context length is {most} tokens, however you requested {len(ids) + new} tokens "
                f"({len(ids)} in the prompt; {new} for the completion): shorten the prompt, or lower max_tokens",
                "prompt",
                "context_length_exceeded",
            )
        return tuple(ids)

    def _generation(self, asked: Fields) -> GenerationConfig:
        """How a request generates: of the model's own configuration the control tokens alone."""
        samples = asked.temperature >= LEAST_TEMPERATURE
        return GenerationConfig(
            max_new_tokens=asked.max_tokens,
            do_sample=samples,
            temperature=asked.temperature if samples else 1.0,
            top_k=asked.top_k,
            top_p=asked.top_p or LEAST_TEMPERATURE,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            seed=asked.seed,
            bos_token_id=self.generation.bos_token_id,
            eos_token_id=self.generation.eos_token_id,
            pad_token_id=self.generation.pad_token_id,
        )

    def _job(self, asked: Fields, config: GenerationConfig, ids: tuple[int, ...], row: int, deadline: float) -> Job:
        return Job(
            ids=ids,
            config=config,
            stop=asked.stops,
            row=row,
            bias={int(token): float(bias) for token, bias in (asked.logit_bias or {}).items()},
            presence=asked.presence_penalty,
            frequency=asked.frequency_penalty,
            logprobs=0 if asked.logprobs is None and asked.candidates > asked.n else asked.logprobs,
            echo=asked.echo,
            deadline=deadline,
            listen=lambda event: None,
        )


@dataclass
class Row:
    """What one row has said so far."""

    pieces: list[Piece] = field(default_factory=list)
    done: Done | None = None

    @property
    def text(self) -> str:
        """Its text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[Token]:
        """Its tokens."""
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens, by which the best is chosen."""
        found = [token.log_prob for token in self.tokens if token.log_prob is not None]
        return math.fsum(found) / len(found) if found else -math.inf


class Request:
    """The rows of a request, which go to the engine together and are called off together.

    first: after how many seconds something was heard; nan before.
    """

    def __init__(self, served: Served, asked: Fields, jobs: Sequence[Job], id: str) -> None:
        self.served, self.asked, self.jobs = served, asked, jobs
        self.head = Head(id, served.name, served.fingerprint, asked.seed)
        self.rows = [Row() for _ in jobs]
        self.start, self.first = time.monotonic(), math.nan
        self._heard: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []

    def submit(self) -> None:
        """Give all rows to the engine, or none: RequestError where there is no room."""
        loop = asyncio.get_running_loop()
        try:
            for index, job in enumerate(self.jobs):
                job = replace(job, listen=partial(self._listen, loop, index))
                self._tickets.append(self.served.engine.submit(job))
        except Full:
            self.cancel()
            raise RequestError(
                429, "too many requests wait; ask again later", None, "rate_limit_exceeded", RETRY
            ) from None
        except GPT2Error as error:
            self.cancel()
            raise RequestError(400, str(error)) from None

    def _listen(self, loop: asyncio.AbstractEventLoop, index: int, event: Event) -> None:
        """Hear the engine, in a thread of its own; who wants the whole is not woken for a piece."""
        if isinstance(event, Piece):
            self.first = time.monotonic() - self.start if math.isnan(self.first) else self.first
            if not self.asked.stream:
                return self.rows[index].pieces.append(event)
        with suppress(RuntimeError):  # the loop is closed where the server has ended
            loop.call_soon_threadsafe(self._heard.put_nowait, (index, event))

    def cancel(self) -> None:
        """Let the engine forget the rows that are not done."""
        for ticket, row in zip(self._tickets, self.rows, strict=False):
            if row.done is None:
                ticket.cancel()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompts have."""
        return sum(len(job.ids) for job in self.jobs[:: self.asked.candidates])

    @property
    def new_tokens(self) -> int:
        """How many tokens were made, also of those completions that are not the best."""
        return sum(row.done.new_tokens for row in self.rows if row.done)

    @property
    def usage(self) -> dict[str, int]:
        """The numbers of tokens, as an answer has them."""
        return protocol.usage(self.prompt_tokens, self.new_tokens)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What the rows say, as it comes, until all are done; RequestError where one ends too early."""
        left = len(self.rows)
        while left:
            index, event = await self._heard.get()
            if isinstance(event, Done):
                left -= 1
                self.rows[index].done = event
                if event.reason in FAILURES:
                    raise RequestError(*FAILURES[event.reason], headers={"x-should-retry": "false"})
            yield index, event

    async def whole(self) -> dict[str, Any]:
        """The answer, when all rows are done."""
        async for _ in self.events():
            pass
        return self.head.answer(self._choices(), usage=self.usage)

    def _choices(self) -> Iterator[dict[str, Any]]:
        for prompt in range(len(self.asked.prompts)):
            start = prompt * self.asked.candidates
            rows = self.rows[start : start + self.asked.candidates]
            best = sorted(rows, key=lambda row: -row.score)[: self.asked.n] if len(rows) > self.asked.n else rows
            for place, row in enumerate(best, prompt * self.asked.n):
                reason = row.done.reason if row.done else None
                logprobs = self._logprobs(prompt * self.asked.candidates, row.tokens)
                yield protocol.choice(place, row.text, logprobs, reason)

    async def lines(self) -> AsyncIterator[str]:
        """The answer as server-sent events; one that fails ends with an event that says why."""
        more: dict[str, Any] = {"usage": None} if self.asked.includes_usage else {}
        try:
            async for index, event in self.events():
                if isinstance(event, Piece):
                    choice = protocol.choice(index, event.text, self._logprobs(index, event.tokens))
                else:
                    choice = protocol.choice(index, "", None, event.reason)
                yield protocol.event(self.head.answer([choice], **more))
        except RequestError as refusal:
            yield protocol.event(refusal.body)
            return
        if more:
            yield protocol.event(self.head.answer([], usage=self.usage))
        yield protocol.DONE

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return None if self.asked.logprobs is None else protocol.logprobs(tokens, self._starts[index])

    @cached_property
    def _starts(self) -> list[int]:
        """Where each row's text begins, in characters of its prompt with it, as OpenAI counts."""
        tokenizer = self.served.tokenizer
        return [0 if self.asked.echo else len(text_of(tokenizer, [], job.ids)) for job in self.jobs]
