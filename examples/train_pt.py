"""Train GPT-2 in PyTorch on a text file: on one device, on a mesh of devices, on several hosts.

    python examples/train_pt.py --text tinyshakespeare.txt --output runs/pt

The same in 8 processes, on a device each or all on the CPU; without --mesh they share the rows of a batch alone:

    torchrun --nproc-per-node 8 examples/train_pt.py --mesh data=2,fsdp=2,tensor=2 ...

The same on two hosts, which see the same folder; on the second one `--node-rank 1`:

    torchrun --nnodes 2 --node-rank 0 --master-addr host0 --nproc-per-node 8 examples/train_pt.py --mesh fsdp=16 ...

The output gets the model, its tokenizer, losses.json, losses.png, and under states/ what `--resume` goes on from.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch.distributed.device_mesh import DeviceMesh

from gpt2_multi.app.train.data.windows import Windows
from gpt2_multi.errors import GPT2Error
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.pt import GPT2LMHeadModel, parameter_groups, train_step
from gpt2_multi.pt.parameters.resuming import restore_state, save_state, saved_steps
from gpt2_multi.pt.parameters.sharding import FSDP, TENSOR, make_mesh, shard_batch
from gpt2_multi.pt.training import cosine_schedule
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


@dataclass(frozen=True)
class Trained:
    """A model, its optimizer, and the mesh that both are cut over; None in one process."""

    model: GPT2LMHeadModel
    optimizer: torch.optim.Optimizer
    mesh: DeviceMesh | None

    def batch(self, rows: dict[str, Any]) -> dict[str, Any]:
        """The rows of this process, of those of all (B, T), on its device; logits are made a chunk at a time."""
        given = {name: torch.from_numpy(value).long() for name, value in rows.items()}
        own = given if self.mesh is None else shard_batch(given, self.mesh)
        return {"skip_logits": True, **{name: x.to(self.model.device) for name, x in own.items()}}

    def mean(self, losses: list[float]) -> list[float]:
        """The losses of all rows, of those of the rows of each process."""
        found = torch.tensor(losses, dtype=torch.float64)
        if self.mesh is not None:
            dist.all_reduce(found)
            found /= dist.get_world_size()
        return found.tolist()


def prepare(plan: Plan, mesh: str, is_compiled: bool) -> Trained:
    """The model and its optimizer before the first update, on the devices of the mesh."""
    whole = make_mesh(mesh) if mesh else None
    where: Any = {"mesh": whole, "rules": FSDP | TENSOR} if whole else {"device_map": "auto"}
    model = GPT2LMHeadModel.from_pretrained(plan.model, dtype=plan.dtype, param_dtype="float32", **where)
    if is_compiled:
        for block in model.transformer.h:
            block.compile()  # one compilation serves all
    groups = parameter_groups(model.train(), plan.weight_decay)
    return Trained(model, torch.optim.AdamW(groups, lr=plan.learning_rate), whole)


def resume(trained: Trained, plan: Plan, run: Run) -> tuple[int, Losses]:
    """The step of the last state that was saved, and the losses until then."""
    found = read_json(run.output / "losses.json")
    for name, value in asdict(plan).items():
        if (old := found.get("plan", {}).get(name)) != value:
            raise click.ClickException(f"--{name.replace('_', '-')} was {old}, found {value}")
    step = restore_state(run.output / "states", trained.model, trained.optimizer)
    return step, Losses(found["train"][:step], [(at, loss) for at, loss in found["held_out"] if at <= step])


@torch.no_grad()
def held_out_loss(trained: Trained, held: Windows, batches: int = 8) -> float:
    """The mean over the first batches of what was held out."""
    trained.model.eval()
    found = [float(trained.model(**trained.batch(held[i])).loss) for i in range(min(batches, len(held)))]
    trained.model.train()
    return sum(trained.mean(found)) / len(found)


def parts(batch: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The rows of a batch as micro-batches: (B, T) -> `number` of (B / number, T)"""
    split = zip(*(np.split(rows, number) for rows in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in split]


def update(trained: Trained, rows: dict[str, Any], plan: Plan, step: int) -> float:
    """The loss of the rows of this process, and one update by all; rate and dropout follow from the step."""
    (seed,) = np.random.SeedSequence([plan.seed, step, rank()]).generate_state(1)
    torch.manual_seed(int(seed))
    for group in trained.optimizer.param_groups:
        group["lr"] = plan.learning_rate * cosine_schedule(step - 1, plan.steps, plan.warmup)
    batches = [trained.batch(part) for part in parts(rows, plan.micro_batches)]
    return train_step(trained.model, trained.optimizer, batches, plan.max_norm or None)


def train(trained: Trained, step: int, data: Windows, held: Windows, plan: Plan, run: Run, losses: Losses) -> int:
    """Train, measure and save; where in the text it is follows from the step, the last of which it returns."""
    first, end, waiting = step + 1, min(run.stop_at, plan.steps), list[float]()
    with progress_bar() as progress:
        task = progress.add_task("", total=plan.steps, completed=step, note="")
        for step in range(first, end + 1):
            waiting.append(update(trained, data[step - 1], plan, step))
            progress.update(task, advance=1)
            if step % run.eval_every == 0 or step == end:
                losses.train += trained.mean(waiting)
                losses.held_out.append((step, held_out_loss(trained, held)))
                waiting.clear()
                progress.update(task, note=f"loss {losses.train[-1]:.3f}, held out {losses.held_out[-1][1]:.3f}")
            if step % run.save_every == 0 or step == end:
                losses.train += trained.mean(waiting)
                waiting.clear()
                write(run.output, plan, losses)  # before the state: losses beyond it are left out when it goes on
                save_state(run.output / "states", trained.model, trained.optimizer, step)
    return step


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def progress_bar() -> Progress:
    """Progress on stderr, of the first process."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress("training", *columns, "{task.fields[note]}", console=Console(stderr=True), disable=rank() > 0)


def write(folder: Path, plan: Plan, losses: Losses) -> None:
    """The losses as JSON and as a picture, by the first process."""
    if rank() == 0:
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
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/pt"), help="Folder for the model.")
@click.option("--model", default="demo", help="Folder or name to start from; its tokenizer has to be the demo's.")
@click.option("--mesh", default="", help='Devices, such as "data=2,fsdp=2,tensor=2"; all of them for data by default.')
@click.option("--compile", "is_compiled", is_flag=True, help="Compile the blocks.")
@click.option("--steps", default=500, type=click.IntRange(1), help="Updates.")
@click.option("--batch-size", default=16, type=click.IntRange(1), help="Windows per update, of all processes together.")
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
def main(mesh: str, is_compiled: bool, goes_on: bool, **options: Any) -> None:
    """Train GPT-2 on a text file, on one device, on a mesh of devices or on several hosts."""
    plan, run = (kind(**{f.name: options[f.name] for f in fields(kind)}) for kind in (Plan, Run))
    if plan.batch_size % plan.micro_batches:
        raise click.ClickException(f"--batch-size {plan.batch_size} is not a multiple of --micro-batches")
    try:
        everyone = join()
        work(plan, run, mesh or everyone, is_compiled, goes_on)
    except GPT2Error as error:
        raise click.ClickException(str(error)) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join() -> str:
    """Meet the other processes that torchrun started, and the mesh in which they share the rows; "" without any."""
    if "RANK" not in os.environ:
        return ""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    return f"data={dist.get_world_size()}"


def prepare_folder(output: Path, goes_on: bool) -> None:
    """Make the output; a run that starts anew must not mix its states with those of another."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--output {output}: expected a folder to write in, found none ({error})") from None
    if not goes_on and saved_steps(output / "states"):
        raise click.ClickException(f"--output {output} has the states of a run; add --resume, or take another folder")


def work(plan: Plan, run: Run, mesh: str, is_compiled: bool, goes_on: bool) -> None:
    """Everything between the options and the model folder."""
    prepare_folder(run.output, goes_on)
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    ids, held_ids = encode(Path(plan.text), tokenizer)
    data, held = (Windows(part, plan.length, plan.batch_size, plan.seed) for part in (ids, held_ids))
    trained = prepare(plan, mesh, is_compiled)
    step, losses = resume(trained, plan, run) if goes_on else (0, Losses([], []))
    step = train(trained, step, data, held, plan, run, losses)
    trained.model.save_pretrained(run.output)
    if rank() == 0:
        tokenizer.save_pretrained(run.output)
        click.echo(f"{run.output}: held-out loss {losses.held_out[-1][1]:.4f} after {step} updates")


if __name__ == "__main__":
    main()
