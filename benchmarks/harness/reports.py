"""Tables, and under each what its figures depend on: the command, the date, the machine and the versions."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness.rows import OURS, Row

PACKAGES = (
    "torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "transformers", "safetensors", "tokenizers", "tiktoken",
    "numpy",
)  # fmt: skip


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


def threads() -> int:
    """How many threads compute: one on each core that this process may use, unless OpenMP's variable says otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("OMP_NUM_THREADS") or cores)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def origin(name: str, arguments: Sequence[str] = ()) -> str:
    """The command of one benchmark, and the date."""
    return f"{' '.join(['python -m benchmarks', name, *arguments])}, {time.strftime('%Y-%m-%d')}"


def render(rows: Sequence[Row], console: Console, came: str, seconds: float) -> None:
    """Print the rows as a Markdown table, with a column of ratios for each of ours; then where they came from."""
    ours = list(dict.fromkeys(our for row in rows for our in row.ratios))
    table = Table(box=box.MARKDOWN)
    for header, side in (("what", "left"), ("who", "left"), ("value", "right"), ("unit", "left")):
        table.add_column(header, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for our in ours:
        table.add_column(our.removeprefix(f"{OURS}, ") if our != OURS else "ratio", justify="right", no_wrap=True)
    for row in rows:
        ratios = [f"{row.ratios[our]:.2f}" if our in row.ratios else "" for our in ours]
        table.add_row(row.what, row.who, f"{row.value:.4g}", row.unit, *ratios)
    console.print(table)
    console.print("Ratio: more than 1 means that gpt2_multi, in the backend that the column names, is better.")
    console.print(f"`{'`, '.join(came.rsplit(', ', 1))}, in {seconds:.0f} s: {described()}.\n", soft_wrap=True)


def described() -> str:
    """The environment in a line."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())


def complain(sentence: str) -> None:
    """Say on stderr what is wrong."""
    print(sentence, file=sys.stderr)
