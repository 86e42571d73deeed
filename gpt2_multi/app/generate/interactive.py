"""Writing by turns at a prompt: what is typed is a part of the text, and the model goes on with it."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from gpt2_multi.app.generate.writer import NEW_TOKENS, Writer
from gpt2_multi.errors import GPT2Error, InputError, nearest
from gpt2_multi.files.json_files import write_whole
from gpt2_multi.generation import texts

OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")  # which have no meaning for a greedy choice
HELP = """\
What you type becomes a part of the text, and the model goes on with it; an empty line lets it go on alone.
A backslash at the end of a line takes another line. Begin with // for a text that begins with /.
Ctrl-C stops the text that is being made, Ctrl-D ends.

/retry          make the last continuation anew
/undo           take back the last turn, /retry or /new, and so on to the beginning
/text           show the whole text
/new            begin a new text
/save FILE      write the text to a file
/greedy         always take the likeliest token; any option of sampling samples again
/quit           end
/NAME [VALUE]   show or set an option: {}
"""


class Turn(NamedTuple):
    """What was typed, and what the model made of it."""

    typed: str
    written: str


class Text(NamedTuple):
    """What a text began with, and its turns."""

    start: str
    turns: tuple[Turn, ...] = ()

    def __str__(self) -> str:
        return self.start + "".join(turn.typed + turn.written for turn in self.turns)


@dataclass
class Session:
    """A text that grows by turns. The noise of a turn is of its own seed: the first one's, and one more each time.

    texts: what it was before each change, and last what it is.
    """

    writer: Writer
    texts: list[Text]
    made: int = 0  # how many continuations, those that were taken back too

    @property
    def text(self) -> Text:
        """What it is now."""
        return self.texts[-1]

    def go_on(self, typed: str) -> None:
        """Add what was typed, and let the model write."""
        self._write(self.text, typed)

    def _write(self, before: Text, typed: str) -> None:
        """Let the model go on with a text; what it has written is kept when it is stopped."""
        prompt, written = f"{before}{typed}", ""
        try:
            with _noted() as stopped:
                for piece in self._ready(prompt).stream(prompt, self._count()):
                    written += piece
                    _print(piece)
                    if stopped():
                        break
        except KeyboardInterrupt:
            pass
        finally:
            self.made += 1
        self.texts.append(before._replace(turns=(*before.turns, Turn(typed, written))))
        _print("\n")

    def _count(self) -> int:
        return NEW_TOKENS if self.writer.new_tokens is None else self.writer.new_tokens

    def _ready(self, prompt: str) -> Writer:
        """The writer of a turn: of its seed, and reading the end of a text that has outgrown the model."""
        writer, most = self.writer, self.writer.model.config.n_positions
        length = len(texts.encode(prompt, writer.tokenizer, writer.model.config))
        options: dict[str, int | bool] = {"seed": (writer.seed + self.made) % 2**64} if writer.config.do_sample else {}
        options |= {"sliding_window": True} if length + self._count() > most else {}
        return replace(writer, config=writer.config.with_options(options))

    def obey(self, line: str) -> None:
        """Carry out a command: its name without the slash, and what stands behind it."""
        said, value = f"{line.strip()} ".split(" ", 1)
        name, value = said.replace("-", "_"), value.strip()
        commands: dict[str, Callable[[str], None]] = {
            "retry": self._retry, "undo": self._undo, "text": lambda _: _print(f"{self.text}\n"), "new": self._new,
            "save": self._save, "greedy": self._greedy, "help": _help,
        }  # fmt: skip
        if name in commands:
            if value and name != "save":
                raise InputError(f"/{said}: takes nothing behind it, found {value!r}; leave that out")
            commands[name](value)
        elif name in OPTIONS:
            self._set(name, value)
        else:
            near = nearest(name, [*commands, *OPTIONS, "quit"], 0.5)
            raise InputError(f"/{said}: no such command{near or '; /help shows all'}")

    def _retry(self, _: str) -> None:
        if not self.text.turns:
            raise InputError("/retry: there is no turn yet; type the beginning of a text")
        *before, turn = self.text.turns
        self._write(self.text._replace(turns=tuple(before)), turn.typed)

    def _undo(self, _: str) -> None:
        if len(self.texts) == 1:
            raise InputError("/undo: nothing has changed yet; type the beginning of a text")
        self.texts.pop()
        _print(f"{self.text}\n")

    def _new(self, _: str) -> None:
        if self.text != Text(""):
            self.texts.append(Text(""))

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save: expected the name of a file; give one")
        try:
            write_whole(Path(name), str(self.text))
        except (OSError, UnicodeEncodeError) as error:
            raise InputError(f"/save: {name} cannot be written ({getattr(error, 'strerror', error)})") from None
        _say(f"{name}: {len(str(self.text))} characters")

    def _greedy(self, _: str) -> None:
        self._give({"do_sample": False})

    def _set(self, name: str, value: str) -> None:
        if value:
            self._give({name: _number(value)} | ({"do_sample": True} if name in SAMPLING else {}))
        shown = self._count() if name == "max_new_tokens" else getattr(self.writer.config, name)
        _say(f"{name.replace('_', '-')} {shown}")

    def _give(self, options: dict[str, float | bool]) -> None:
        config = self.writer.config.with_options(options)
        count = self.writer.new_tokens if config.max_new_tokens is None else config.max_new_tokens
        self.writer = replace(self.writer, config=config, new_tokens=count)


def interact(writer: Writer, start: str) -> None:
    """Take turns until the end of the input, or /quit. What the model writes goes to standard output."""
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` has a history then, which is not where there is no such library
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that one line is refused, and those after it are read
    session = Session(writer, [Text(start)])
    if sys.stdin.isatty():
        _say("What you type is a part of the text, and the model goes on with it. /help shows what else there is.")
    _print(start)
    while (line := _line()) is not None and line.rstrip() != "/quit":
        try:
            if line.startswith("/") and not line.startswith("//"):
                session.obey(line[1:])
            else:
                session.go_on(line.removeprefix("/") if line.startswith("//") else line)
        except GPT2Error as error:
            _say(str(error))


@contextmanager
def _noted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which interrupts nothing the first time: what is shown is what is kept."""
    pressed: list[int] = []

    def note(number: int, _: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _line() -> str | None:
    """What is typed, with lines that are joined by a backslash at their end; None at the end of the input."""
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            lines.append(_asked("> " if not lines else "| "))
        except KeyboardInterrupt:  # of a line, not of the program
            _print("\n")
            lines = []
        except EOFError:
            if sys.stdin.isatty():
                _say("")
            if not lines:
                return None
            break  # the end of the input is that of its last line
        except UnicodeEncodeError:
            _say("expected UTF-8, found bytes that are none; this line is left out")
            lines = []
    return "\n".join(line.removesuffix("\\") for line in lines)


def _asked(sign: str) -> str:
    """A line, for which a sign asks whoever is there; UnicodeEncodeError where it is no text.

    Where standard output is no terminal, it is given the text alone.
    """
    if sys.stdin.isatty() and not sys.stdout.isatty():
        sys.stderr.write(sign)
        sys.stderr.flush()
    line = input(sign if sys.stdin.isatty() and sys.stdout.isatty() else "")
    line.encode()
    return line


def _help(_: str) -> None:
    _say(HELP.format(", ".join(name.replace("_", "-") for name in OPTIONS)).rstrip())


def _number(value: str) -> float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    raise InputError(f"expected a number, found {value!r}; /help shows the commands")


def _print(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(sentence: str) -> None:
    """To whoever is there; no part of the text."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
