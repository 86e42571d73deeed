"""From a mapped file to the parts that processes have of a model: none ever has more than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gpt2_multi.model.spelling import TORCH
from gpt2_multi.model.weights import Weight
from gpt2_multi.pt.layers import contiguous, initialise, to_torch
from gpt2_multi.pt.parameters.sharding import agree
from gpt2_multi.pt.state import rows


def fill(model: Any, arrays: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Give a model that is cut, and has no memory yet, its parameters: of each array, by the table's names, its part.

    What the arrays lack gets its first values.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in rows(model).items():
        old = named[name]
        new = nn.Parameter(_part(model, weight, old, arrays.get(weight.name), dtype), old.requires_grad)
        for other, x in named.items():
            if x is old:
                path, _, leaf = other.rpartition(".")
                setattr(model.get_submodule(path), leaf, new)


def _part(model: Any, weight: Weight, old: DTensor, array: Any, dtype: torch.dtype) -> DTensor:
    device = torch.device(old.device_mesh.device_type)
    if array is None:
        made = initialise(weight, torch.empty(weight.shape, dtype=dtype, device=device))
        agree(made, model.device_mesh)
    found = TORCH.layout(weight, to_torch(array) if array is not None else made).view(old.shape)
    shape, start = compute_local_shape_and_global_offset(old.shape, old.device_mesh, old.placements)
    index = tuple(slice(at, at + length) for at, length in zip(start, shape, strict=True))
    local = contiguous(found[index], dtype).to(device)
    local = local.clone() if local.data_ptr() == found.data_ptr() else local
    return DTensor.from_local(
        local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )
