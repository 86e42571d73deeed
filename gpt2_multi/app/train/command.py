"""The command `train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from gpt2_multi.app.terminal import BACKEND
from gpt2_multi.app.train.plan import DECAY, EPOCHS, EVALUATIONS, HELD_OUT, LENGTH, MOST, NORM, WARMUP

DTYPES = ("float32", "bfloat16", "float64")


class Finite(click.FloatRange):
    """A number within bounds; click itself lets nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a refusal that names the option."""
        found: float = super().convert(value, param, ctx)
        return found if math.isfinite(found) else self.fail(f"expected a finite number, found {value}", param, ctx)


FRACTION = Finite(0, 1, max_open=True)
POSITIVE = Finite(0, min_open=True)


@click.command()
@click.argument("data", nargs=-1, metavar="DATA...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder of the run, and of the model.")
@click.option("--model", help="What to train: demo (the default), gpt2, a folder, or sizes of a new one.")
@click.option("--tokenizer", help="A folder or name, or train:2000 to learn one. Default: the model's; of a new, gpt2.")
@click.option("--field", help="Where .jsonl and .parquet have the text. Default: text.")
@BACKEND
@click.option("--device", help="As the backend names it, such as cpu or cuda:0. Default: the fastest kind.")
@click.option("--mesh", help="How to divide the model over devices, such as data=2,fsdp=4; of backends that can.")
@click.option("--dtype", help="float32 (the default), bfloat16 (weights stay in float32), or float64.")
@click.option("--steps", type=click.IntRange(1), help=f"Updates. Default: {EPOCHS} epochs, but {MOST} steps at most.")
@click.option("--epochs", type=POSITIVE, help="How often all of the data is seen, in the place of --steps.")
@click.option("--batch-size", type=click.IntRange(1), help="Windows of an update, of all processes together.")
@click.option("--length", type=click.IntRange(2), help=f"Tokens of a window. Default: the model's, up to {LENGTH}.")
@click.option("--accumulate", type=click.IntRange(1), help="Compute a batch in so many parts, for less memory.")
@click.option("--lr", type=POSITIVE, help="The learning rate at its highest. Default: by the size of the model.")
@click.option("--warmup", type=click.IntRange(0), help=f"Steps until --lr is reached. Default: 1/{WARMUP} of all.")
@click.option("--weight-decay", type=Finite(0), help=f"Of matrices and embeddings. Default: {DECAY}.")
@click.option("--max-norm", type=Finite(0), help=f"Clip gradients to it; 0 for never. Default: {NORM}.")
@click.option("--dropout", type=FRACTION, help="Of embeddings, residuals and attention. Default: the model's.")
@click.option("--lora", type=click.IntRange(1), metavar="RANK", help="Train adapters of this rank alone.")
@click.option("--val", metavar="FILE", help="What to measure the held-out loss on.")
@click.option(
    "--val-fraction", type=FRACTION, help=f"Part of the data, its end, that is held out. Default: {HELD_OUT}."
)
@click.option("--eval-every", type=click.IntRange(1), help=f"Steps between two measurements. Default: 1/{EVALUATIONS}.")
@click.option("--save-every", type=click.IntRange(1), help=f"Steps between two saves. Default: 1/{EVALUATIONS} of all.")
@click.option("--resume", is_flag=True, help="Go on where the run in --out was stopped; no other option is needed.")
@click.option(
    "--seed", type=click.IntRange(0), help="Of the order of the data, of dropout and new weights. Default: 0."
)
@click.option("--log", type=click.Choice(["tensorboard"]), help="Write figures for a viewer, into logs/.")
def train(out: Path, resume: bool, **options: Any) -> int:
    """Train a GPT-2 on DATA, into a model folder.

    DATA are texts (.txt, .jsonl, .parquet, folders of them, patterns, "-" for standard input), or tokens of nanoGPT and
    llm.c. With nothing but DATA and --out the small demo model is trained further, on a CPU within minutes. Sizes such
    as --model n_layer=6,n_head=6,n_embd=384 begin with random weights.

    Ctrl-C saves and ends; --resume goes on, bit by bit. Several processes train together: see docs/training.md.
    """
    from gpt2_multi.app.train.beginning.choices import Asked
    from gpt2_multi.app.train.session import run

    check(options, resume)
    return run(Asked(**options).located(), out, resume)


def check(options: dict[str, Any], resume: bool) -> None:
    """Refuse what does not go together before anything is read."""
    if not options["data"] and not resume:
        raise click.UsageError("expected DATA, found none; name a text to train on, such as book.txt")
    if options["dtype"] == "float16":
        raise click.UsageError(
            "--dtype float16: its gradients vanish below 6e-8, which makes training fail; choose bfloat16, or float32"
        )
    if options["dtype"] not in (None, *DTYPES):
        raise click.UsageError(f"--dtype: expected one of {', '.join(DTYPES)}, found {options['dtype']!r}")
    for one, other in (("steps", "epochs"), ("val", "val_fraction")):
        if options[one] is not None and options[other] is not None:
            pair = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise click.UsageError(f"{pair[0]} and {pair[1]} say the same in two ways; drop one")
