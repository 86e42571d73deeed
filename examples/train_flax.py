"""Train GPT-2 in Flax on a text file: on one device, on a mesh of devices, on several hosts.

    python examples/train_flax.py --text tinyshakespeare.txt --output runs/flax

The same on 8 virtual devices of a CPU:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/train_flax.py --mesh data=2,fsdp=2,tensor=2 ...

The same on two hosts, which see the same folder; on the second one `--process-id 1`:

    python examples/train_flax.py --coordinator host0:1234 --processes 2 --process-id 0 --mesh fsdp=16 ...

The output gets the model, its tokenizer, losses.json, losses.png, and under states/ what `--resume` goes on from.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from gpt2_multi.errors import GPT2Error
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.parameters.sharding import FSDP, TENSOR, make_mesh
from gpt2_multi.flax.training import (
    TrainState,
    Windows,
    cosine_rate,
    create_train_state,
    eval_step,
    optimizer,
    restore_state,
    save_state,
    saved_steps,
    train_step,
)
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

HELD_OUT = 0.1  # of the text, its end


@dataclass(frozen=True)
class Plan:
    """What decides the losses; a run that goes on has to have the same."""

    text: str
    model: str
    steps: int
    batch_size: int
    micro_batches: int
    length: int
    learning_rate: float
    weight_decay: float
    max_norm: float
    warmup: int
    dtype: str
    seed: int


@dataclass(frozen=True)
class Run:
    """Where and how often things are written."""

    output: Path
    eval_every: int
    save_every: int
    stop_at: int


@dataclass
class Losses:
    """The loss of each update, and (update, held-out loss) pairs."""

    train: list[float]
    held_out: list[tuple[int, float]]


def encode(path: Path, tokenizer: GPT2Tokenizer) -> tuple[Any, Any]:
    """The ids to learn and the ids to hold out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"--text {path}: not readable as UTF-8 ({error})") from None
    cut = int(len(text) * (1 - HELD_OUT))
    return tuple(np.array(tokenizer(part).input_ids) for part in (text[:cut], text[cut:]))  # type: ignore[return-value]


def prepare(plan: Plan, mesh: str, scan_layers: bool) -> tuple[FlaxGPT2LMHeadModel, TrainState]:
    """The model, and the state before the first update, on the devices of the mesh."""
    options = {"mesh": make_mesh(mesh), "rules": FSDP | TENSOR, "scan_layers": scan_layers}
    dtypes = {"dtype": plan.dtype, "param_dtype": "float32"}
    model, params = FlaxGPT2LMHeadModel.from_pretrained(plan.model, **options, **dtypes, _do_init=False)
    rate = cosine_rate(plan.learning_rate, plan.steps, plan.warmup)
    adamw = optimizer(rate, plan.weight_decay, plan.max_norm or None)
    return model, create_train_state(model, adamw, params, seed=plan.seed)


def resume(state: TrainState, plan: Plan, run: Run) -> tuple[TrainState, Losses]:
    """The last state that was saved, and the losses until then."""
    state, found = restore_state(run.output / "states", state), read_json(run.output / "losses.json")
    for name, value in asdict(plan).items():
        if (old := found.get("plan", {}).get(name)) != value:
            raise click.ClickException(f"--{name.replace('_', '-')} was {old}, found {value}")
    step = int(state.step)
    return state, Losses(found["train"][:step], [(at, loss) for at, loss in found["held_out"] if at <= step])


def held_out_loss(state: TrainState, held: Windows, batches: int = 8) -> float:
    """The mean over the first batches of what was held out."""
    found = [eval_step(state, held[i])[0] for i in range(min(batches, held.steps_per_epoch))]
    return sum(map(float, found)) / len(found)


def stacked(batch: dict[str, Any], number: int) -> dict[str, Any]:
    """The rows of a batch as micro-batches: (B, T) -> (number, B / number, T)"""
    return {name: value.reshape(number, -1, value.shape[1]) for name, value in batch.items()}


def train(state: TrainState, data: Windows, held: Windows, plan: Plan, run: Run, losses: Losses) -> TrainState:
    """Train, measure and save; where in the text it is follows from the step."""
    end, waiting = min(run.stop_at, plan.steps), []
    with progress_bar() as progress:
        task = progress.add_task("", total=plan.steps, completed=int(state.step), note="")
        for step in range(int(state.step) + 1, end + 1):
            batch = stacked(data[step - 1], plan.micro_batches)
            state, metrics = train_step(state, batch, micro=True)
            waiting.append(metrics["loss"])  # not looked at, so that the device does not wait for the host
            progress.update(task, advance=1)
            if step % run.eval_every == 0 or step == end:
                losses.train += map(float, waiting)
                losses.held_out.append((step, held_out_loss(state, held)))
                waiting.clear()
                progress.update(task, note=f"loss {losses.train[-1]:.3f}, held out {losses.held_out[-1][1]:.3f}")
            if step % run.save_every == 0 or step == end:
                losses.train += map(float, waiting)
                waiting.clear()
                write(run.output, plan, losses)  # before the state: losses beyond it are left out when it goes on
                save_state(run.output / "states", state)
    return state


