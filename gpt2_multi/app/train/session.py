"""A run from the command line to the model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gpt2_multi.app import backends
from gpt2_multi.app.train.beginning.beginning import Beginning, begin, go_on
from gpt2_multi.app.train.beginning.choices import Asked, check_parts, every
from gpt2_multi.app.train.data.windows import Windows
from gpt2_multi.app.train.engines.engine import Team, build, join
from gpt2_multi.app.train.folder import Folder
from gpt2_multi.app.train.loop import Held, Loop, Stop
from gpt2_multi.app.train.report.card import card
from gpt2_multi.app.train.report.curve import draw
from gpt2_multi.app.train.report.events import Events
from gpt2_multi.app.train.report.metrics import Metrics
from gpt2_multi.app.train.report.progress import Progress, operations, peak
from gpt2_multi.app.train.report.report import Report
from gpt2_multi.app.train.report.words import words
from gpt2_multi.errors import CheckpointError, GPT2Error, InputError
from gpt2_multi.files.json_files import write_whole
from gpt2_multi.model.checkpoint import read_config

MEASURED = 1 << 18  # held-out tokens that an evaluation reads at most
SIZE = {"cpu": 1024}  # of the product that shows what a device can do; of others OTHERS
OTHERS = 8192


class Elsewhere(SystemExit):
    """Another process failed, and says why."""


def run(asked: Asked, path: Path, resume: bool) -> int:
    """Train, or go on, in a folder; returns the exit code."""
    folder = Folder(path)
    row = backends.resolve(asked.backend or (folder.backend() if resume else None))
    name = next(name for name, known in backends.BACKENDS.items() if known is row)
    team = join(name, asked.device or "")
    try:
        return Session(asked, folder, team).run(resume)
    finally:
        folder.release()
        team.close()


class Session:
    """What a process does of a run."""

    def __init__(self, asked: Asked, folder: Folder, team: Team) -> None:
        self.asked, self.folder, self.team, self.is_first = asked, folder, team, team.process == 0
        self.saved = 0  # the step of the last whole save
        self.trains = False

    def run(self, resume: bool) -> int:
        """Begin or go on, train, and say what comes next."""
        self.together(lambda: self._begin(resume))
        self.begun = Beginning.read(self.folder)
        self.plan, self.step = self.begun.plan, self.folder.steps()[-1] if resume else 0
        with self.failing(), ExitStack() as stack:
            check_parts(self.plan, self.team.share(self.plan.mesh)[1])
            stop, progress = Stop(), Progress(self.plan, self.step, self.is_first)
            stop.say = progress.say
            loop = self._loop(stack, resume, progress)
            stack.enter_context(progress)
            stack.enter_context(stop)
            self.trains = True
            self.step = loop.run(self.step, stop)
        return self._end(stop.signal)

    def together(self, work: Callable[[], Any]) -> None:
        """Let the first process do something while the others wait; where it fails, they end without a word."""
        failed = None
        try:
            if self.is_first:
                work()
        except (GPT2Error, OSError) as error:
            failed = error
        self._end_if(failed)

    def _end_if(self, failed: Exception | None) -> None:
        if self.team.agreed(failed is not None):
            raise failed or Elsewhere(1)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Make one sentence of what goes wrong while it trains, which says what is saved; of the first process."""
        try:
            yield
        except Exception as error:
            if (sentence := sentence_of(error, self.folder.path)) is None:
                raise
            raise InputError(sentence + self._kept(error)) if self.is_first else Elsewhere(1) from error

    def _kept(self, error: Exception) -> str:
        """What is saved when an error ends the training; nothing of it where the run could not go on."""
        if not self.trains:
            return ""
        if not self.saved:
            return "; nothing was saved yet"
        on = ", and --resume goes on from it" if is_elsewhere(error) else ""
        return f"; the save of step {self.saved:,} is whole{on}"

    def _begin(self, resume: bool) -> None:
        self.folder.claim(resume)
        (go_on if resume else begin)(self.asked, self.folder)

    def _loop(self, stack: ExitStack, resume: bool, progress: Progress) -> Loop:
        """Everything that trains, where it left off."""
        plan, asked = self.plan, self.begun.asked
        learned, held = self.begun.tokens(self.folder)
        self.config = read_config(self.begun.start, **plan.settings)
        self.engine = build(plan, self.begun.start, self.team)
        if resume:
            self._restore()
        self.metrics = stack.enter_context(Metrics(self.folder.metrics, self.step)) if self.is_first else None
        events = None
        if asked.log and self.is_first:
            events = stack.enter_context(Events(self.folder.events, self.step))
        self.report = Report(plan, progress, self.metrics, events, self.engine.device != "cpu", self._used())
        rows = plan.batch_size // plan.accumulate
        return Loop(
            plan, self.team, self.engine, Windows(learned, plan.length, plan.batch_size, plan.seed),
            None if held is None else Held(held[:MEASURED], plan.length, rows), self.report, self.save,
            every(asked.eval_every, plan.steps), every(asked.save_every, plan.steps),
        )  # fmt: skip

    def _restore(self) -> None:
        """Be what was saved last."""
        state = self.folder.state(self.step)
        try:
            self.folder.check(self.step)
            self.engine.load_state(state)
        except CheckpointError as error:
            ways = "start another run" if len(self.folder.steps()) == 1 else f"delete {state} to go on from that before"
            raise CheckpointError(f"{error}, or {ways}") from None
        self.saved = self.step

    def _used(self) -> Callable[[float], float | None]:
        """From tokens in a second to the part of what the devices can do."""
        if not self.is_first:
            return lambda speed: None
        size = SIZE.get(self.engine.device, OTHERS)
        most = peak(self.engine.device, self.plan.dtype, self.engine.product(size), size) * self.engine.devices
        each = operations(self.config, self.plan)
        return lambda speed: speed * each / most

    def save(self, step: int) -> None:
        """Write the state, then the model and what is said of it; the last saves stay whole whatever happens."""
        failed = None
        try:
            if self.is_first:
                self.engine.save_model(self.folder.path)  # before the state, which goes on from its configuration
                self.folder.save(step, self.engine.save_state)
                self.saved = step
                self._describe()
                self.folder.prune()
            else:
                self.engine.save_model(None)
                self.engine.save_state(None)
        except (GPT2Error, OSError) as error:
            failed = error
        self._end_if(failed)

    def _describe(self) -> None:
        """Write the curve and the model card."""
        metrics = self.metrics
        if metrics is None:
            return
        has_curve = bool(metrics.points)
        try:
            if has_curve:
                write_whole(self.folder.curve, draw(metrics.points))
        except ModuleNotFoundError:
            has_curve = False
            self.report.progress.once("curve.svg: not drawn, for Matplotlib is not installed: pip install matplotlib")
        about = {**self.begun.facts, "device": self.engine.device, "has_curve": has_curve}
        write_whole(self.folder.card, card(self.folder.path.resolve().name, about, self.plan, self.config, metrics))

    def _end(self, signal: int) -> int:
        """Say what was reached, and what comes next; the exit code is that of the signal that stopped it."""
        if self.is_first and self.metrics is not None:
            print(words(self.folder.path, self.begun.facts, self.plan, self.metrics))
        return 128 + signal if signal else 0


def is_elsewhere(error: Exception) -> bool:
    """Whether what failed is not the plan, with which a run that goes on would fail again."""
    return isinstance(error, (OSError, CheckpointError))


def sentence_of(error: Exception, path: Path) -> str | None:
    """What to say of an error that is nobody's fault in the program; None of others."""
    if isinstance(error, GPT2Error):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or path}: {error.strerror or error}"
    if backends.lacks_memory(error):
        return (
            "the memory does not suffice; begin another run that computes a batch in parts (--accumulate), or with a "
            "shorter --length, a smaller --batch-size or a smaller model"
        )
    return None
