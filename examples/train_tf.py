"""Train GPT-2 in TensorFlow on a text file: on one device, on several that share the rows, on several hosts.

    python examples/train_tf.py --text tinyshakespeare.txt --output runs/tf

The same on two virtual devices of a CPU; GPUs share the rows without being told:

    python examples/train_tf.py --mesh data=2 ...

The same on two hosts, which see the same folder; on the second one with "index": 1:

    export TF_CONFIG='{"cluster": {"worker": ["host0:1234", "host1:1234"]}, "task": {"type": "worker", "index": 0}}'
    python examples/train_tf.py ...

The output gets the model, its tokenizer, losses.json, losses.png, and under states/ what `--resume` goes on from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from gpt2_multi.app.train.data.windows import Windows
from gpt2_multi.errors import CheckpointError, GPT2Error, InputError
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.model.checkpoint.states import chosen_step
from gpt2_multi.model.weights import mesh_sizes
from gpt2_multi.tf import AdamW, CosineSchedule, TFGPT2LMHeadModel
from gpt2_multi.tf.layers import alone
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


class Trained:
    """A model and its optimizer, whole on each device, and the strategy by which devices share the rows."""

    def __init__(self, plan: Plan, strategy: tf.distribute.Strategy, is_compiled: bool) -> None:
        self.strategy, self.replicas = strategy, int(strategy.num_replicas_in_sync)
        with strategy.scope():
            self.model = TFGPT2LMHeadModel.from_pretrained(plan.model, dtype=plan.dtype, param_dtype="float32")
            rate = CosineSchedule(plan.learning_rate, plan.steps, plan.warmup)
            options: dict[str, Any] = {
                "global_clipnorm": plan.max_norm or None,
                "epsilon": 1e-8,
            }  # as the twins have it
            self.optimizer = AdamW(rate, plan.weight_decay, **options)
            self.optimizer.build(self.model.trainable_variables)
        self.noises = [x for x in self.model.non_trainable_variables if x.name == "seed_generator_state"]
        self.update = tf.function(self._by_all(self._update), jit_compile=is_compiled)
        self.loss = tf.function(self._by_all(self._loss), jit_compile=is_compiled)

    def spread(self, parts: Any) -> Any:
        """The parts of all devices, of which each device of this process gets its own."""
        return self.strategy.experimental_distribute_values_from_function(
            lambda device: tf.constant(parts[device.replica_id_in_sync_group])
        )

    def _by_all(self, function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
        """A function of what `spread` gives: the sum of what each device finds."""
        return lambda *given: self.strategy.reduce("SUM", self.strategy.run(function, given), axis=None)

    def _update(self, ids: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        """One update by the rows of a device, micro-batches (A, B, T): its part of the loss, ()."""
        for number, state in enumerate(self.noises):
            state.assign(tf.cast([noise, number], state.dtype))
        variables = [x.value for x in self.model.trainable_variables]

        def add(part: tf.Tensor, loss: tf.Tensor, sums: list[tf.Tensor]) -> Any:
            with tf.GradientTape() as tape, alone():  # a loop cannot wait for other devices
                mean = self.model(ids[part], labels=ids[part], training=True, skip_logits=True).loss
                mean /= len(ids) * self.replicas  # all have as many labels
            grads = tape.gradient(mean, variables)
            return part + 1, loss + mean, [x + y for x, y in zip(sums, grads, strict=True)]

        start = tf.constant(0), tf.zeros(()), [tf.zeros_like(x) for x in variables]
        _, loss, grads = tf.while_loop(lambda part, *_: part < len(ids), add, start, parallel_iterations=1)
        self.optimizer.apply(grads, self.model.trainable_variables)  # which sums them over the devices, and clips
        return loss

    def _loss(self, ids: tf.Tensor) -> tf.Tensor:
        """The part that the rows of a device, (B, T), have in the loss of all, ()."""
        return self.model(ids, labels=ids, training=False, skip_logits=True).loss


def states(trained: Trained, folder: Path) -> tf.train.CheckpointManager:
    """What writes states, of which the last two stay."""
    both = tf.train.Checkpoint(model=trained.model, optimizer=trained.optimizer)
    return tf.train.CheckpointManager(both, folder, max_to_keep=2, checkpoint_name="step")


def saved_steps(folder: Path) -> list[int]:
    """The steps whose states a folder has; the index of one is written last."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.index"))


