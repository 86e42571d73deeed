"""Train the demo model of gpt2_multi from one text file: tokenizer, weights, loss curve and model card, in one run.

    python examples/train_demo.py --text tinyshakespeare.txt --output runs/demo

The result is a folder that every backend loads. Everything the model card says is measured in the run that writes it.
Needs PyTorch, and what learns the merges: pip install "gpt2-multi[pt,train]".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch
from model_card import Curve, Point, known_words, longest_copy, write_card  # beside this script
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from gpt2_multi.app.train.loop import Held
from gpt2_multi.errors import ConfigError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import parameter_count
from gpt2_multi.pt import GPT2LMHeadModel
from gpt2_multi.pt.training import cosine_schedule, parameter_groups, train_step
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

END = "<|endoftext|>"
TEXT = "text/tinyshakespeare.txt"  # of the shared data
HELD_OUT = 0.1  # of the text, its end
DOCUMENT = 8_000  # characters between two end tokens: enough of them to learn the token, few enough to keep context
PROMPTS = ("ROMEO:", "KING")
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 40, "seed": 0}


@dataclass(frozen=True)
class Plan:
    """How to train."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup: int
    eval_every: int
    seed: int


@dataclass(frozen=True)
class Data:
    """A text in two parts, and their ids."""

    path: Path
    learned: str
    held: str
    tokenizer: GPT2Tokenizer
    ids: Tensor
    held_ids: Tensor


def default_text() -> Path:
    """Tiny Shakespeare in the shared folder, which lies beside the repository unless the environment says where."""
    return Path(os.environ.get("GPT2_MULTI_SHARED") or Path(__file__).resolve().parents[2] / "shared") / TEXT


def read_text(path: Path) -> str:
    """The text, or a sentence about why there is none."""
    if not path.is_file():
        raise click.ClickException(f"{path}: there is no such text; give one with --text, or set GPT2_MULTI_SHARED")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{path}: not UTF-8 ({error}); convert it first") from None


def split(text: str) -> tuple[str, str]:
    """The text to train on and the text to hold out, cut between two paragraphs where there are any."""
    cut = int(len(text) * (1 - HELD_OUT))
    cut = text.find("\n\n", cut) + 2 if "\n\n" in text[cut:] else cut
    return text[:cut], text[cut:]


def documents(text: str) -> list[str]:
    """The text in pieces of about `DOCUMENT` characters, each of whole paragraphs."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) > DOCUMENT:
            pieces.append("")
        pieces[-1] += paragraph.strip("\n") + "\n\n"
    return [piece[:-1] for piece in pieces]


def prepare(path: Path, vocab_size: int, length: int) -> Data:
    """Split the text, and encode it with a tokenizer that has learned from the first part only."""
    learned, held = split(read_text(path))
    tokenizer = GPT2Tokenizer.train([learned], vocab_size, model_max_length=length)
    ids, held_ids = encode(tokenizer, documents(learned)), encode(tokenizer, [held])
    if len(ids) < length or not held:
        raise click.ClickException(f"{path}: too short for windows of {length} tokens; give a longer text")
    return Data(path, learned, held, tokenizer, ids, held_ids)


def write_tokenizer(folder: Path, tokenizer: GPT2Tokenizer) -> None:
    """Write GPT-2's own three files: vocab.json, merges.txt and tokenizer_config.json."""
    tokenizer.save_vocabulary(folder)
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    keys = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": tokenizer.model_max_length, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: GPT2Tokenizer, texts: list[str]) -> Tensor:
    """The ids of some texts, each after an end token, which ends the last text and begins the next."""
    return torch.tensor([i for text in texts for i in (tokenizer.eos_token_id, *tokenizer(text).input_ids)])


def configure(tokenizer: GPT2Tokenizer, dropout: float, options: Mapping[str, Any]) -> GPT2Config:
    """The model's configuration; dropout of attention stays off, because on a CPU it has no fused kernel."""
    end, rates = tokenizer.eos_token_id, {"embd_pdrop": dropout, "resid_pdrop": dropout, "attn_pdrop": 0.0}
    try:
        return GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **rates, **options)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, ids: Tensor) -> float:
    """The mean loss per predicted token over a whole text, without dropout."""
    training = model.training
    model.eval()
    total = 0.0
    for part in Held(ids, model.config.n_positions, rows=32):
        x, labels = (torch.from_numpy(part[name]).long() for name in ("input_ids", "labels"))
        total += float(model(x, labels=labels, use_cache=False, num_items_in_batch=1).loss)
    model.train(training)
    return total / (len(ids) - 1)


