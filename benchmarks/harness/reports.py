"""Tables, and under each what its figures depend on: the command, the date, the machine and the versions."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.harness.rows import FLOOR, OURS, Row
from benchmarks.peers.calls import threads

PACKAGES = (
    "torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "transformers", "safetensors", "tokenizers", "tiktoken",
    "numpy",
)  # fmt: skip
WIDTH = 120


def environment() -> dict[str, str]:
    """What figures depend on, without saying whose machine it is."""
    found = {"CPU": _processor(), "cores": str(os.cpu_count()), "threads": str(threads())}
    found |= {"Python": platform.python_version(), OURS: importlib.import_module(OURS).__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def described() -> str:
    """The environment in a line."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())


def origin(name: str, arguments: Sequence[str] = ()) -> str:
    """The command of one benchmark, and the date and time at which it began."""
    return f"{' '.join(['python -m benchmarks', name, *arguments])}, {time.strftime('%Y-%m-%d %H:%M')}"


def report(rows: Sequence[Row], came: str, seconds: float) -> str:
    """Markdown: where the rows came from, what their ratios are, and a line of a table for each thing measured."""
    command, date = came.rsplit(", ", 1)
    said = f"`{command}`, {date}, in {seconds:.0f} s: {described()}. {explanation(rows)}"
    return "\n".join([*textwrap.wrap(said, WIDTH, break_on_hyphens=False), "", *table(rows)])


def explanation(rows: Sequence[Row]) -> str:
    """What stands in brackets behind a figure."""
    ours = [our.removeprefix(f"{OURS}, ") for our in compared(rows)]
    if not ours:
        return ""
    compares = f"how many times as good {' · '.join(ours)} {'is' if len(ours) == 1 else 'are'}"
    return f"In brackets, {compares}: more than 1 means that gpt2_multi is better."


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a table with a column for each peer, its floor the last of them."""
    peers = sorted(dict.fromkeys(row.who for row in rows), key=FLOOR.__eq__)
    cells = [["", *peers, "rounds"]]
    for what, unit in dict.fromkeys((row.what, row.unit) for row in rows):
        here = {row.who: row for row in rows if (row.what, row.unit) == (what, unit)}
        count = str(max(row.rounds for row in here.values()))
        cells.append([f"{what}, {unit}", *(figure(here[who], rows) if who in here else "" for who in peers), count])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return [f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]]]


def figure(row: Row, rows: Sequence[Row]) -> str:
    """A value; of a peer with the ratio of each of ours to it, in brackets."""
    ours, said = compared(rows), number(row.value)
    if row.ratios and row.who not in ours:
        said += f" ({' · '.join(f'{row.ratios[our]:.2f}' if our in row.ratios else '-' for our in ours)})"
    return said + " DIFFERENT" * row.differs


def compared(rows: Sequence[Row]) -> list[str]:
    """Those of ours with whom others are compared."""
    return list(dict.fromkeys(our for row in rows for our in row.ratios))


def number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def complain(sentence: str) -> None:
    """Say on stderr what is wrong."""
    print(sentence, file=sys.stderr)