def restore_state(trained: Trained, folder: Path) -> int:
    """Be what was saved last, bit by bit; returns its step."""
    step = chosen_step(folder, saved_steps(folder), None)
    try:
        states(trained, folder).checkpoint.restore(folder / f"step-{step}").assert_consumed()
    except (tf.errors.OpError, AssertionError, ValueError) as error:
        line = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{folder}: the state of step {step} is damaged, or of another model ({line}); delete it to go on from the "
            "one before"
        ) from error
    return step


def resume(trained: Trained, plan: Plan, run: Run) -> tuple[int, Losses]:
    """The step of the last state that was saved, and the losses until then."""
    found = read_json(run.output / "losses.json")
    for name, value in asdict(plan).items():
        if (old := found.get("plan", {}).get(name)) != value:
            raise click.ClickException(f"--{name.replace('_', '-')} was {old}, found {value}")
    step = restore_state(trained, run.output / "states")
    return step, Losses(found["train"][:step], [(at, loss) for at, loss in found["held_out"] if at <= step])


def held_out_loss(trained: Trained, held: Windows, batches: int = 8) -> float:
    """The mean over the first batches of what was held out."""
    found = [trained.loss(trained.spread(shares(held[i], 1, trained)[:, 0])) for i in range(min(batches, len(held)))]
    return sum(map(float, found)) / len(found)


def shares(batch: dict[str, Any], number: int, trained: Trained) -> Any:
    """The rows of a batch as micro-batches of each device: (B, T) -> (devices, number, B / number / devices, T)"""
    ids = batch["input_ids"]
    return ids.reshape(number, trained.replicas, -1, ids.shape[1]).swapaxes(0, 1)


def update(trained: Trained, rows: dict[str, Any], plan: Plan, step: int) -> tf.Tensor:
    """The loss of the rows, and one update by all; dropout follows from the step, and the rate by the optimizer."""
    noises = [np.random.SeedSequence([plan.seed, step, i]).generate_state(1)[0] for i in range(trained.replicas)]
    return trained.update(*map(trained.spread, (shares(rows, plan.micro_batches, trained), noises)))


def train(trained: Trained, step: int, data: Windows, held: Windows, plan: Plan, run: Run, losses: Losses) -> int:
    """Train, measure and save; where in the text it is follows from the step, the last of which it returns."""
    first, end, waiting = step + 1, min(run.stop_at, plan.steps), list[Any]()
    kept = states(trained, run.output / "states")
    with progress_bar(trained) as progress:
        task = progress.add_task("", total=plan.steps, completed=step, note="")
        for step in range(first, end + 1):
            waiting.append(update(trained, data[step - 1], plan, step))
            progress.update(task, advance=1)
            if step % run.eval_every == 0 or step == end:
                losses.train += map(float, waiting)
                losses.held_out.append((step, held_out_loss(trained, held)))
                waiting.clear()
                progress.update(task, note=f"loss {losses.train[-1]:.3f}, held out {losses.held_out[-1][1]:.3f}")
            if step % run.save_every == 0 or step == end:
                losses.train += map(float, waiting)
                waiting.clear()
                if is_first(trained):
                    write(run.output, plan, losses)  # before the state: losses beyond it are left out when it goes on
                    kept.save(checkpoint_number=step)
    return step


def is_first(trained: Trained) -> bool:
    """Whether this is the first of the processes, which writes."""
    return bool(trained.strategy.extended.should_checkpoint)


