"""The commands `convert`, `inspect` and `verify`, of `gpt2-multi` and of `python -m gpt2_multi_conversion`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from gpt2_multi.app.doctor.comparison import table
from gpt2_multi.app.terminal import Commands, console
from gpt2_multi.model.formats.table import FORMATS

from . import converting, inspection, verification

JSON = click.option("--json", "as_json", is_flag=True, help="Print one object.")
NAMES = (
    click.option("--prefix", help="Which of several models is meant, by what stands before its names."),
    click.option(
        "--drop", multiple=True, metavar="PATTERN", help='Leave out tensors, as "v_head.*"; may be given again.'
    ),
    click.option("--n-head", type=int, help="How many heads it has, where no config.json says so."),
)
LISTED = 8  # lines of each kind in what is printed; the report file has all


def _named(command: Any) -> Any:
    """Give a command the options that say which tensors of a file are meant, and what they do not say."""
    for option in reversed(NAMES):
        command = option(command)
    return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Convert, inspect and verify checkpoints of GPT-2 in every format."""


@main.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--to", type=click.Choice(list(FORMATS)), default="safetensors", show_default=True, help="The new format."
)
@click.option("--dtype", type=click.Choice(list(converting.FLOATS)), help="Cast the tensors. Default: as they are.")
@click.option("--quantize", type=click.Choice(["int8"]), help="Store products and tokens in int8, in safetensors.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of safetensors and pytorch_model.bin.")
@click.option("--untie", is_flag=True, help="Store the language-model head as a tensor of its own.")
@_named
@click.option("--vocab-size", type=int, help="Keep the first words only, of a table that was padded.")
@click.option("--n-positions", type=int, help="Keep the first positions only.")
@click.option("--verify", "check", is_flag=True, help="Compare old and new, tensors and logits, before TARGET changes.")
@click.option("--force", is_flag=True, help="Replace a model in TARGET; go on where the new format computes otherwise.")
@JSON
def convert(source: str, target: str, as_json: bool, check: bool, **options: Any) -> None:
    """Write the checkpoint SOURCE to the folder TARGET in another format.

    SOURCE is a folder, its main file, or a name on the Hugging Face hub; its format is found out. Configuration,
    generation settings and tokenizer go along. TARGET/conversion.json says what was done.
    """
    path = _local(source)
    with _progress() as watch:
        report = converting.convert(path, target, check=verification.check if check else None, watch=watch, **options)
    if as_json:
        _print_json(report.to_dict())
    else:
        _show_report(report)


def _local(name: str) -> Path:
    """The file or folder of this name, what the files of a TensorFlow checkpoint begin with, or a model of the hub."""
    from gpt2_multi.files.hub import resolve

    with suppress(OSError, ValueError):  # longer than a path may be, or with a zero byte in it
        if Path(name).is_file() or Path(f"{name}.index").is_file():
            return Path(name)
    return resolve(name)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar of the bytes that were converted, where somebody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Converting", total=None)

        def watch(name: str, size: int, total: int) -> None:
            progress.update(task, advance=size, total=total, description=f"Converting {name}")

        yield watch


def _show_report(report: converting.ConversionReport) -> None:
    click.echo(f"{report.source} ({report.from_format}, {report.head}) -> {report.target} ({report.to_format})")
    click.echo(f"{report.tensors} tensors, {report.parameters:,} parameters")
    if report.prefix:
        click.echo(f"names after {report.prefix!r}")
    renamed = [f"{old} -> {', '.join(new)}" for old, new in report.renamed.items()]
    cast, cut = ([f"{name}: {how}" for name, how in changed.items()] for changed in (report.cast, report.cut))
    for title, lines in (
        ("renamed", renamed), ("cast", cast), ("cut", cut), ("dropped", report.dropped), ("missing", report.missing),
        ("went along", report.files), ("warning", report.warnings),
    ):  # fmt: skip
        _show_lines(title, lines)
    click.echo(f"all of this is in {Path(report.target) / converting.REPORT}")


def _show_lines(title: str, lines: list[str]) -> None:
    for line in lines[:LISTED]:
        click.echo(f"  {title}: {line}")
    if len(lines) > LISTED:
        click.echo(f"  {title}: and {len(lines) - LISTED} more")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


@main.command()
@click.argument("source")
@_named
@JSON
def inspect(source: str, as_json: bool, **options: Any) -> None:
    """List the tensors of the checkpoint SOURCE, and what the table of weights says of each.

    What is unknown, missing or of a wrong shape is in red.
    """
    found = inspection.inspect(_local(source), **options)
    if as_json:
        _print_json(found.to_dict())
    else:
        _show_inspection(found)


def _show_inspection(found: inspection.Inspection) -> None:
    from rich.markup import escape
    from rich.table import Table

    click.echo(f"{found.path}: {found.title}, head: {found.head}")
    if found.prefix:
        click.echo(f"names after {found.prefix!r}")
    if found.guessed:
        click.echo(found.guessed)
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    click.echo(", ".join(f"{key} {found.config[key]}" for key in sizes))
    rows = Table("tensor", "shape", "dtype", "in the table", box=None)
    for tensor in found.tensors:
        bad = not tensor.ok and tensor.remark != "dropped when loaded"
        remark = " ".join(part for part in (tensor.row, tensor.remark) if part)
        rows.add_row(escape(tensor.name), str(tensor.shape), tensor.dtype, remark, style="red" if bad else None)
    for name in found.missing:
        rows.add_row(escape(name), "", "", "missing", style="red")
    console().print(rows)
    click.echo(f"{len(found.tensors)} tensors, {found.parameters:,} parameters, {found.bytes:,} bytes")


@main.command("verify")
@click.argument("a")
@click.argument("b", required=False)
@click.option("--backend", "backends", multiple=True, help="Compare this one only; may be given again. Default: all.")
@_named
@JSON
def verify_command(a: str, b: str | None, backends: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Compare the checkpoint A with B; or, without B, what every installed backend computes of A with NumPy.

    The exit code is 1 where a hidden state, a logit or a tensor differs by more than 1e-4 of its greatest value.
    """
    verdict = verification.verify(_local(a), b and _local(b), backends or None, **options)
    if as_json:
        _print_json(verdict.to_dict())
    else:
        _show_verdict(verdict)
    return 0 if verdict.ok else 1


def _show_verdict(verdict: verification.Verdict) -> None:
    console().print(table(verdict.lines))
    for name, line in list(verdict.tensors.items())[:LISTED]:
        click.echo(f"{name}: differs by {line.error:.1e}")
    if verdict.tensors:
        click.echo(f"{len(verdict.tensors)} tensors are not bit for bit the same")
