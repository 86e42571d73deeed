"""Run benchmarks: `python -m benchmarks NAME... [--who NAMES] [--json FILE] [--picture FOLDER]`."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import PeerError, Row, pictures, reports
from benchmarks.harness.reports import complain

ROOMS = {
    "generation": ["generate", "growth", "quantized", "serve"],
    "training": ["flax_compile", "memory", "train"],
    "files": ["convert", "imports", "load"],
    "tokenizing": ["tf_tokenizer", "tokenize_file", "tokenizer"],
}
MODULES = {name: f"benchmarks.{room}.{name}" for room, names in ROOMS.items() for name in names}


def measure(name: str, small: bool, options: dict[str, Any]) -> list[Row]:
    """The rows of one benchmark: none, and a sentence that says why, where it cannot be measured."""
    rows: list[Row] = []
    try:
        module = importlib.import_module(MODULES[name])
        if unknown := options.keys() - inspect.signature(module.run).parameters:
            raise PeerError(f"it takes no --{' and no --'.join(sorted(unknown))}; leave that out")
        rows = module.run(**(module.SMALL if small else {}) | options)
    except ModuleNotFoundError as error:
        complain(f"The benchmark '{name}' needs a package that is not installed: {error.name}.")
    except PeerError as error:
        complain(f"The benchmark '{name}' cannot be measured: {error}")
    return rows


def report(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, draw it, and give what stands in the JSON file."""
    options = {"who": given.who and given.who.split(","), "size": given.size}
    words = [f"--{option} {getattr(given, option)}" for option, value in options.items() if value]
    came, start = reports.origin(name, words + ["--small"] * given.small), time.perf_counter()
    rows = measure(name, given.small, {option: value for option, value in options.items() if value})
    if rows:
        print(reports.report(rows, came, time.perf_counter() - start), end="\n\n", flush=True)
    if rows and given.picture:
        draw = getattr(sys.modules[MODULES[name]], "draw", pictures.bars)
        draw(rows, given.picture / f"{name}.svg", f"{came}; {reports.described()}")
    return {"command": came, "rows": [asdict(row) for row in rows]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    given = parser().parse_args(arguments)
    if not given.names:
        print("\n".join(MODULES))
        return 0
    for name in given.names:
        if name not in {*MODULES, "all"}:
            complain(f"There is no benchmark '{name}'; there are {', '.join(MODULES)}, and all.")
            return 2
    names = [name for name in MODULES if name in given.names or "all" in given.names]
    found = {name: report(name, given) for name in names}
    if given.json:
        everything = {"environment": reports.environment(), "benchmarks": found}
        given.json.write_text(json.dumps(everything, indent=2) + "\n", "utf-8")
    return 0 if all(each["rows"] for each in found.values()) else 1


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure gpt2_multi beside its peers.")
    made.add_argument("names", nargs="*", metavar="NAME", help="a benchmark, or 'all'; without it, they are listed")
    names = "only these: beginnings of names with commas between, such as PyTorch,CTranslate2,transformers"
    made.add_argument("--who", metavar="NAMES", help=names)
    made.add_argument("--small", action="store_true", help="little of everything, to try whether all runs")
    made.add_argument("--size", type=int, metavar="MB", help="of the file that is tokenized, in megabytes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment here too")
    made.add_argument("--picture", type=Path, metavar="FOLDER", help="draw each table into a file NAME.svg of it")
    return made


if __name__ == "__main__":
    sys.exit(main())
