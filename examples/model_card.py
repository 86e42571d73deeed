"""The curve of a training run, and the model card: words around numbers that the run measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_multi.app.train.report.card import table

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 300, 48, 16, 544, 262
COLOURS = {"held_out": "#c2410c", "train": "#1d4ed8"}
LABELS = {"held_out": "held-out text", "train": "training text, under dropout"}
# By their sha256: what only a person can know about a text.
KNOWN_TEXTS = {
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed": (
        "Tiny Shakespeare, parts of William Shakespeare's plays in one file. The plays are in the public domain; the "
        "weights come under the licence of the library (MIT)"
    )
}

CARD = """# A small GPT-2

{parameters:,} parameters, trained from nothing on one text by `examples/train_demo.py`, which wrote this card
from what it measured. The model shows the library at work without a network, and is good for nothing else.

## Text

`{text[name]}`: {text[bytes]:,} bytes, {text[lines]:,} lines, sha256 `{text[sha256]}`. {origin}.

The last {text[held_out_bytes]:,} bytes were held out: neither the tokenizer nor the model learned from them.

## Model

{model_table}

## Training

{training_table}

![The losses over the updates](curve.svg)

## Result

The weights are those of update {best_step:,}, where the held-out loss was the least.

{result_table}

Samples ({options}):

{quotes}

## Limits

- It has read nothing but this text. The loss on the part that it learned from is {gap:.2f} below the held-out one.
- {known_words:.0%} of the words in the samples are words of the text that it learned from; the others it made up.
- The longest passage that a sample shares with that text has {longest_copy} characters.
- A prompt and its continuation have room in {model[n_positions]} tokens together; more is refused.
"""


@dataclass(frozen=True)
class Point:
    """What one evaluation saw, per token."""

    step: int
    train: float  # the mean since the last evaluation, under dropout
    held_out: float


@dataclass
class Curve:
    """The losses of a run."""

    points: list[Point] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, point: Point) -> bool:
        """Note an evaluation; whether it is the best so far."""
        self.points.append(point)
        return self.best is point

    @property
    def best(self) -> Point:
        """The evaluation with the least held-out loss."""
        return min(self.points, key=lambda point: point.held_out)


def known_words(samples: Mapping[str, str], text: str) -> float:
    """The share of the samples' words that the text has too."""
    known = set(re.findall(r"[\w']+", text))
    words = [word for sample in samples.values() for word in re.findall(r"[\w']+", sample)]
    return sum(word in known for word in words) / max(len(words), 1)


def longest_copy(samples: Mapping[str, str], text: str) -> int:
    """The length of the longest passage of a sample that stands in the text, in characters."""
    longest = 0
    for sample in samples.values():
        for start in range(len(sample)):
            while start + longest < len(sample) and sample[start : start + longest + 1] in text:
                longest += 1
    return longest


def draw(points: Sequence[Mapping[str, Any]]) -> str:
    """The two losses over the updates, as an SVG."""
    losses = [point[name] for point in points for name in COLOURS]
    low, high, last = min(losses), max(losses), points[-1]["step"]
    scale = (BOTTOM - TOP) / (high - low or 1)

    def place(step: int, loss: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * step / last, BOTTOM - (loss - low) * scale

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for loss in (low, (low + high) / 2, high):
        _, y = place(0, loss)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
    for row, name in enumerate(COLOURS):
        line = " ".join("{:.1f},{:.1f}".format(*place(point["step"], point[name])) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        y = TOP + 16 + 18 * row
        parts.append(f'<text x="{RIGHT - 8}" y="{y}" text-anchor="end" fill="{COLOURS[name]}">{LABELS[name]}</text>')
    parts.append(f'<text x="{RIGHT}" y="{HEIGHT - 20}" text-anchor="end">{last:,} updates</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 20}">loss per token</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
    return head + 'font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"


def quoted(samples: Mapping[str, str]) -> str:
    """Samples, each under its prompt, fenced by more backticks than any text has."""
    return "\n\n".join(f"Prompt `{prompt}`:\n\n````text\n{text.strip()}\n````" for prompt, text in samples.items())


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write curve.svg and README.md from what training.json holds."""
    (folder / "curve.svg").write_text(draw(facts["curve"]), encoding="utf-8")
    (folder / "README.md").write_text(card(facts), encoding="utf-8")


def card(facts: Mapping[str, Any]) -> str:
    """The model card."""
    return CARD.format(
        **facts,
        origin=KNOWN_TEXTS.get(facts["text"]["sha256"], "Its licence is not known to the script"),
        model_table=table(model_rows(facts)),
        training_table=table(training_rows(facts)),
        result_table=table(result_rows(facts["loss"])),
        options=", ".join(f"{name} {value}" for name, value in facts["sampling"].items()),
        quotes=quoted(facts["samples"]),
        gap=facts["loss"]["held_out"] - facts["loss"]["train"],
    )


def model_rows(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says about the model."""
    size = facts["model"]
    return {
        "layers, heads, width, MLP": ", ".join(str(size[name]) for name in ("n_layer", "n_head", "n_embd", "n_inner")),
        "positions": size["n_positions"],
        "vocabulary": f"{size['vocab_size']:,} tokens of byte-level BPE",
        "bytes per token": f"{facts['text']['bytes_per_token']:.2f} on the held-out text",
        "weights": f"{facts['file_bytes']:,} bytes, stored in float16",
    }


def training_rows(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says about the training."""
    text, size, plan = (facts[name] for name in ("text", "model", "plan"))
    seen = plan["steps"] * plan["batch_size"] * size["n_positions"]
    cores = "one CPU core" if plan["threads"] == 1 else f"{plan['threads']} CPU cores"
    return {
        "updates": f"{plan['steps']:,}, each on {plan['batch_size']} windows of {size['n_positions']} tokens",
        "tokens": f"{seen:,}, {seen / text['tokens']:.1f} times the text's {text['tokens']:,}",
        "optimizer": f"AdamW, betas 0.9 and 0.99, weight decay {plan['weight_decay']}, gradients clipped to norm 1",
        "learning rate": f"{plan['learning_rate']} after {plan['warmup']} updates of warm-up, then a cosine to a tenth",
        "dropout": size["dropout"],
        "first weights": f"standard deviation {size['initializer_range']}",
        "seed": plan["seed"],
        "time": f"{facts['minutes']:.1f} minutes on {cores}, evaluations included",
    }


def result_rows(loss: Mapping[str, float]) -> dict[str, str]:
    """What the card says about the losses."""
    return {
        "held-out loss": f"{loss['held_out']:.3f} per token",
        "the same, per byte": f"{loss['bits_per_byte']:.3f} bits",
        "before the rounding to float16": f"{loss['held_out_float32']:.3f} per token",
        "loss on text that it learned from": f"{loss['train']:.3f} per token",
    }
