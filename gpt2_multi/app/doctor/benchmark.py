"""The command `benchmark`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2_multi.app import backends
from gpt2_multi.app.terminal import DEVICE, DTYPE, console, print_pieces
from gpt2_multi.files.hub import resolve
from gpt2_multi.files.progress import busy, watched
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table

if TYPE_CHECKING:
    from gpt2_multi.app.doctor.speed import Speed


@click.command()
@click.option("--model", help="The model, demo, a folder or a name. Default: 82 million random weights.")
@click.option("--backend", type=click.Choice(list(backends.BACKENDS)), help="Default: all that are installed.")
@DEVICE
@DTYPE
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def benchmark(model: str | None, backend: str | None, device: str | None, dtype: str, as_json: bool) -> None:
    """Measure how fast this machine computes GPT-2: training, reading a prompt, writing one text and eight at once.

    Beside the tokens a second of writing stands what would be possible: the time in which memory gives the weights, and
    the keys and values, once for each token of all texts, at the speed of a copy that is measured here; a model that
    fits the caches of a processor gets past it. Training and reading are bound by arithmetic; of these the operations a
    second are shown. First calls, which compile, do not count. The model is as large as DistilGPT2, unless --model
    names another.
    """
    from gpt2_multi.app.doctor.floor import bandwidth
    from gpt2_multi.app.doctor.speed import FIGURES, Bench, measured

    names = [backend] if backend else backends.installed() or [backends.resolve().title]
    places = {name: backends.resolve(name).device(device) for name in names}
    with _folder(model) as folder:
        config = GPT2Config.from_pretrained(folder)
        with busy("Measuring memory"):
            copied = bandwidth()
        benches = [Bench(folder, config, name, place, dtype, copied) for name, place in places.items()]
        speeds = list(watched(measured(benches), "Measuring", FIGURES * len(benches)))
    size = sum(math.prod(row.shape) for row in table(config, "lm"))
    if as_json:
        said = {"model": model, "parameters": size, "dtype": dtype, "bytes_per_second": copied}
        print_pieces([json.dumps(said | {"speeds": [speed.to_dict() for speed in speeds]}, indent=2)])
    else:
        title = f"{model or 'random weights'}, {size / 1e6:,.1f} million parameters in {dtype}"
        _show(f"{title}; memory is read at {copied / 1e9:.1f} GB/s", speeds)
    if all(speed.problem for speed in speeds):
        raise click.ClickException("nothing could be measured; gpt2-multi doctor checks this machine")


@contextmanager
def _folder(model: str | None) -> Iterator[Path]:
    """The folder of a model, or for a while one of random weights, which never end a text."""
    if model is not None:
        yield resolve(model)
        return
    from gpt2_multi.app.train.beginning.models import new_weights

    with tempfile.TemporaryDirectory() as name:
        yield new_weights(Path(name), GPT2Config(n_layer=6, bos_token_id=None, eos_token_id=None), seed=0)


def _show(title: str, speeds: Sequence[Speed]) -> None:
    """Print a table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = Table("backend", "device", "what", "tokens/s", "memory allows", "ratio", "GFLOP/s", box=box.SIMPLE)
    for each in speeds:
        work = None if each.operations_per_second is None else each.operations_per_second / 1e9
        figures = [f"{x:,.0f}" if x else "-" for x in (each.tokens_per_second, each.limit)]
        found = Text(each.problem, "red") if each.problem else Text("-" if work is None else f"{work:,.0f}")
        rows.add_row(each.backend, each.device, each.what, *figures, f"{each.ratio:.2f}" if each.ratio else "-", found)
    console().print(title, markup=False, soft_wrap=True)
    console().print(rows)
