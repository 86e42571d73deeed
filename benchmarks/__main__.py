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

from rich.console import Console

from benchmarks.harness import PeerError, Row, pictures
from benchmarks.harness.reports import complain, described, environment, origin, render
from gpt2_multi.model.config import GPT2Config

ROOMS = {
    "generation": ["generate", "growth", "quantized"],
    "training": ["flax_compile", "memory", "train"],
    "files": ["convert", "imports", "load"],
    "tokenizing": ["tf_tokenizer", "tokenize_file", "tokenizer"],
}
MODULES = {name: f"benchmarks.{room}.{name}" for room, names in ROOMS.items() for name in names}
OPTIONS = {"config": "--small", "who": "--who", "size": "--size"}
SMALL = GPT2Config(vocab_size=512, n_embd=64, n_layer=1, n_head=2)


def measure(name: str, options: dict[str, Any]) -> list[Row]:
    """The rows of one benchmark: none, and a sentence that says why, where it cannot be measured."""
    rows: list[Row] = []
    try:
        run = importlib.import_module(MODULES[name]).run
        if unknown := options.keys() - inspect.signature(run).parameters:
            options_given = " and ".join(sorted(OPTIONS[option] for option in unknown))
            raise PeerError(f"it takes no {options_given}; leave them out")
        rows = run(**options)
    except ModuleNotFoundError as error:
        complain(f"The benchmark '{name}' needs a package that is not installed: {error.name}.")
    except PeerError as error:
        complain(f"The benchmark '{name}' cannot be measured: {error}")
    return rows


def report(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, draw it, and give what stands in the JSON file."""
    options = {"config": SMALL} if given.small else {}
    if given.who:
        options["who"] = given.who.split(",")
    if given.size:
        options["size"] = given.size
    start = time.perf_counter()
    rows = measure(name, options)
    size = [f"--size {given.size}"] * bool(given.size)
    came = origin(name, [f"--who {given.who}"] * bool(given.who) + ["--small"] * given.small + size)
    if rows:
        render(rows, Console(width=200, highlight=False), came, time.perf_counter() - start)
    if rows and given.picture:
        draw = getattr(sys.modules[MODULES[name]], "draw", pictures.bars)
        draw(rows, given.picture / f"{name}.svg", f"{came}; {described()}")
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
    reports = {name: report(name, given) for name in names}
    if given.json:
        found = {"environment": environment(), "benchmarks": reports}
        given.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0 if all(found["rows"] for found in reports.values()) else 1


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure gpt2_multi beside its peers.")
    made.add_argument("names", nargs="*", metavar="NAME", help="a benchmark, or 'all'; without it, they are listed")
    names = "only these: beginnings of names with commas between, such as PyTorch,CTranslate2,transformers"
    made.add_argument("--who", metavar="NAMES", help=names)
    made.add_argument("--small", action="store_true", help="a tiny model, to try whether all runs")
    made.add_argument("--size", type=int, metavar="MB", help="of the file that is tokenized, in megabytes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment here too")
    made.add_argument("--picture", type=Path, metavar="FOLDER", help="draw each table into a file NAME.svg of it")
    return made


if __name__ == "__main__":
    sys.exit(main())
