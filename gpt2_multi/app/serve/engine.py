"""The engine: one thread in which a model goes on with many texts at once, that join and leave it between tokens.

What a text is does not depend on who else is there. Whoever waits is taken in the order of coming, and hears of each
piece of his text, in whole characters, until it is done. R rows.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import Full as Full
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpt2_multi.app import backends
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import PromptScore, Row, Step
from gpt2_multi.generation.rules import noise_streams
from gpt2_multi.generation.stopping.spelling import Speller, token_bytes

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

LOG = logging.getLogger(__name__)
PAUSE = 1.0  # seconds without a job after which nobody seems to ask for one text after the other
SCORED = 128  # tokens of echoed prompts, or one prompt, that are scored between two steps: others wait no longer


class Token(NamedTuple):
    """A token of a text, and how likely it was, as were the likeliest: (id, text, log-probability) of each.

    text: where it is no whole characters, its bytes, as OpenAI spells them. log_prob: None where nothing is before it.
    offset: in characters, where it begins in the text that its job has.
    """

    id: int
    text: str
    log_prob: float | None
    top: list[tuple[int, str, float]]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What a text has more, and its tokens, where their log-probabilities are asked for."""

    text: str
    tokens: list[Token]


@dataclass(frozen=True)
class Done:
    """The end of a text: "stop", "length", "cancelled", "deadline" or "error"."""

    reason: str
    prompt_tokens: int
    new_tokens: int


