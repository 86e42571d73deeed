"""What the commands share: options, texts in and out, and that a failure is one sentence and an exit code.

Text goes to standard output, all else to standard error.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gpt2_multi.app.backends import BACKENDS
from gpt2_multi.errors import GPT2Error, InputError
from gpt2_multi.files.hub import DEMO
from gpt2_multi.model.fields import DTYPES

if TYPE_CHECKING:
    from rich.console import Console

    from gpt2_multi.files.documents import File
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

MODEL = click.option(
    "--model",
    default=str(DEMO),
    show_default="demo",
    help="The built-in demo model, a folder, or a name on the Hugging Face hub such as gpt2.",
)
BACKEND = click.option("--backend", type=click.Choice(list(BACKENDS)), help="Default: the first that is installed.")
DTYPE = click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="What it computes in."
)
DEVICE = click.option("--device", help="Where it computes, such as cpu, cuda or cuda:1. Default: the fastest there is.")


class Commands(click.Group):
    """A group of commands whose every failure is one sentence on standard error and an exit code."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run a command line, by default the process's own, and exit."""
        _prepare_process()
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except click.Abort:
            _fail("interrupted", 130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (GPT2Error, ModuleNotFoundError) as error:
            _fail(str(error), 1)
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
        except Exception as error:
            _fail(f"a bug, {type(error).__name__}: {error}; please report it, with GPT2_MULTI_DEBUG=1 set", 1)
        sys.exit(code or 0)


def _prepare_process() -> None:
    """Keep the hub's client quiet where nobody watches, and let no character that the output lacks end a text."""
    if sys.stdout is None:
        _fail("standard output is closed; open it, or send it to a file", 1)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _fail(sentence: str, code: int) -> NoReturn:
    if os.environ.get("GPT2_MULTI_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"gpt2-multi: {' '.join(sentence.split())}", err=True)
    sys.exit(code)


def console() -> Console:
    """Where tables are printed; in a pipe rich would take a width of 80, and break sentences."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def text_of(given: str | None, name: str) -> str:
    """An argument, or else what standard input holds; it has to be UTF-8."""
    if given is not None and given != "-":
        data, source = given.encode(errors="surrogateescape"), name
    elif sys.stdin is None:
        raise click.UsageError(f"expected {name}, found standard input closed; give {name} as an argument")
    elif given is None and sys.stdin.isatty():
        raise click.UsageError(f"expected {name}, found none; give it, or pipe it in")
    else:
        data, source = sys.stdin.buffer.read(), "standard input"
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: expected UTF-8, found the byte 0x{data[error.start]:02x} at {error.start}; convert it first"
        ) from None


def files_of(sources: Iterable[str | os.PathLike[str]], field: str | None = None) -> list[File]:
    """The files that sources name; what else lies in the folders among them is not read in silence."""
    from gpt2_multi.files.documents import find

    files, others = find(sources, field)
    if others:
        what = f"{others[0]}" if len(others) == 1 else f"{len(others)} files that are no texts, such as {others[0]}"
        click.echo(f"passed over {what}; name a file itself to have it read", err=True)
    return files


def tokenizer_of(model: str) -> GPT2Tokenizer:
    """The tokenizer of a model, in which no text becomes a control token."""
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer  # after the options are known to be right

    return GPT2Tokenizer.from_pretrained(model, split_special_tokens=True)  # what is typed or piped in is text


def print_pieces(*parts: Iterable[str]) -> None:
    """Print pieces of a text as they come, and a line end after each text."""
    for part in (*parts, ["\n"]):
        for piece in part:
            sys.stdout.write(piece)
            sys.stdout.flush()
