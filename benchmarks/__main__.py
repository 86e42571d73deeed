"""Run benchmarks: `python -m benchmarks NAME [--json FILE]`; without a name, list them."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.harness import Row, environment, render

NAMES = ["generate", "imports", "load", "tokenizer", "train"]


def measure(name: str) -> list[Row]:
    """The rows of one benchmark."""
    rows: list[Row] = importlib.import_module(f"benchmarks.{name}").run()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure gpt2_multi beside its peers.")
    parser.add_argument("name", nargs="?", help="a benchmark, or 'all'; without it, the names are listed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment here too")
    given = parser.parse_args(arguments)
    if given.name is None:
        print("\n".join(NAMES))
        return 0
    if given.name not in {*NAMES, "all"}:
        print(f"There is no benchmark '{given.name}'; there are {', '.join(NAMES)}, and all.", file=sys.stderr)
        return 2
    try:
        rows = [row for name in NAMES if given.name in (name, "all") for row in measure(name)]
    except ModuleNotFoundError as error:
        print(f"This benchmark needs a package that is not installed: {error.name}.", file=sys.stderr)
        return 1
    render(rows, Console(width=200, highlight=False))
    if given.json:
        report = {"environment": environment(), "rows": [asdict(row) for row in rows]}
        given.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
