"""Writing by turns: the text is what was typed and what the model made of it, whatever is taken back or stopped."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2_multi.app.generate.writer import Writer
from tests.app.conftest import good, needs_pt, run
from tests.support.effort import THOROUGH

pytestmark = needs_pt


def told(tiny: Path, *lines: str, args: tuple[str, ...] = ()) -> tuple[str, str]:
    """What is printed, and what is said to whoever is there."""
    given = ("--model", tiny, "--max-new-tokens", "9", "--interactive")
    result = run("generate", *given, *args, stdin="".join(f"{line}\n" for line in lines).encode())
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def written(tiny: Path, prompt: str, seed: int, *how: str) -> str:
    args = ("--model", tiny, "--max-new-tokens", "9", "--seed", str(seed), *how)
    return good("generate", *args, stdin=f"{prompt}\n".encode()).removeprefix(prompt).removesuffix("\n")


def test_turns_are_one_text(tiny: Path) -> None:
    first = written(tiny, "Hello", 5)
    second = written(tiny, f"Hello{first} and", 6)
    third = written(tiny, f"Hello{first} and{second}", 7)
    found, said = told(tiny, "Hello", " and", "", "/text", args=("--seed", "5"))
    text = f"Hello{first} and{second}{third}"
    assert found == f"{first}\n{second}\n{third}\n{text}\n" and said == ""
    assert told(tiny, "", args=("Hello", "--seed", "5"))[0] == f"Hello{first}\n"
    assert told(tiny, "Hello", args=("--greedy",))[0] == written_greedy(tiny) + "\n"


def written_greedy(tiny: Path) -> str:
    args = ("generate", "Hello", "--model", tiny, "--max-new-tokens", "9", "--greedy")
    return good(*args).removeprefix("Hello").removesuffix("\n")


def test_a_turn_is_taken_back_or_made_anew(tiny: Path, tmp_path: Path) -> None:
    first, other = written(tiny, "Hello", 0), written(tiny, "Hello", 1)
    assert first != other
    assert told(tiny, "Hello", "/retry", "/text")[0] == f"{first}\n{other}\nHello{other}\n"
    assert told(tiny, "Hello", "b", "/undo")[0].endswith(f"\nHello{first}\n")
    assert told(tiny, "Hello", "/undo", "/text")[0] == f"{first}\n\n\n"
    assert told(tiny, "Hello", "/new", "/text")[0] == f"{first}\n\n"
    _, said = told(tiny, "Hello", f"/save {tmp_path / 'a b.txt'}", "/quit", "b")
    assert (tmp_path / "a b.txt").read_text() == f"Hello{first}" and said.endswith(f"{len(first) + 5} characters\n")


def test_undo_goes_back_through_all_of_it(tiny: Path) -> None:
    first, other = written(tiny, "Hello", 0), written(tiny, "Hello", 1)
    found, said = told(tiny, "Hello", "/retry", "/new", "/new", "/undo", "/undo", "/undo", "/undo")
    assert found == f"{first}\n{other}\nHello{other}\nHello{first}\n\n"  # a text that is new already is not begun anew
    assert said.startswith("/undo: nothing has changed yet")
    assert told(tiny, "/new", "/undo", args=("Hello",))[0] == "Hello" + "Hello\n"


def test_options_change_on_the_way(tiny: Path) -> None:
    found, said = told(tiny, "/temperature 0.5", "/max-new-tokens 3", "/top-k", "Hello", "/greedy", "/undo", "Hello")
    cool = written(tiny, "Hello", 0, "--temperature", "0.5")
    assert found.startswith(cool[:3]) and said == "temperature 0.5\nmax-new-tokens 3\ntop-k 50\n"
    assert found.endswith(written_greedy(tiny)[:3] + "\n")
    found, said = told(tiny, "/greedy", "/seed 4", "Hello")
    assert found == written(tiny, "Hello", 4) + "\n" and said == "seed 4\n"


def test_lines_are_joined_and_slashes_are_written(tiny: Path) -> None:
    assert told(tiny, "a\\", "b\\", "c", "/text")[0].split("\n", 1)[1].startswith("a\nb\nc")
    assert told(tiny, "//x", "/text")[0].endswith("\n/x" + written(tiny, "/x", 0) + "\n")


def test_the_end_of_the_input_ends_a_line_too(tiny: Path) -> None:
    args = ("--model", tiny, "--max-new-tokens", "9", "--interactive")
    assert good("generate", *args, stdin=b"a\\\nHello\\") == written(tiny, "a\nHello", 0) + "\n"
    assert told(tiny, "/quit ", "b") == ("", "")


def test_a_line_that_is_no_text_is_refused_and_the_next_is_read(tiny: Path) -> None:
    args = ("generate", "--model", tiny, "--max-new-tokens", "9", "--interactive")
    result = run(*args, stdin=b"a\xff\nHello\n")
    assert result.stdout == written(tiny, "Hello", 0) + "\n"
    assert result.stderr.startswith("expected UTF-8, found bytes that are none; this line is left out")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/temp 1", "/temp: no such command; did you mean 'temperature'?"),
        ("/xyz", "/xyz: no such command; /help shows all"),
        ("/retry", "/retry: there is no turn yet; type the beginning of a text"),
        ("/undo", "/undo: nothing has changed yet"),
        ("/temperature 0", "temperature: expected a number from 1e-9"),
        ("/top-k 0.5", "top_k: expected a whole number"),
        ("/top-k many", "expected a number, found 'many'"),
        ("/undo 3", "/undo: takes nothing behind it, found '3'; leave that out"),
        ("/greedy 0.7", "/greedy: takes nothing behind it"),
        ("/save", "/save: expected the name of a file; give one"),
        ("/save /no/such/folder/a", "/save: /no/such/folder/a cannot be written (No such file or directory)"),
        ("/help", "What you type becomes a part of the text"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_program_goes_on(tiny: Path, line: str, sentence: str) -> None:
    found, said = told(tiny, line, "Hello")
    assert said.startswith(sentence) and found == written(tiny, "Hello", 0) + "\n"


def test_a_text_may_outgrow_the_model(tiny: Path) -> None:
    found, said = told(tiny, "x" * 60, "y" * 30, "z", "/text")
    assert said == "" and len(found.rsplit("\n", 2)[1]) > 64 + 27


def test_an_interrupt_stops_the_text_and_not_the_program(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, calls, before = Writer.stream, [], signal.getsignal(signal.SIGINT)

    def stopped(self: Writer, *given: Any) -> Any:
        calls.append(given)
        pieces = stream(self, *given)
        if len(calls) > 1:
            yield from pieces
        else:
            yield next(pieces)
            os.kill(os.getpid(), signal.SIGINT)
            yield next(pieces)
            raise AssertionError("nobody has stopped")

    monkeypatch.setattr(Writer, "stream", stopped)
    found, said = told(tiny, "Hello", "/text", "b")
    first = found.split("\n")[0]
    monkeypatch.undo()
    whole = written(tiny, "Hello", 0)
    assert signal.getsignal(signal.SIGINT) is before
    assert whole.startswith(first) and len(whole) > len(first) > 0 and said == ""
    assert found == f"{first}\nHello{first}\n{written(tiny, f'Hello{first}b', 1)}\n"


if THOROUGH:

    def test_a_real_terminal_has_a_history_and_survives_ctrl_c(tiny: Path) -> None:
        pty = pytest.importorskip("pty")
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "gpt2_multi", "generate", "--interactive", "--model", str(tiny)]
        child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)

        def until(text: bytes) -> bytes:
            seen = b""
            while text not in seen and select.select([ours], [], [], 60)[0]:
                seen += os.read(ours, 1000)
            assert text in seen
            return seen

        until(b"> ")
        os.write(ours, b"half a line")
        until(b"half a line")
        child.send_signal(signal.SIGINT)
        until(b"> ")
        for line in (b"/top-k\n", b"\x1b[A\n"):  # the arrow brings back the line before
            os.write(ours, line)
            until(b"top-k 50\r\n> ")
        os.write(ours, b"\x04")
        assert child.wait(60) == 0
        os.close(ours)
