"""The model card of a run: words around numbers that it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_multi.app.train.plan import BETAS, LORA_SCALE, Plan
from gpt2_multi.app.train.report.metrics import Metrics, Point
from gpt2_multi.app.train.report.progress import duration
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import parameter_count

CARD = """---
pipeline_tag: text-generation
tags: [gpt2, gpt2-multi]
{base}---

# {title}

{start}. `gpt2-multi train` wrote this card from what it measured, and writes it anew at each save.

```sh
gpt2-multi generate "Once" --model {name}
```

## Data

{data}

## Model

{model}

## Training

{training}

{picture}## Result

{result}

{curve}
"""


def card(name: str, begun: Mapping[str, Any], plan: Plan, config: GPT2Config, metrics: Metrics) -> str:
    """The card of a run in a folder of a name; `begun` says what it began from, and on what it was computed."""
    model, is_new = shown(begun["model"]), begun["is_new"]
    kind = "low-rank adapters of" if plan.lora else "all weights of"
    start = "Trained from random weights" if is_new else f"Fine-tuned: {kind} `{model}`"
    return CARD.format(
        base=f"base_model: {begun['hub']}\n" if begun["hub"] else "",
        title=name,
        name=name,
        start=start,
        data=table(data_rows(begun)),
        model=table(model_rows(config)),
        training=table(training_rows(begun, plan, metrics)),
        picture="![The losses over the steps](curve.svg)\n\n" if begun["has_curve"] else "",
        result=result(metrics),
        curve=curve(metrics.points),
    )


def shown(name: str) -> str:
    """A name for strangers, who need not know where on this machine a file is."""
    return Path(name).name if Path(name).is_absolute() else name


def table(rows: Mapping[str, Any]) -> str:
    """A table of two columns."""
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def data_rows(begun: Mapping[str, Any]) -> dict[str, str]:
    """What the card says about the data."""
    held = f"the last {begun['held']:,} tokens" if begun["held"] else "nothing"
    held = f"`{shown(begun['val'])}`" if begun["val"] else held
    return {
        "sources": ", ".join(f"`{shown(source)}`" for source in begun["data"]),
        "tokens": f"{begun['tokens']:,}",
        "held out": held,
        "tokenizer": f"`{shown(begun['tokenizer'])}`",
    }


def model_rows(config: GPT2Config) -> dict[str, str]:
    """What the card says about the model."""
    return {
        "parameters": f"{parameter_count(config):,}",
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.n_embd}",
        "positions": f"{config.n_positions:,}",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "dropout": f"embeddings {config.embd_pdrop}, residuals {config.resid_pdrop}, attention {config.attn_pdrop}",
    }


def training_rows(begun: Mapping[str, Any], plan: Plan, metrics: Metrics) -> dict[str, str]:
    """What the card says about the training."""
    seen = metrics.steps * plan.batch_size * plan.length
    adapters = {"adapters": f"rank {plan.lora}, scale {LORA_SCALE}"} if plan.lora else {}
    return {
        "steps": f"{metrics.steps:,} of {plan.steps:,}, each on {plan.batch_size} windows of {plan.length} tokens",
        "tokens": f"{seen:,}, {seen / begun['tokens']:.2f} times the data",
        "optimizer": f"AdamW, betas {BETAS[0]} and {BETAS[1]}, weight decay {plan.weight_decay}",
        "gradients": f"clipped to norm {plan.max_norm}" if plan.max_norm else "not clipped",
        "learning rate": f"{plan.learning_rate:.3g} after {plan.warmup:,} steps of warm-up, then a cosine to a tenth",
        **adapters,
        "computed in": plan.dtype,
        "seed": str(plan.seed),
        "framework": begun["framework"],
        "time": f"{duration(metrics.seconds)} on {begun['device']}",
    }


def result(metrics: Metrics) -> str:
    """Which step was best, and that the weights are the last."""
    best, points = metrics.best, metrics.points
    if not points:
        return "Nothing was measured yet."
    if best is None or best.held_out is None or points[-1].held_out is None:
        return "Nothing was held out, so that no loss says what the model makes of a text that it has not seen."
    said = f"The weights are those of step {metrics.steps:,}. "
    said += f"The held-out loss of step {points[-1].step:,} was {points[-1].held_out:.4f} per token."
    if best.step != points[-1].step:
        said += f" It was the least at step {best.step:,}: {best.held_out:.4f}."
    return said


def curve(points: Sequence[Point], most: int = 20) -> str:
    """The losses as a table of at most so many rows, the last among them."""
    if not points:
        return ""
    every = -(-len(points) // most)
    rows = [
        f"| {step:,} | {train:.4f} | {'' if held is None else f'{held:.4f}'} |"
        for step, train, held in points[::-1][::every][::-1]
    ]
    return "\n".join(["| step | training loss | held-out loss |", "|---:|---:|---:|", *rows])
