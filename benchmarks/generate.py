"""Greedy generation in PyTorch on the CPU, float32, beside transformers: tokens in a second."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import folders, models
from benchmarks.harness import OURS, Row, compare, rounds
from gpt2_multi.config import GPT2Config


def run(
    config: GPT2Config | None = None, batches: Sequence[int] = (1, 8), prompt: int = 32, new: int = 64, count: int = 7
) -> list[Row]:
    """Continue random prompts of `prompt` ids by `new` tokens, for each batch size."""
    config, rows = folders.plain(config), []
    with models.both(config) as (ours, theirs):
        for batch in batches:
            ids = torch.randint(config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch))
            options = {"max_new_tokens": new, "do_sample": False}
            peers = {
                OURS: lambda ids=ids, options=options: ours.generate(ids, **options),
                "transformers": lambda ids=ids, options=options: theirs.generate(
                    ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
                ),
            }
            what = f"generate, batch {batch}"
            if not torch.equal(*(call() for call in peers.values())):
                what += " (DIFFERENT TOKENS)"
            rows += compare(what, rounds(what, peers, count), "tokens/s", batch * new)
    return rows
