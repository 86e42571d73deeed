"""A training step in PyTorch on the CPU, float32, beside transformers: tokens in a second."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import folders, models
from benchmarks.harness import OURS, Row, compare, rounds
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt.training import train_step


def run(config: GPT2Config | None = None, batch: int = 2, length: int = 256, count: int = 5) -> list[Row]:
    """Forward, backward and AdamW on random tokens, without dropout and clipping."""
    config = folders.plain(config)
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    with models.both(config) as pair:
        trainers = {who: Trainer(model, ids) for who, model in zip((OURS, "transformers"), pair, strict=True)}
        what = f"training step, {batch} x {length}"
        seconds = rounds(what, {who: trainer.step for who, trainer in trainers.items()}, count)
    ours, theirs = (torch.tensor(trainer.losses) for trainer in trainers.values())
    if not torch.allclose(ours, theirs, rtol=1e-3):
        what += " (DIFFERENT LOSSES)"
    return compare(what, seconds, "tokens/s", batch * length)


class Trainer:
    """A model, its optimizer and the losses so far."""

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        self.model = model.train()
        self.batch = {"input_ids": ids, "labels": ids}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.losses: list[float] = []

    def step(self) -> None:
        """One update."""
        self.losses.append(train_step(self.model, self.optimizer, [self.batch], max_norm=None))
