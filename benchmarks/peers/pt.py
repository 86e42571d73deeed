"""Peers in PyTorch: this library, and transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.peers.calls import ADAMW, Process, dtype_of

Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], Any]


class PyTorch(Process):
    """A model of PyTorch, and an optimizer from its first update on."""

    model: Any
    step: Step | None = None
    options: ClassVar[dict[str, Any]]  # of every generation

    def updater(self, optimizer: torch.optim.Optimizer) -> Step:
        """From a batch to the loss of an update."""
        return partial(update, self.model, optimizer)

    def generate(self, ids: Any, new: int, options: Any) -> Any:
        return self.model.generate(torch.tensor(ids), max_new_tokens=new, **{**self.options, **options})

    @torch.no_grad()
    def loss(self, ids: Any) -> float:
        return float(self.model(**batch_of(ids)).loss)

    def train(self, ids: Any) -> float:
        if self.step is None:
            # fused as Trainer's default: the other one holds the greatest parameter twice more in its step
            chosen = {"lr": ADAMW["learning_rate"], "weight_decay": ADAMW["weight_decay"], "fused": True}
            self.step = self.updater(torch.optim.AdamW(self.model.train().parameters(), **chosen))
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in self.modes):
            return float(self.step(batch_of(ids)))


def batch_of(ids: Any) -> Batch:
    """A batch as a model takes it."""
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def update(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> torch.Tensor:
    """An update as a loop in plain PyTorch has it."""
    optimizer.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


class Ours(PyTorch):
    """This library."""

    package = "gpt2_multi"
    options: ClassVar = {"do_sample": False, "eos_token_id": None}

    def load(self, folder: Path) -> None:
        from gpt2_multi import GPT2Config
        from gpt2_multi.pt import GPT2LMHeadModel

        if "new" in self.modes:
            self.model = GPT2LMHeadModel(GPT2Config.from_pretrained(folder))
            return
        options = {"quantization": "int8"} if "int8" in self.modes else {"dtype": dtype_of(self.modes)}
        self.model = GPT2LMHeadModel.from_pretrained(folder, **options)

    def updater(self, optimizer: torch.optim.Optimizer) -> Step:
        from gpt2_multi.pt.training import train_step

        more = {"skip_logits": False} if "whole logits" in self.modes else {}
        return lambda batch: train_step(self.model, optimizer, [batch | more], max_norm=None)


class Transformers(PyTorch):
    """transformers."""

    package = "transformers"
    options: ClassVar = {"do_sample": False, "pad_token_id": 0}

    def load(self, folder: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if "new" in self.modes:
            self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder))
            return
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype_of(self.modes))
