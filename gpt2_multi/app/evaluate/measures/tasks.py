"""Tasks: does the model find the right ending, by log-probability, and by log-probability per character and per byte?

The figures are those of EleutherAI's lm_eval: a context and an ending are encoded together, and cut apart where the
context alone would end; what is too long loses its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2_multi.app.evaluate.measures.perplexity import exp
from gpt2_multi.app.evaluate.measures.questions import FORMS, Question, Row
from gpt2_multi.app.evaluate.scorer import Done, Scorer, start_of
from gpt2_multi.errors import InputError, shortened
from gpt2_multi.generation.scoring import Window
from gpt2_multi.model.config import GPT2Config


@dataclass(frozen=True)
class Task:
    """The measure of questions with endings; of LAMBADA's with one, which the model is to write by itself."""

    name: str

    def settled(self, config: GPT2Config) -> Task:
        """The same: a task leaves no choice."""
        return self

    def parse(self, row: Row) -> Question:
        """A row of a file as a question; InputError where it is none."""
        return FORMS[self.name](row)

    def measure(self, questions: Sequence[Question], scorer: Scorer, done: Done = float) -> list[dict[str, Any]]:
        """What the model makes of each question."""
        pairs = [(question.context, f" {ending}") for question in questions for ending in question.endings]
        windows, cut = zip(*(window_of(i, *pair, scorer) for i, pair in enumerate(pairs)), strict=True)
        found, results, at = scorer.scored(windows, done), [], 0
        for question in questions:
            place = slice(at, at + len(question.endings))
            log_probs = [float(each.sum()) for each, _ in found[place]]
            greedy = [bool(likeliest.all()) for _, likeliest in found[place]]
            make = word if self.name == "lambada" else choice
            results.append(make(question, log_probs, greedy) | {"cut": max(cut[place])})
            at += len(question.endings)
        return results

    def summary(self, results: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """The means over all questions, with their standard errors."""
        rows = list(results)
        if not rows:
            raise InputError("data: has no question; give a file of the task")
        cut = {"questions_cut": sum(row["cut"] > 0 for row in rows)}
        if self.name == "lambada":
            acc = mean("acc", [float(row["greedy"]) for row in rows])
            log_prob = mean("x", [row["log_prob"] for row in rows])
            perplexity, error = exp(-log_prob["x"]), log_prob["x_stderr"]
            error = None if error is None else perplexity * error  # by the slope of exp
            return {"documents": len(rows), **acc, "perplexity": perplexity, "perplexity_stderr": error, **cut}
        figures = {"documents": len(rows)}
        for name, field in (("acc", "choice"), ("acc_norm", "choice_norm"), ("acc_bytes", "choice_bytes")):
            figures |= mean(name, [float(row[field] == row["gold"]) for row in rows])
        return figures | cut


def word(question: Question, log_probs: list[float], greedy: list[bool]) -> dict[str, Any]:
    """Of a passage: how likely its last word is, and whether the model would write it."""
    return {"log_prob": log_probs[0], "greedy": greedy[0]}


def choice(question: Question, log_probs: list[float], greedy: list[bool]) -> dict[str, Any]:
    """Of a question: the ending that the model chooses, by itself, per character and per byte; ties go to the first."""
    total = np.array(log_probs)
    characters = [len(ending) for ending in question.endings]
    sizes = [len(ending.encode("utf-8", "surrogatepass")) for ending in question.endings]
    return {
        "gold": question.gold,
        "choice": int(total.argmax()),
        "choice_norm": int((total / characters).argmax()),
        "choice_bytes": int((total / sizes).argmax()),
        "log_probs": log_probs,
    }


def window_of(number: int, context: str, ending: str, scorer: Scorer) -> tuple[Window, int]:
    """An ending behind its context, and how many ids of this there is no room for.

    White space at the end of a context belongs to the ending, and an empty context is the token that begins a text.
    """
    text, most = context.rstrip(), scorer.config.n_positions
    before = scorer.ids(text) if text else []
    after = scorer.ids(context + ending)[len(before) :]
    if not 1 <= len(after) <= most:
        raise InputError(f"endings: expected 1 to {most} tokens, found {len(after)} in {shortened(ending, 40)!r}")
    ids = [*(before or [beginning(scorer.config)]), *after]
    kept = ids[-most - 1 :]
    return Window(number, kept, len(kept) - len(after)), len(ids) - len(kept)


def beginning(config: GPT2Config) -> int:
    """What an ending without a context stands after."""
    start = start_of(config)
    if start is None:
        raise InputError("bos_token_id: the model has no token that begins a text, as an empty context needs; set it")
    return start


def mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The mean of some values and its standard error, that of a sample; None for one value alone."""
    average, count = math.fsum(values) / len(values), len(values)
    spread = math.fsum((x - average) ** 2 for x in values)
    return {name: average, f"{name}_stderr": math.sqrt(spread / (count - 1) / count) if count > 1 else None}
