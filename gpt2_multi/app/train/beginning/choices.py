"""What a command line leaves open: the plan that fits a model and its data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpt2_multi.app.train.data.windows import Windows
from gpt2_multi.app.train.plan import DECAY, EPOCHS, EVALUATIONS, LENGTH, MOST, NORM, WARMUP, Plan
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import parameter_count

TOKENS, ROWS = 2048, 4  # of a batch at least
SHORTEST = 8  # tokens of a window that nobody chose
NAMED = ("model", "tokenizer", "val")  # options that may be paths


@dataclass(frozen=True)
class Asked:
    """The options of the command, under their names; what is None was not given."""

    data: tuple[str, ...] = ()
    model: str | None = None
    tokenizer: str | None = None
    field: str | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    mesh: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    length: int | None = None
    accumulate: int | None = None
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float | None = None
    max_norm: float | None = None
    dropout: float | None = None
    lora: int | None = None
    val: str | None = None
    val_fraction: float | None = None
    eval_every: int | None = None
    save_every: int | None = None
    seed: int | None = None
    log: str | None = None

    def located(self) -> Asked:
        """The same with whole paths of what is there, so that a run goes on from any folder."""
        names: dict[str, Any] = {
            name: _located(found) for name in ("model", "tokenizer", "val") if (found := getattr(self, name))
        }
        return replace(self, data=tuple(map(_located, self.data)), **names)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "data": list(self.data)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Asked:
        """From what `to_dict` made."""
        return cls(**{**values, "data": tuple(values["data"])})


def _located(name: str) -> str:
    return str(Path(name).resolve()) if name != "-" and Path(name).exists() else name


MAY_CHANGE = ("device", "mesh", "eval_every", "save_every", "log")  # of a run that goes on
IN_PLAN = {"lr": "learning_rate"} | {field.name: field.name for field in fields(Plan) if field.name != "data"}


def going_on(asked: Asked, saved: Asked, plan: Plan) -> tuple[Asked, Plan]:
    """What a run goes on with: what it began with, but for what may change; CheckpointError names what may not."""
    given = {name: value for name, value in vars(asked).items() if value not in (None, ())}
    changed = replace(saved, **{name: value for name, value in given.items() if name in MAY_CHANGE})
    there = vars(saved) | {name: getattr(plan, field) for name, field in IN_PLAN.items() if name in vars(saved)}
    wrong = [
        f"{option(name)} was {there[name]!r} and is {value!r}"
        for name, value in given.items()
        if name not in MAY_CHANGE and value != there[name]
    ]
    if wrong:
        raise CheckpointError(
            f"--resume: a run goes on as it began, but {'; '.join(wrong)}; leave them out, or start another run, from "
            "the model of this one"
        )
    places = {name: getattr(asked, name) or getattr(plan, name) for name in ("device", "mesh")}
    return changed, replace(plan, **places)


def option(name: str) -> str:
    """How the command line calls a field."""
    return "DATA" if name == "data" else f"--{name.replace('_', '-')}"


def plan_of(asked: Asked, backend: str, config: GPT2Config, is_new: bool, tokens: int, data: str) -> Plan:
    """The plan of a run: of `tokens` to learn from, whose content `data` names."""
    length, batch_size = sizes(asked, config, tokens)
    epoch = len(Windows(range(tokens), length, batch_size))
    epochs = EPOCHS if asked.epochs is None else asked.epochs
    steps = asked.steps or max(1, round(epoch * epochs))
    steps = steps if asked.steps or asked.epochs else min(steps, MOST)
    if (asked.warmup or 0) > steps:
        raise InputError(f"--warmup: expected no more than the {steps} steps of the run, found {asked.warmup}")
    return Plan(
        backend=backend,
        dtype=asked.dtype or "float32",
        data=data,
        steps=steps,
        batch_size=batch_size,
        accumulate=asked.accumulate or 1,
        length=length,
        learning_rate=asked.lr or rate(config, is_new or bool(asked.lora)),
        warmup=asked.warmup if asked.warmup is not None else -(-steps // WARMUP),
        weight_decay=DECAY if asked.weight_decay is None else asked.weight_decay,
        max_norm=NORM if asked.max_norm is None else asked.max_norm,
        lora=asked.lora or 0,
        seed=asked.seed or 0,
        dropout=asked.dropout,
        device=asked.device or "",
        mesh=asked.mesh or "",
    )


def sizes(asked: Asked, config: GPT2Config, tokens: int) -> tuple[int, int]:
    """The length of a window and the windows of a batch; a short text has few and short ones."""
    if asked.length and asked.length > config.n_positions:
        raise InputError(f"--length: the model reads {config.n_positions} tokens, found {asked.length}; choose fewer")
    length = asked.length or min(config.n_positions, LENGTH)
    parts = asked.accumulate or 1
    rows = -(-max(ROWS, TOKENS // length) // parts)  # of a part
    while not asked.batch_size and rows > 1 and (rows * parts + 1) * length > tokens:
        rows //= 2
    batch_size = asked.batch_size or rows * parts
    while not asked.length and length > SHORTEST and (batch_size + 1) * length > tokens:
        length //= 2
    _check_fit(asked, length, batch_size, tokens)
    return length, batch_size


def _check_fit(asked: Asked, length: int, batch_size: int, tokens: int) -> None:
    """Whether the tokens are enough for a batch and one window to spare; InputError names the options that ask more."""
    if (most := max(tokens // length - 1, 0)) >= batch_size:
        return
    shorter = {"batch_size": "a smaller --batch-size", "length": "a shorter --length", "accumulate": "fewer parts"}
    given = [name for name in shorter if getattr(asked, name)]
    least = "" if asked.length else ", the shortest there are"
    raise InputError(
        f"{option([*given, 'data'][0])}: the text to learn from is {tokens} tokens, enough for {most} windows of "
        f"{length}{least}, and a batch has {batch_size}; give {' or '.join(shorter[name] for name in given)}"
        f"{' or ' if given else ''}a longer text"
    )


def rate(config: GPT2Config, is_new: bool) -> float:
    """A learning rate: of random weights and adapters that of Kaplan et al. 2020, equation D.1.

    Of trained weights it is the less the wider they are, 6e-5 for the smallest GPT-2 and 1.4e-5 for the largest.
    """
    best = 0.003239 - 0.0001395 * math.log(parameter_count(config))
    return float(f"{best if is_new else min(best, 6e-5 * (768 / config.n_embd) ** 2):.2g}")


def check_parts(plan: Plan, shares: int) -> None:
    """InputError where a batch has no equal parts, each of which so many processes share."""
    if plan.batch_size % (parts := plan.accumulate * shares):
        what = f"{plan.accumulate} parts" + (f", each for {shares} processes" if shares > 1 else "")
        raise InputError(
            f"--batch-size: expected a multiple of {parts}, for {what}, found {plan.batch_size}; choose another"
        )


def every(given: int | None, steps: int) -> int:
    """How many steps lie between two evaluations, or two saves."""
    return given or max(1, -(-steps // EVALUATIONS))
