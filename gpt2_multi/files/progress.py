"""A progress bar, or a sign of work, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


def watched(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """The same items, with a bar on standard error if that is a terminal; `total` is their number, if it is known."""
    if total == 1 or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total, console=Console(stderr=True), transient=True)


def busy(what: str) -> AbstractContextManager[Any]:
    """A sign on standard error, if that is a terminal, of work whose length is not known."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(f"{what} ...")


@contextmanager
def measured(what: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A function to call with the number of bytes more that are done, of `total`: a bar, likewise."""
    if not sys.stderr.isatty():
        yield int
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(f"{what}", *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
