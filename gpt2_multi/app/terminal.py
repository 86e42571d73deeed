"""What every command of this library shares: a failure is one sentence on standard error and an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gpt2_multi.errors import GPT2Error

if TYPE_CHECKING:
    from rich.console import Console


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
