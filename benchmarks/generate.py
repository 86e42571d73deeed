"""Generation in PyTorch on the CPU, float32, beside transformers: greedy choice, beams, prompt lookup, first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import folders, models
from benchmarks.harness import OURS, Row, compare, rounds
from gpt2_multi.model.config import GPT2Config

LOOKUP = {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 2}


def run(
    config: GPT2Config | None = None,
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 32,
    long: int = 512,
    new: int = 64,
    count: int = 7,
) -> list[Row]:
    """Continue random prompts of `prompt` ids by `new` tokens, for each batch size; of `long` ids by one."""
    config = folders.plain(config)
    with models.both(config) as both:
        rows = [row for batch in batches for row in one(both, f"generate, batch {batch}", batch, prompt, new, count)]
        rows += one(both, "generate, 4 beams", 1, prompt, new, count, num_beams=4)
        rows += one(both, "generate, prompt lookup", 1, prompt, new, count, **LOOKUP)
        rows += one(both, f"first token after {long}", 1, long, 1, count)
    return rows


def one(both: Any, what: str, batch: int, prompt: int, new: int, count: int, **options: Any) -> list[Row]:
    """The rows of one way to generate: tokens in a second, or seconds where there is one token."""
    ours, theirs = both
    vocab = ours.config.vocab_size
    ids = torch.randint(vocab, (batch, prompt), generator=torch.Generator().manual_seed(batch))
    options |= {"max_new_tokens": new, "do_sample": False}
    peers = {
        OURS: lambda: ours.generate(ids, **options),
        "transformers": lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options),
    }
    if not torch.equal(*(call() for call in peers.values())):
        what += " (DIFFERENT TOKENS)"
    unit, amount = ("s", None) if new == 1 else ("tokens/s", batch * new)
    return compare(what, rounds(what, peers, count), unit, amount)
