"""What decides the losses of a training run. A run that goes on has to have the same plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gpt2_multi.errors import CheckpointError

# What a command line leaves open. Steps are those of the epochs, but no more than MOST.
LENGTH, EPOCHS, MOST, HELD_OUT, DECAY, NORM = 1024, 5, 1000, 0.05, 0.1, 1.0
WARMUP, EVALUATIONS = 20, 10  # parts of the steps
BETAS, EPSILON = (0.9, 0.95), 1e-8  # of AdamW, as those who trained GPT-3 had them
LEAST_RATE = 0.1  # of the learning rate, at the end of the cosine
LORA_SCALE = 2  # what the product of two adapters is multiplied by: alpha / rank
LORA_LAYERS = ("c_attn", "c_proj", "c_fc")  # the kernels that get adapters
DROPOUTS = ("embd_pdrop", "resid_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Plan:
    """How to train. A batch is of all processes together, and is computed in `accumulate` parts."""

    backend: str
    dtype: str  # float32, float64, or bfloat16: then weights stay in float32
    data: str  # what says of the tokens that they are the same
    steps: int
    batch_size: int
    accumulate: int
    length: int
    learning_rate: float
    warmup: int
    weight_decay: float
    max_norm: float  # 0: gradients are not clipped
    lora: int  # the rank of the adapters, 0 for none: then all weights are trained
    seed: int
    dropout: float | None = None  # None: that of the model
    device: str = ""  # as the backend names it; its fastest kind where it is empty
    mesh: str = ""  # such as data=2,fsdp=4

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0: linear warm-up, then a cosine (Loshchilov and Hutter 2017)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.learning_rate * (LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))

    @property
    def settings(self) -> dict[str, Any]:
        """What of the model's configuration the plan says."""
        return {} if self.dropout is None else dict.fromkeys(DROPOUTS, self.dropout)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """From what `to_dict` made; CheckpointError where something else was saved."""
        names = {field.name for field in fields(cls)}
        if names != values.keys():
            wrong = ", ".join(sorted(names ^ values.keys()))
            raise CheckpointError(f"plan: expected the fields of this version, found others ({wrong}); start anew")
        return cls(**values)
