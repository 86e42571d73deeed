"""The command `evaluate`."""

from __future__ import annotations

import importlib.util
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2_multi.app import backends
from gpt2_multi.app.terminal import BACKEND, DEVICE, DTYPE, files_of, print_pieces
from gpt2_multi.files.hub import resolve
from gpt2_multi.files.progress import measured

if TYPE_CHECKING:
    from gpt2_multi.app.evaluate.records import Records
    from gpt2_multi.app.evaluate.running import Measure
    from gpt2_multi.app.evaluate.scorer import Source

TASKS = ("lambada", "hellaswag", "choices", "generate")
OF_TEXTS = ("field", "length", "stride", "no_start")
OF_GENERATION = ("field", "max_new_tokens", "greedy", "seed")


class Interrupted(click.ClickException):
    """Ctrl-C."""

    exit_code = 130


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("--task", type=click.Choice(TASKS), help="What is measured. Default: the perplexity of texts.")
@click.option("--field", help='Which field of a .jsonl or .parquet is the text. Default: "text".')
@click.option("--length", type=int, help="Tokens that are read at once. Default: as many as the model can.")
@click.option("--stride", type=int, help="How much further each window of a long text begins. Default: half of them.")
@click.option("--no-start", is_flag=True, help="Put no start token before a text; its first token is not scored then.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of --task generate. Default: as in `generate`.")
@click.option("--greedy", is_flag=True, help="Of --task generate: always take the likeliest token.")
@click.option("--seed", type=int, help="Of --task generate. Default: the model's, or 0.")
@click.option("--limit", type=click.IntRange(min=1), help="Read only so many documents.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Rows that are read at once. Default: by their lengths.")
@BACKEND
@DEVICE
@DTYPE
@click.option("--quantize", type=click.Choice(["int8"]), help="Multiply integers: less memory, and on a CPU faster.")
@click.option("--output", type=click.Path(path_type=Path), help="A .jsonl for the result of each document.")
@click.option(
    "--ray", metavar="ADDRESS", help='Compute on the machines of a Ray cluster, or of one begun here: "local".'
)
@click.option("--workers", type=click.IntRange(min=1), help="Of the cluster. Default: one for each GPU or machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def evaluate(
    model: str,
    data: tuple[str, ...],
    task: str | None,
    limit: int | None,
    output: Path | None,
    ray: str | None,
    workers: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL on DATA: perplexity and bits per byte of texts, or the right answers to the questions of a --task.

    MODEL is "demo", a folder, or a name on the Hugging Face hub such as gpt2. DATA are .txt, .jsonl and .parquet files,
    folders and patterns of them, or "-", standard input; for a --task .jsonl files in the form in which it was
    published. With --output, the same command goes on where it was stopped, and gives the same results. --task generate
    measures nothing: it continues each document, in --output, as `generate` would, on one machine or on many.
    """
    from gpt2_multi.app.evaluate import running  # after the options are known to be right
    from gpt2_multi.app.evaluate.cluster import on_ray
    from gpt2_multi.app.evaluate.scorer import Source
    from gpt2_multi.model.checkpoint import read_config

    if workers is not None and ray is None:
        raise click.UsageError("--workers are those of a cluster; give --ray too")
    settings = {name: options.pop(name) for name in {*OF_TEXTS, *OF_GENERATION}}
    field = settings["field"]
    chosen = _measure(task, settings, output)
    files = files_of(data, field)
    options["backend"] = backends.name_of(backends.resolve(options["backend"]))
    folder = resolve(model)
    chosen = chosen.settled(read_config(folder))
    source = Source(str(folder.resolve()) if Path(model).exists() else model, **options)
    sizes = [file.size for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with measured("Scoring", total) as advance, _records(output, folder, source, chosen) as records:
        items = running.texts(files, field) if task in (None, "generate") else running.questions(files, chosen)
        compute = running.in_process(source, chosen, advance)
        if ray is not None:
            compute = on_ray(ray, workers, source, chosen, advance)
        found = running.results(items, limit, compute, records)
        try:
            figures = chosen.summary(found)
        except KeyboardInterrupt:
            raise Interrupted("interrupted" + ("" if records is None else "; the same command goes on")) from None
        if records is not None:
            records.finish(figures, figures["documents"])
    _show(running.described(chosen) | figures, as_json)


def _measure(task: str | None, given: dict[str, Any], output: Path | None) -> Measure:
    """What is measured; an option that would change nothing is refused."""
    from gpt2_multi.app.evaluate.measures.continuation import Continuation
    from gpt2_multi.app.evaluate.measures.perplexity import Perplexity
    from gpt2_multi.app.evaluate.measures.tasks import Task

    used = {None: OF_TEXTS, "generate": OF_GENERATION}.get(task, ())
    useless = [name for name, value in given.items() if value not in (None, False) and name not in used]
    if useless:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(useless))
        what = "perplexity" if task is None else f"--task {task}"
        raise click.UsageError(f"{what} has no use for {names}, which would change nothing; leave it out")
    if task is None:
        return Perplexity(given["length"], given["stride"], not given["no_start"])
    if task != "generate":
        return Task(task)
    if output is None:
        raise click.UsageError("--task generate needs --output, the file that the texts go to; give it too")
    return Continuation(given["max_new_tokens"], given["greedy"], given["seed"])


def _records(
    output: Path | None, folder: Path, source: Source, measure: Measure
) -> AbstractContextManager[Records | None]:
    if output is None:
        return nullcontext()
    from gpt2_multi.app.evaluate.records import Records, digest_of
    from gpt2_multi.app.evaluate.running import described

    run = {"model": digest_of(folder), **described(measure)}
    run |= {name: value for name, value in asdict(source).items() if name != "model"}
    return Records(output, run)


def _show(figures: dict[str, Any], as_json: bool) -> None:
    from gpt2_multi.app.evaluate.records import plain

    if as_json:
        print_pieces([json.dumps(plain(figures), indent=2)])
        return
    lines = []
    for name, value in figures.items():
        error = figures.get(f"{name}_stderr")
        spread = "" if error is None else f" ± {_spelled(error)}"
        if not name.endswith("_stderr"):
            lines.append(f"{name.replace('_', ' '):16} {_spelled(value)}{spread}")
    print_pieces(["\n".join(lines)])


def _spelled(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


@click.command("lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run EleutherAI's lm_eval, in which --model gpt2_multi is a model on any of our backends.

    ARGUMENTS are those of lm_eval itself, such as: --model gpt2_multi --model_args pretrained=gpt2,backend=flax --tasks
    hellaswag.
    """
    if not importlib.util.find_spec("lm_eval"):
        raise click.ClickException("lm_eval is not installed: pip install lm_eval")
    from gpt2_multi.app.evaluate.harness import main

    main(arguments)
