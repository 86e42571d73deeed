"""Losses, optimizer groups, the learning-rate schedule and one training step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.quantized import check_trained
from gpt2_multi.model.outputs import Later
from gpt2_multi.pt.attention import upcast
from gpt2_multi.pt.layers import derived, facts, fingerprint, is_last, is_unchanged, linear, multiply
from gpt2_multi.pt.state import is_offloaded

IGNORED = -100
ADAPTERS = "train what peft.get_peft_model adds to it"
OFFLOADED = (
    "device_map: expected a model of which something trains, found an offloaded one, whose weights are frozen; load it "
    f"in one place, or {ADAPTERS}"
)
# Bytes of logits at a time: of each chunk the gradient of the head is read and written once, and what multiplies more
# quickly for a byte that it reads needs more rows.
CHUNK = {"cpu": 2**26, "others": 2**30}
BLOCK = 1024  # words at a time, on a CPU: a part of a gradient that stays in its cache while it is added


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
    return cross_entropy(logits, shifted(labels, mask), None, items)  # to cut the logits would copy them


def shifted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """What each position has to predict, (..., T), -100 where nothing counts; see `lm_loss`."""
    following = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    if mask is None:
        return following
    keep = mask.to(labels.device) != 0
    return following.masked_fill(~(keep & keep.roll(-1, -1)), IGNORED)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    items: Tensor | int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What `lm_loss` gives of the logits of a head, of (..., T, E) hidden states and its weight (V, E).

    The logits are computed a chunk of rows at a time, and with them the gradients, so that they are never there as a
    whole. `dtype` is that of the products, by default that of the hidden states.
    """
    inputs.check_labels(facts("labels", labels), (*hidden.shape[:-1], len(weight)))
    targets = shifted(labels, mask).to(hidden.device).long().flatten()
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    total: Tensor = HeadLoss.apply(hidden.flatten(0, -2), weight, targets, dtype or hidden.dtype)  # type: ignore[no-untyped-call]
    return total / ((targets != IGNORED).sum().clamp(min=1) if items is None else items)


class HeadLoss(torch.autograd.Function):
    """The sum over rows of -log p(target): `apply(hidden (N, E), weight (V, E), targets (N,), dtype)` -> ().

    A target of -100 does not count. The gradients are made beside the loss, and wait for the factor of the backward
    pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.dtype = dtype
        with torch.autocast(hidden.device.type, enabled=False):
            total, ctx.gradients = walk(hidden, weight.to(dtype), targets, ctx.needs_input_grad[:2])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # it is to be derived once more
            return *derived(partial(whole_loss, targets, ctx.dtype), (hidden, weight), wanted, grad), None, None
        gradients = ctx.gradients
        if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
            gradients = [None if x is None else x.clone() for x in gradients]  # for another backward pass
        else:
            ctx.gradients = None  # what nobody else holds, autograd adds to in place
        times = Tensor.mul_ if is_last(grad) else Tensor.mul  # of vmap there are many
        scaled = [None if x is None else times(x, grad) for x in gradients]
        return scaled[0], None if scaled[1] is None else scaled[1].to(weight.dtype), None, None


def whole_loss(targets: Tensor, dtype: torch.dtype, hidden: Tensor, weight: Tensor) -> Tensor:
    """The sum that is `HeadLoss`, of all logits."""
    logits = upcast(F.linear(hidden.to(dtype), weight.to(dtype)))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def walk(hidden: Tensor, weight: Tensor, targets: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The sum that is `HeadLoss`, and its gradients of hidden states and weight, as far as they are wanted."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total, at_once = torch.zeros((), dtype=wide, device=hidden.device), chunk_rows(hidden, weight)
    room = torch.empty(at_once, len(weight), dtype=wide, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = (torch.empty if len(hidden) else torch.zeros)(weight.shape, dtype=wide, device=hidden.device)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(weight), BLOCK)] if hidden.is_cpu else [slice(None)]
    for start in range(0, len(hidden), at_once):
        rows = slice(start, start + at_once)
        x = hidden[rows].to(weight.dtype)
        logits = room[: len(x)]
        for block in blocks:
            logits[:, block] = multiply(x, weight[block])
        total += turn(logits, targets[rows])
        gradient = logits.to(weight.dtype)
        if of_hidden is not None:
            of_hidden[rows] = multiply(gradient, weight.t())
        for block in blocks if wanted[1] else ():
            part = multiply(gradient[:, block].t(), x.t())
            of_weight[block].add_(part) if start else of_weight[block].copy_(part)
    return total, [of_hidden, of_weight if wanted[1] else None]


def turn(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the losses of a chunk, (N, V) and (N,) -> (), whose logits become its gradient of them, in place."""
    counted = targets != IGNORED
    at = targets.where(counted, 0)[:, None]
    logits.sub_(logits.amax(-1, keepdim=True))
    chosen = logits.gather(-1, at)
    sums = logits.exp_().sum(-1, keepdim=True)
    kept = counted[:, None].to(logits.dtype)
    logits.mul_(kept / sums).scatter_add_(-1, at, -kept)
    return (sums.log() - chosen).where(counted[:, None], 0).sum()


def chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """How many of the rows of (..., E) hidden states have their logits at once, in chunks of about one size."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = hidden.numel() // max(hidden.shape[-1], 1)
    most = max(1, CHUNK["cpu" if hidden.is_cpu else "others"] // (len(weight) * wide.itemsize))
    return math.ceil(rows / math.ceil(rows / most)) if rows else 1


def later_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Later:
    """The logits of `head_loss` when they are asked for, if hidden states and weight are then what they are now."""
    before = [(x, x.shape, x.dtype, x.device, fingerprint(x)) for x in (hidden, weight)]
    is_recorded, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def logits() -> Tensor:
        with (
            torch.inference_mode(is_inference),
            torch.set_grad_enabled(is_recorded),
            torch.autocast(hidden.device.type, enabled=False),
        ):
            return linear(hidden.to(dtype), weight.to(dtype))

    return Later(logits, lambda: not all(is_same(*known) for known in before))


def is_same(x: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device, bits: Tensor) -> bool:
    """Whether a tensor is as it was, of which nothing counts all changes."""
    return (x.shape, x.dtype, x.device) == (shape, dtype, device) and torch.equal(fingerprint(x), bits)


class Untrained(torch.autograd.Function):
    """A loss that nothing trains by: `apply(loss, a tensor with a gradient, what it is of)`; `backward` says so."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, asked: Tensor, found: str) -> Tensor:
        ctx.found = found
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        if ctx.found == OFFLOADED:
            raise InputError(OFFLOADED)
        check_trained(False, ADAPTERS, ctx.found)
        return None, None, None


def trained(model: Any, loss: Tensor) -> Tensor:
    """The loss of a model, by which a quantized or an offloaded one is not trained in silence."""
    is_asked = model.training and torch.is_grad_enabled() and not loss.requires_grad
    if not is_asked or torch.compiler.is_compiling() or not is_unchanged(loss):
        return loss
    found = frozen(model)
    if found is None:
        return loss
    asked = torch.zeros((), device=loss.device, requires_grad=True)
    return Untrained.apply(loss, asked, found)  # type: ignore[no-untyped-call]


def frozen(model: Any) -> str | None:
    """What kind of a model this is, if it is one of those whose weights are frozen from the start."""
    if model.config.quantizer is not None:
        own = model.config.quantizer == "gpt2-multi"
        return "one in int8" if own else f"one that {model.config.quantizer} has quantized"
    return OFFLOADED if is_offloaded(model) else None


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
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # the biases of a fused projection that is cut by heads have two dimensions
            groups[parameter.dim() >= 2 and name.rpartition(".")[2] != "bias"].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


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
    found = list(model.parameters())
    quantized = {torch.int8: "one in int8", torch.uint8: "one in 4 bits"}
    kinds = [quantized[x.dtype] for x in found if x.dtype in quantized]
    check_trained(not kinds or any(x.requires_grad for x in found), ADAPTERS, *kinds[:1])
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