def batch(ids: Tensor, plan: Plan, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Windows from random places of the text."""
    starts = torch.randint(len(ids) - length + 1, (plan.batch_size,), generator=generator)
    x = torch.stack([ids[start : start + length] for start in starts.tolist()])
    return {"input_ids": x, "labels": x}


def progress_bar() -> Progress:
    """Progress on stderr, so that stdout stays free."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress("training", *columns, "{task.fields[note]}", console=Console(stderr=True))


def train(model: GPT2LMHeadModel, data: Data, plan: Plan, folder: Path) -> Curve:
    """Train, measure every `eval_every` updates, and keep in `folder` the weights with the least held-out loss."""
    generator = torch.Generator().manual_seed(plan.seed)
    groups = parameter_groups(model, plan.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.99), fused=True)
    length, curve, losses, start = model.config.n_positions, Curve(), [], time.perf_counter()
    with progress_bar() as progress:
        task = progress.add_task("", total=plan.steps, note="")
        for step in range(1, plan.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * cosine_schedule(step - 1, plan.steps, plan.warmup)
            losses.append(train_step(model, optimizer, [batch(data.ids, plan, length, generator)]))
            curve.seconds = time.perf_counter() - start
            speed = step * plan.batch_size * length / curve.seconds
            progress.update(task, advance=1, note=f"loss {losses[-1]:.3f}  {speed:,.0f} tokens/s")
            if step % plan.eval_every == 0 or step == plan.steps:
                recent = losses[-plan.eval_every :]
                if curve.add(Point(step, sum(recent) / len(recent), mean_loss(model, data.held_ids))):
                    model.save_pretrained(folder)
                progress.console.print(f"update {step}: held-out loss {curve.points[-1].held_out:.4f}")
    curve.seconds = time.perf_counter() - start
    return curve


def halve(folder: Path, held_out: Tensor, expected: float) -> GPT2LMHeadModel:
    """Store the weights in float16, one rounding of each, once the held-out loss has shown that nothing is lost."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype="float32", param_dtype="float16")
    loss = mean_loss(model, held_out)
    if abs(loss - expected) >= 5e-4:
        raise click.ClickException(f"float16 weights change the held-out loss from {expected:.4f} to {loss:.4f}")
    model.save_pretrained(folder)
    return model


def sample(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, prompt: str) -> str:
    """What the model makes of a prompt, the prompt included."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    new = min(200, model.config.n_positions - ids.shape[1])
    return tokenizer.decode(model.generate(ids, max_new_tokens=new, **SAMPLING)[0], skip_special_tokens=True)


def describe(data: Data) -> dict[str, Any]:
    """What the card says about the text."""
    content = (data.learned + data.held).encode()
    held_bytes = len(data.held.encode())
    return {
        "name": data.path.name,
        "bytes": len(content),
        "lines": content.count(b"\n"),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tokens": len(data.ids),
        "held_out_bytes": held_bytes,
        "bytes_per_token": held_bytes / (len(data.held_ids) - 1),
    }


def losses_of(model: GPT2LMHeadModel, data: Data, before: float) -> dict[str, float]:
    """The losses of the weights as they are stored; on the text that was learned, over as many tokens as held out."""
    loss = mean_loss(model, data.held_ids)
    return {
        "held_out": loss,
        "bits_per_byte": loss * (len(data.held_ids) - 1) / len(data.held.encode()) / math.log(2),
        "held_out_float32": before,
        "train": mean_loss(model, data.ids[: len(data.held_ids)]),
    }


def measure(model: GPT2LMHeadModel, data: Data, curve: Curve, folder: Path) -> dict[str, Any]:
    """What the run found out."""
    samples = {prompt: sample(model, data.tokenizer, prompt) for prompt in PROMPTS}
    return {
        "text": describe(data),
        "parameters": parameter_count(model.config),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
        "minutes": curve.seconds / 60,
        "best_step": curve.best.step,
        "loss": losses_of(model, data, curve.best.held_out),
        "sampling": SAMPLING,
        "samples": samples,
        "known_words": known_words(samples, data.learned),
        "longest_copy": longest_copy(samples, data.learned),
        "curve": [asdict(point) for point in curve.points],
    }


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    default=default_text,
    show_default=f"../shared/{TEXT}",
    help="UTF-8 text to learn.",
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo"), help="Folder for the model.")
@click.option("--vocab-size", default=1024, type=click.IntRange(257), help="Tokens, with 256 bytes and the end token.")
@click.option("--n-positions", default=256, type=click.IntRange(2), help="Length of a window, in tokens.")
@click.option("--n-embd", default=192, help="Width.")
@click.option("--n-layer", default=4, help="Blocks.")
@click.option("--n-head", default=6, help="Attention heads per block.")
@click.option("--n-inner", default=640, help="Width of the MLP.")
@click.option("--initializer-range", default=0.06, help="Standard deviation of the first weights (GPT-2: 0.02).")
@click.option("--dropout", default=0.1, help="Dropout of embeddings and residual branches.")
@click.option("--steps", default=6400, type=click.IntRange(1), help="Updates.")
@click.option("--batch-size", default=4, type=click.IntRange(1), help="Windows per update.")
@click.option("--learning-rate", default=1.5e-3, help="At its highest, after the warm-up.")
@click.option("--weight-decay", default=0.1, help="Of matrices and embeddings.")
@click.option("--warmup", default=200, help="Updates until the learning rate is at its highest.")
@click.option("--eval-every", default=400, type=click.IntRange(1), help="Updates between two held-out losses.")
@click.option("--seed", default=0, help="Of initialisation, batches and dropout.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def main(text: Path, output: Path, vocab_size: int, dropout: float, threads: int, **options: Any) -> None:
    """Train a small GPT-2 on one text file and write a model folder.

    The folder gets config.json, generation_config.json, model.safetensors (float16), vocab.json, merges.txt,
    tokenizer_config.json, training.json (what was measured), curve.svg and README.md (the model card).
    """
    plan = Plan(**{f.name: options.pop(f.name) for f in fields(Plan)})
    torch.set_num_threads(threads)
    torch.manual_seed(plan.seed)
    data = prepare(text, vocab_size, options["n_positions"])
    model = GPT2LMHeadModel(configure(data.tokenizer, dropout, options))
    output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(output, data.tokenizer)
    curve = train(model, data, plan, output)
    model = halve(output, data.held_ids, curve.best.held_out)
    size = {**options, "vocab_size": len(data.tokenizer), "dropout": dropout}
    facts = {"model": size, "plan": {**asdict(plan), "threads": threads}, **measure(model, data, curve, output)}
    (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_card(output, facts)
    click.echo(f"{output}: held-out loss {facts['loss']['held_out']:.3f}")


if __name__ == "__main__":
    main()