Event = Piece | Done


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt to go on with, once.

    row: added to the seed. stop: texts that end it, of which no part is given. bias, presence, frequency: see
    `generation.options.Row`. logprobs: of how many of the likeliest tokens log-probabilities are asked for, beside the
    token's own; None is none at all. echo: the prompt comes first. deadline: when it is over, on the monotonic clock.
    listen: is given each event, in the engine's thread, for which it must not wait.
    """

    ids: tuple[int, ...]
    config: GenerationConfig
    listen: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    row: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    logprobs: int | None = None
    echo: bool = False
    deadline: float | None = None


class Ticket:
    """A job that waits, runs or is done."""

    def __init__(self, job: Job) -> None:
        self.job, self.row, self.is_cancelled = job, row_of(job), False

    def cancel(self) -> None:
        """Have it end as soon as may be; of one that is done nothing changes."""
        self.is_cancelled = True

    def early_end(self, now: float) -> str | None:
        """Why it is over although its text is not, if it is."""
        if self.is_cancelled:
            return "cancelled"
        return "deadline" if self.job.deadline is not None and now > self.job.deadline else None


class Engine:
    """Goes on with up to `slots` texts at once, while up to `waiting` jobs wait."""

    def __init__(self, model: Any, tokenizer: GPT2Tokenizer, slots: int = 32, waiting: int = 256) -> None:
        self.model, self.tokenizer, self.places, self.most = model, tokenizer, slots, waiting
        self._slots: Any = None
        self._changed = Condition()  # guards what waits
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Text] = {}  # slot -> text
        self._is_ending = False
        self._tokens = 0
        self._thread = Thread(target=self._run, name="gpt2-multi engine", daemon=True)

    def start(self) -> Engine:
        """Begin with the jobs."""
        self._thread.start()
        return self

    def submit(self, job: Job) -> Ticket:
        """Take a job in; Full where there is no room for it, InputError where it cannot be done."""
        ticket = Ticket(job)
        if new_tokens(job, self.model.config.n_positions):
            ticket.row.check(np.asarray(job.ids), self.model.config, 1)
        with self._changed:
            if self._is_ending or len(self._waiting) >= self.most:
                raise Full(f"{len(self._waiting)} jobs wait, and no more may")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stop(self, drain: bool = True) -> None:
        """Take no more jobs, and end when all are done; without `drain` they are cancelled."""
        with self._changed:
            self._is_ending = True
            for ticket in () if drain else (*self._waiting, *(text.ticket for text in self._running.copy().values())):
                ticket.cancel()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs wait and run now, and how many tokens were made in all."""
        return {"waiting": len(self._waiting), "running": len(self._running), "tokens": self._tokens}

    def _run(self) -> None:
        with backends.of(self.model).threads(self.model):
            while self._has_work():
                try:
                    self._turn()
                except Exception:  # whatever it is, those who come later shall not suffer
                    LOG.exception("a step of the engine failed, and with it %d texts", len(self._running))
                    self._fail()

    def _has_work(self) -> bool:
        """Wait for work: whether there is any before the end."""
        with self._changed:
            self._changed.wait_for(self._is_called, PAUSE if self._tokens else 0)
        while not self._is_called() and self._warm():
            pass
        with self._changed:
            self._changed.wait_for(self._is_called)
            return bool(self._waiting or self._running)

    def _is_called(self) -> bool:
        return bool(self._waiting or self._running or self._is_ending)

    def _warm(self) -> bool:
        """Have some of what is to come compiled, where the framework compiles: whether there may be more of it."""
        try:
            return bool(getattr(self._open(), "warm", bool)())
        except Exception:
            LOG.exception("nothing could be compiled before the first job")
            self._slots = None
            return False

    def _open(self) -> Any:
        """The slots, which are made in the thread that uses them."""
        if self._slots is None:
            self._slots = backends.of(self.model).slots(self.model, self.places)
        return self._slots

    def _turn(self) -> None:
        """Take in who may come, and give each text one token more."""
        self._open()
        self._end_early()
        budget = SCORED
        while self._slots.free and budget > 0 and (text := self._next()):
            self._admit(text)
            budget -= text.scored
        if self._running:
            self._tell(self._slots.step())

    def _end_early(self) -> None:
        """Let go who is called off, or whose time is over."""
        now = time.monotonic()
        for slot, text in list(self._running.items()):
            if reason := text.ticket.early_end(now):
                self._leave(slot, reason)
        with self._changed:
            over = {ticket: reason for ticket in self._waiting if (reason := ticket.early_end(now))}
            for ticket in over:
                self._waiting.remove(ticket)
        for ticket, reason in over.items():
            self._text(ticket).end(reason)

    def _next(self) -> Text | None:
        """Who has waited longest."""
        with self._changed:
            return self._text(self._waiting.popleft()) if self._waiting else None

    def _text(self, ticket: Ticket) -> Text:
        return Text(ticket, self.tokenizer, self.model.config.n_positions)

    def _admit(self, text: Text) -> None:
        """Have a job run; what is wrong with it is its own end alone."""
        reason = None if text.room else "length"
        try:
            text.begin(self._slots)
            if reason is None:
                self._running[self._slots.join(text.job.ids, text.ticket.row)] = text
        except Exception:
            LOG.exception("a job could not begin")
            reason = "error"
        if reason is not None:
            text.end(reason)

    def _tell(self, step: Step) -> None:
        """Give each text its token."""
        self._tokens += len(step.slots)
        for row, (slot, token) in enumerate(zip(step.slots, step.tokens.tolist(), strict=True)):
            text = self._running[slot]
            try:
                reason = text.put(token, step, row)
            except Exception:  # of who listens, or of a tokenizer
                LOG.exception("a text could not be told")
                reason = "error"
            if reason is not None:
                self._leave(slot, reason)

    def _leave(self, slot: int, reason: str) -> None:
        self._slots.leave(slot)
        self._running.pop(slot).end(reason)

    def _fail(self) -> None:
        """End all that run, of which nobody knows in what state they are, or who would be next, and begin anew."""
        failed, self._running, self._slots = list(self._running.values()), {}, None
        for text in failed or [text for text in [self._next()] if text]:
            text.end("error")