def progress_bar(trained: Trained) -> Progress:
    """Progress on stderr, of the first process."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console, others = Console(stderr=True), not is_first(trained)
    return Progress("training", *columns, "{task.fields[note]}", console=console, disable=others)


def write(folder: Path, plan: Plan, losses: Losses) -> None:
    """The losses as JSON and as a picture."""
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
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/tf"), help="Folder for the model.")
@click.option("--model", default="demo", help="Folder or name to start from; its tokenizer has to be the demo's.")
@click.option("--mesh", default="", help='Devices, such as "data=2"; all GPUs by default.')
@click.option("--compile", "is_compiled", is_flag=True, help="Compile a step by XLA.")
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
    """Train GPT-2 on a text file, on one device, on several that share the rows, or on several hosts."""
    plan, run = (kind(**{f.name: options[f.name] for f in fields(kind)}) for kind in (Plan, Run))
    if plan.batch_size % plan.micro_batches:
        raise click.ClickException(f"--batch-size {plan.batch_size} is not a multiple of --micro-batches")
    try:
        work(plan, run, join(mesh), is_compiled, goes_on)
    except GPT2Error as error:
        raise click.ClickException(str(error)) from None


def join(mesh: str) -> tf.distribute.Strategy:
    """Meet the other processes that TF_CONFIG names; the devices of all, or those that a mesh makes of the CPU."""
    sizes = mesh_sizes(mesh)
    needed = math.prod(sizes.values())
    if needed != sizes["data"]:
        raise InputError(
            f"mesh: expected data alone, as TensorFlow has the whole model on each device, found '{mesh}'; write "
            f"data={needed}, or take train_pt.py or train_flax.py"
        )
    strategy = strategy_of(needed)
    if mesh and needed != strategy.num_replicas_in_sync:
        raise InputError(
            f"mesh: expected the number of devices, {strategy.num_replicas_in_sync}, found '{mesh}'; change it, or "
            "leave it out"
        )
    return strategy


def strategy_of(needed: int) -> tf.distribute.Strategy:
    """All devices of the processes that TF_CONFIG names, all GPUs, or as many virtual devices of the CPU as needed."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    if needed > 1:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * needed)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(needed)])


def check_devices(plan: Plan, devices: int, is_compiled: bool) -> None:
    """Raises InputError where devices cannot share the rows equally, and where XLA would have to wait for others."""
    if (rows := plan.batch_size // plan.micro_batches) % devices:
        raise InputError(
            f"input_ids: expected a number of rows that {devices} devices share equally, found {rows}; change the "
            "batch or the mesh"
        )
    if is_compiled and devices > 1:
        raise InputError(f"--compile: XLA compiles a step of one device, found {devices}; leave it out")


def prepare_folder(output: Path, goes_on: bool) -> None:
    """Make the output; a run that starts anew must not mix its states with those of another."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--output {output}: expected a folder to write in, found none ({error})") from None
    if not goes_on and saved_steps(output / "states"):
        raise click.ClickException(f"--output {output} has the states of a run; add --resume, or take another folder")


def work(plan: Plan, run: Run, strategy: tf.distribute.Strategy, is_compiled: bool, goes_on: bool) -> None:
    """Everything between the options and the model folder."""
    prepare_folder(run.output, goes_on)
    check_devices(plan, strategy.num_replicas_in_sync, is_compiled)
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    ids, held_ids = encode(Path(plan.text), tokenizer)
    data, held = (Windows(part, plan.length, plan.batch_size, plan.seed) for part in (ids, held_ids))
    trained = Trained(plan, strategy, is_compiled)
    step, losses = resume(trained, plan, run) if goes_on else (0, Losses([], []))
    step = train(trained, step, data, held, plan, run, losses)
    if is_first(trained):
        trained.model.save_pretrained(run.output)
        tokenizer.save_pretrained(run.output)
        click.echo(f"{run.output}: held-out loss {losses.held_out[-1][1]:.4f} after {step} updates")


if __name__ == "__main__":
    main()
