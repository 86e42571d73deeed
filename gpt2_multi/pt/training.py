"""Losses, optimizer groups, the learning-rate schedule and one training step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_multi.model import inputs
from gpt2_multi.pt.attention import upcast
from gpt2_multi.pt.layers import facts

IGNORED = -100


def cross_entropy(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, items: Tensor | int | None = None
) -> Tensor:
    """The mean negative log-likelihood of the labels that count: (..., K) logits, (...) labels -> ().

    A label counts unless it is -100 or `mask` (...) is 0 there; where none counts the loss is 0. One row may have its
    label alone, (). `items` is how many count in all parts of a batch that is read in parts: the losses of the parts
    add up to its mean.
    """
    labels = batched(labels).to(logits.device).long()
    inputs.check_labels(facts("labels", labels), logits.shape)
    if mask is not None:
        labels = labels.masked_fill(mask.to(labels.device) == 0, IGNORED)
    logits = upcast(logits)
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum().clamp(min=1) if items is None else items)


def lm_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None, items: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy: (..., T, V) logits, (..., T) labels, shifted here.

    A token that the mask hides neither is predicted nor predicts.
    """
    inputs.check_labels(facts("labels", labels), logits.shape)
    kept = None if mask is None else (mask != 0) & (mask.roll(-1, -1) != 0)
    labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)  # the labels move: to cut the logits would copy them
    return cross_entropy(logits, labels, kept, items)


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None, items: Tensor | int | None = None
) -> Tensor:
    """The loss of sequence classification, (B, L) logits: mean squared error, cross-entropy, or binary cross-entropy.

    Without `problem_type`, one label means regression, integer labels one class each, float labels several. `items` is
    as in `cross_entropy`.
    """
    labels, logits = batched(labels).to(logits.device), upcast(logits)
    if problem_type is None:
        single = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else single
    if problem_type == "regression":
        flat = logits.squeeze(-1) if labels.dim() == 1 else logits
        inputs.check_shape("labels", labels.shape, flat.shape)
        return F.mse_loss(flat, labels.to(logits.dtype), reduction="sum") / (labels.numel() if items is None else items)
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels, None, items)
    inputs.check_shape("labels", labels.shape, logits.shape)
    total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return total / (labels.numel() if items is None else items)


def span_loss(start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The loss of extractive question answering: (B, T) logits, (B,) positions; those beyond the text do not count."""

    def one(logits: Tensor, position: Tensor) -> Tensor:
        position = position.to(logits.device)
        outside = (position < 0) | (position >= logits.shape[1])
        return cross_entropy(logits, position.masked_fill(outside, IGNORED))

    return (one(start_logits, start) + one(end_logits, end)) / 2


def batched(labels: Tensor) -> Tensor:
    """A label () alone as that of a batch of one row, (1,); others as they are."""
    return labels[None] if labels.dim() == 0 else labels


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices and embeddings decay, biases and layer norms do not (Radford et al. 2018)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def cosine_schedule(step: int, steps: int, warmup: int = 0, least: float = 0.1) -> float:
    """The factor of the learning rate: linear warm-up, then a cosine down to `least` (Loshchilov and Hutter 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Tensor]],
    max_norm: float | None = 1.0,
) -> float:
    """One update from one or more batches (gradient accumulation), each with labels; returns the mean loss.

    Gradients are averaged over the batches and clipped to `max_norm` (Pascanu et al. 2013).
    """
    batches = list(batches)
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False).loss / len(batches)
        loss.backward()
        total += float(loss.detach())
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return total
