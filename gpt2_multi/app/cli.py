"""The command `gpt2-multi`: its small commands, those of the rooms, and those that other packages bring."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click

from gpt2_multi import __version__
from gpt2_multi.app import backends
from gpt2_multi.app.doctor.benchmark import benchmark
from gpt2_multi.app.doctor.plan import plan
from gpt2_multi.app.evaluate.command import evaluate, lm_eval
from gpt2_multi.app.generate.command import generate
from gpt2_multi.app.serve.command import serve
from gpt2_multi.app.terminal import MODEL, Commands, print_pieces, text_of, tokenizer_of
from gpt2_multi.app.train.command import train
from gpt2_multi.files.hub import resolve
from gpt2_multi.files.progress import busy

ENTRY_POINTS = "gpt2_multi.commands"


class OpenCommands(Commands):
    """A group that has the commands of other packages too: entry points, each loaded when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of all commands, in order."""
        return sorted([*super().list_commands(context), *entry_points(group=ENTRY_POINTS).names])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of a name, or None."""
        found: list[click.Command] = [entry.load() for entry in entry_points(group=ENTRY_POINTS, name=name)]
        return found[0] if found else super().get_command(context, name)


@click.group(cls=OpenCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpt2-multi")
def main() -> None:
    """GPT-2 for PyTorch, TensorFlow and JAX."""


main.add_command(benchmark)
main.add_command(plan)
main.add_command(evaluate)
main.add_command(lm_eval)
main.add_command(generate)
main.add_command(train)
main.add_command(serve)


@main.command()
@click.argument("text", required=False)
@MODEL
@click.option("--json", "as_json", is_flag=True, help="Print one object with the lists `ids` and `tokens`.")
def tokenize(text: str | None, model: str, as_json: bool) -> None:
    """Print the id and the token, as vocab.json spells it, of each token of TEXT, one per line.

    TEXT is read from standard input where it is left out or "-", to the last byte.
    """
    given = text_of(text, "TEXT")
    tokenizer = tokenizer_of(model)
    ids = tokenizer(given).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if as_json:
        print_pieces([json.dumps({"ids": ids, "tokens": tokens}, ensure_ascii=False)])
    else:
        sys.stdout.write("".join(f"{token_id}\t{token}\n" for token_id, token in zip(ids, tokens, strict=True)))
        sys.stdout.flush()


@main.command()
@click.argument("target", metavar="DIR")
@MODEL
def export(target: str, model: str) -> None:
    """Write a SavedModel to DIR, from texts to texts, which TensorFlow alone loads and TensorFlow Serving serves.

    A SavedModel that is there is replaced. TensorFlow Serving reads numbered versions of a model: take a DIR such as
    served/gpt2/1. Options of a request win over those of the model's generation_config.json, which go into the file.
    """
    row = backends.resolve("tf")
    folder = resolve(model)
    tokenizer = tokenizer_of(str(folder))
    with busy("Exporting"):
        row.load(folder, "cpu").export_saved_model(target, tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in Path(target).rglob("*") if file.is_file())
    print_pieces([f"{target}: {size / 1e6:.1f} MB, with tokenize, logits, generate and serving_default"])


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def doctor(as_json: bool) -> int:
    """Check this machine: versions, devices, and whether each computes known logits rightly.

    Every installed backend computes the demo model on each of its devices, in each dtype, and is compared with NumPy in
    float64. The exit code is 0 only if something was checked and all of it was right.
    """
    from gpt2_multi.app.doctor.doctor import examine, show

    diagnosis = examine()
    if as_json:
        print_pieces([json.dumps(diagnosis.to_dict(), indent=2)])
    else:
        show(diagnosis)
    if not diagnosis.findings:
        backends.resolve()  # which says what to install
    if bad := ", ".join(diagnosis.wrong):
        raise click.ClickException(f"wrong results: {bad}; update the framework or its driver, or use another device")
    return 0