class Text:
    """The text of a job while it is made: what is given of it, and what waits.

    A text waits that stop strings may begin with, and the part of a character.
    """

    def __init__(self, ticket: Ticket, tokenizer: GPT2Tokenizer, n_positions: int) -> None:
        self.ticket, self.job, self.tokenizer = ticket, ticket.job, tokenizer
        self.room = new_tokens(ticket.job, n_positions)  # for how many more tokens
        self.stops = (*ticket.job.stop, *ticket.job.config.stops)
        self.ends = frozenset(ticket.job.config.eos_token_ids)
        self.speller = Speller(tokenizer)
        self.made = self.given = 0  # tokens, characters
        self.held, self.is_cut = "", False
        self.tokens: list[Token] = []  # which wait with it

    @property
    def scored(self) -> int:
        """How many tokens of its prompt are scored before it begins."""
        return len(self.job.ids) if self.job.echo and self.job.logprobs is not None else 0

    def begin(self, slots: Any) -> None:
        """Give the prompt, where that is asked for."""
        ids, top = self.job.ids, self.job.logprobs
        if not self.job.echo:
            return self.speller.follow(ids)
        score: PromptScore | None = None if top is None else slots.score(ids, top)
        for place, token in enumerate(ids):
            if score is not None:
                self._note(token, *(part[place - 1] for part in score) if place else (None, (), ()))
            self.held += self.speller.put([token])
        self._give(len(self.held))

    def put(self, token: int, step: Step, row: int) -> str | None:
        """Go on by a token, of a row of a step: why the text is over, if it is."""
        self.made += 1
        if token in self.ends:
            return "stop"
        if self.job.logprobs is not None:
            self._note(token, step.log_probs[row], step.top_ids[row], step.top_log_probs[row])
        self.held += self.speller.put([token])
        if self._give_safe():
            return "stop"
        return "length" if self.made >= self.room else None

    def end(self, reason: str) -> None:
        """Give what waits of a text that is whole, and say that this is all."""
        try:
            if reason in ("stop", "length") and not self.is_cut:
                self.held += self.speller.end()
                if not self._give_safe():
                    self._give(len(self.held), is_last=True)
            self.job.listen(Done(reason, len(self.job.ids), self.made))
        except Exception:
            LOG.exception("the end of a text could not be told")

    def _give_safe(self) -> bool:
        """Give what no stop string may begin with: whether one is there, before which the text ends."""
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        self._give(
            min(found) if found else min((begun(self.held, stop) for stop in self.stops), default=len(self.held))
        )
        self.is_cut = bool(found)
        return self.is_cut

    def _give(self, count: int, is_last: bool = False) -> None:
        """Give so many characters of what waits, and the tokens that begin in them."""
        piece, self.held = self.held[:count], self.held[count:]
        self.given += count
        tokens = [token for token in self.tokens if is_last or token.offset < self.given]
        self.tokens = self.tokens[len(tokens) :]
        if piece or tokens:
            self.job.listen(Piece(piece, tokens))

    def _note(self, token: int, log_prob: Any, top: Sequence[int], log_probs: Sequence[float]) -> None:
        """Keep a token until its text is given."""
        likeliest = list(zip(top, log_probs, strict=True))[: self.job.logprobs]
        self.tokens.append(
            Token(
                token,
                spelled(self.tokenizer, token),
                None if log_prob is None else float(log_prob),
                [(int(other), spelled(self.tokenizer, int(other)), float(x)) for other, x in likeliest],
                self.given + len(self.held),
            )
        )


def new_tokens(job: Job, n_positions: int) -> int:
    """How many tokens a job may get at most."""
    prompt = len(job.ids)
    return max(min(job.config.total_length(prompt), n_positions) - prompt, 0)


def row_of(job: Job) -> Row:
    """How a job's tokens are chosen; its stop strings are found in its text."""
    stream = noise_streams(job.config.seed or 0, 1, job.row + 1)[job.row]
    config = replace(job.config, stop_strings=None) if job.config.stops else job.config
    return Row(config, stream, job.bias, job.presence, job.frequency, job.logprobs)


def begun(text: str, stop: str) -> int:
    """Where in a text a stop string may have begun that goes on after it, or else its length."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) if start < 0 else start


def spelled(tokenizer: Any, token: int) -> str:
    """What a token spells: characters, or its bytes as OpenAI writes them."""
    found = token_bytes(tokenizer, token)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
