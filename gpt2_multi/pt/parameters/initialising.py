"""First values: parameters that are made without memory, allocated each once, and initialised by the table.

What a class of a caller's has besides the table gets its values from `_init_weights`, which that class may have its own
of. Where a model is made to be filled from files, its rows wait for these without memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt.layers import as_dtype, castable, initialise, replace_parameter
from gpt2_multi.pt.state import check_transformer, own, rows, scale_of

_READING = ContextVar("_READING", default=False)  # files will follow, so that no parameter is filled twice


@contextmanager
def building(self: Any, param_dtype: torch.dtype | str | None) -> Iterator[None]:
    """Make parameters without memory, then allocate each once, in `param_dtype`, and initialise it by the table."""
    device = nn.LayerNorm(1).weight.device  # as whoever moves new parameters elsewhere has it
    device = torch.device("meta") if _READING.get() else device
    with torch.device("meta"):
        yield
    materialise(self, device, as_dtype("param_dtype", param_dtype))


@torch.no_grad()
def materialise(model: Any, device: torch.device, dtype: torch.dtype | None) -> None:
    """Allocate what has no memory yet, floats in `dtype`, and initialise the table's rows."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # `to` and `to_empty` cannot change a fake one
                kept = dtype if dtype is not None and name in castable(module) else parameter.dtype
                replace_parameter(module, name, torch.empty(parameter.shape, dtype=kept, device=device))
    if device.type != "meta":
        initialise_rows(model)


@torch.no_grad()
def initialise_rows(model: Any) -> None:
    """Give each row of the table its first value."""
    for name, weight in rows(model).items():
        initialise(weight, model.parameter(weight), scale_of(model, name))
    freeze(model)


def freeze(model: Any) -> None:
    """Integers do not train, and so the rest of a quantized body does not, unless somebody wants it."""
    if model.config.quantizer is not None:
        model.body.requires_grad_(False)


def unfilled(model_class: Any, config: GPT2Config, given: Mapping[str, Any]) -> Any:
    """A model without memory for the table; a class of a caller's may have more, and take a configuration alone."""
    token = _READING.set(True)
    try:
        model = model_class(config, **given)
    finally:
        _READING.reset(token)
    check_transformer(model)
    tie_linear(model)
    device = nn.LayerNorm(1).weight.device
    for part in model._inside().values():  # another GPT-2, which the files need not have
        if part is not model.body:
            materialise(part, device, None)
    return model


def post_init(self: Any) -> None:
    """What a class of your own calls last in its __init__: its own layers get their first values, and heads tie."""
    done = {f"{path}.{row}" for path, part in self._inside().items() for row in rows(part)}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in own(self) if name not in done):
        self._init_weights(self.get_submodule(path))
    tie_linear(self)


def init_weights(self: Any) -> None:
    """Give every parameter its first value again."""
    if not next(self.parameters()).is_meta:
        initialise_rows(self)
    self.post_init()


@torch.no_grad()
def _init_weights(self: Any, module: nn.Module) -> None:
    """First values of a layer that the table does not have; a class of your own may have others."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.weight.normal_(std=self.config.initializer_range)
    if isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.weight.fill_(1)
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
        module.bias.zero_()
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()


def tie_linear(model: Any) -> None:
    """Tie a head that can be the token embedding, as far as the configuration wants it."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Linear) and head.weight.shape == model.body.wte.weight.shape:
        model.tie_weights()