def progress_bar() -> Progress:
    """Progress on stderr, of the first host."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    first = jax.process_index() == 0
    return Progress("training", *columns, "{task.fields[note]}", console=Console(stderr=True), disable=not first)


def write(folder: Path, plan: Plan, losses: Losses) -> None:
    """The losses as JSON and as a picture, by the first host."""
    if jax.process_index() == 0:
        write_json(folder / "losses.new", {"plan": asdict(plan), **asdict(losses)})
        (folder / "losses.new").replace(folder / "losses.json")  # whole or not at all
        draw(folder / "losses.png", losses)


def draw(path: Path, losses: Losses) -> None:
    """The losses over the updates."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses.train) + 1), losses.train, label="training", alpha=0.6)
    axes.plot(*zip(*losses.held_out, strict=True), label="held out", marker="o")
    axes.set(xlabel="update", ylabel="loss per token")
    axes.legend()
    figure.savefig(path, dpi=120)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--text", type=click.Path(exists=True, dir_okay=False), required=True, help="UTF-8 text to learn.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/flax"), help="Folder for the model.")
@click.option("--model", default="demo", help="Folder or name to start from; its tokenizer has to be the demo's.")
@click.option("--mesh", default="", help='Devices, such as "data=2,fsdp=2,tensor=2"; all of them for data by default.')
@click.option("--scan-layers", is_flag=True, help="Stack the layers' parameters, to compile one layer only.")
@click.option("--steps", default=500, type=click.IntRange(1), help="Updates.")
@click.option("--batch-size", default=16, type=click.IntRange(1), help="Windows per update, of all hosts together.")
@click.option("--micro-batches", default=1, type=click.IntRange(1), help="Parts of a batch, one after the other.")
@click.option("--length", default=128, type=click.IntRange(2), help="Tokens per window.")
@click.option("--learning-rate", default=3e-4, help="At its highest, after the warm-up.")
@click.option("--weight-decay", default=0.1, help="Of matrices and embeddings.")
@click.option("--max-norm", default=1.0, type=click.FloatRange(0), help="Clip gradients to it; 0 for never.")
@click.option("--warmup", default=20, type=click.IntRange(0), help="Updates until the learning rate is at its highest.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]), help="Weights stay in float32.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Of batches and dropout.")
@click.option("--eval-every", default=50, type=click.IntRange(1), help="Updates between two held-out losses.")
@click.option("--save-every", default=100, type=click.IntRange(1), help="Updates between two states.")
@click.option(
    "--stop-at", default=2**31, type=click.IntRange(1), show_default="the last", help="Leave off after this update."
)
@click.option("--resume", "goes_on", is_flag=True, help="Go on from the last state in the output.")
@click.option("--coordinator", help="host:port of the first of several hosts.")
@click.option("--processes", type=int, help="Number of hosts.")
@click.option("--process-id", type=int, help="Which of them this is, from 0.")
def main(mesh: str, scan_layers: bool, goes_on: bool, **options: Any) -> None:
    """Train GPT-2 on a text file, on one device, on a mesh of devices or on several hosts."""
    hosts = [options.pop(name) for name in ("coordinator", "processes", "process_id")]
    plan, run = (kind(**{f.name: options[f.name] for f in fields(kind)}) for kind in (Plan, Run))
    if plan.batch_size % plan.micro_batches:
        raise click.ClickException(f"--batch-size {plan.batch_size} is not a multiple of --micro-batches")
    if hosts[0] is not None:
        jax.distributed.initialize(*hosts)
    try:
        work(plan, run, mesh or f"data={jax.device_count()}", scan_layers, goes_on)
    except GPT2Error as error:
        raise click.ClickException(str(error)) from None


def prepare_folder(output: Path, goes_on: bool) -> None:
    """Make the output; a run that starts anew must not mix its states with those of another."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--output {output}: expected a folder to write in, found none ({error})") from None
    if not goes_on and saved_steps(output / "states"):
        raise click.ClickException(f"--output {output} has the states of a run; add --resume, or take another folder")


def work(plan: Plan, run: Run, mesh: str, scan_layers: bool, goes_on: bool) -> None:
    """Everything between the options and the model folder."""
    prepare_folder(run.output, goes_on)
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    ids, held_ids = encode(Path(plan.text), tokenizer)
    data, held = (Windows(part, plan.length, plan.batch_size, plan.seed) for part in (ids, held_ids))
    model, state = prepare(plan, mesh, scan_layers)
    state, losses = resume(state, plan, run) if goes_on else (state, Losses([], []))
    state = train(state, data, held, plan, run, losses)
    model.save_pretrained(run.output, state.params)
    if jax.process_index() == 0:
        tokenizer.save_pretrained(run.output)
        click.echo(f"{run.output}: held-out loss {losses.held_out[-1][1]:.4f} after {int(state.step)} updates")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
