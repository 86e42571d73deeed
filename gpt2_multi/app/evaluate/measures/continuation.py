"""What a model goes on with: a text behind each document, the one that `gpt2-multi generate` puts behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2_multi.app.evaluate.scorer import Done, Scorer
from gpt2_multi.app.generate.writer import Writer
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config

TOGETHER = 8  # prompts, unless a batch has a size


@dataclass(frozen=True)
class Continuation:
    """Documents as prompts. max_new_tokens: by default as in `generate`. Other options are the model's own."""

    max_new_tokens: int | None = None
    greedy: bool = False
    seed: int | None = None

    name = "generate"

    def settled(self, config: GPT2Config) -> Continuation:
        """The same; InputError where the model has no room for a prompt and what is to follow it."""
        new = self.max_new_tokens
        if new is not None and new >= config.n_positions:
            raise InputError(f"max_new_tokens: expected less than {config.n_positions}, the model's room, found {new}")
        return self

    def parse(self, document: str) -> str:
        """A document is a prompt as it is."""
        return document

    def measure(self, prompts: Sequence[str], scorer: Scorer, done: Done = float) -> list[dict[str, Any]]:
        """Each prompt with what follows it."""
        writer, results, size = self.writer(scorer), list[dict[str, Any]](), scorer.batch_size or TOGETHER
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            for prompt, (text,) in zip(batch, writer.write(batch), strict=True):
                results.append({"prompt": prompt, "completion": text})
            done(len(batch) / len(prompts))
        return results

    def writer(self, scorer: Scorer) -> Writer:
        """The model with its options and those of this run."""
        options: dict[str, Any] = {"do_sample": not self.greedy, "num_return_sequences": 1}
        options |= {"return_dict_in_generate": False, "output_scores": False, "output_logits": False}
        options |= {} if self.greedy else {"prompt_lookup_num_tokens": None}
        options |= {} if self.seed is None else {"seed": self.seed}
        config = scorer.model.generation_config.with_options(options)
        return Writer(scorer.model, scorer.tokenizer, config, self.max_new_tokens)

    def summary(self, results: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """How many documents there were, and how much was written."""
        count = characters = 0
        for result in results:
            count, characters = count + 1, characters + len(result["completion"])
        return {"documents": count, "characters": characters}
