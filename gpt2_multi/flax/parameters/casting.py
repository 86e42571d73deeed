"""Parameters in another dtype: methods of the drop-in classes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_multi.errors import InputError
from gpt2_multi.flax.parameters.tree import Tree
from gpt2_multi.model.checkpoint.quantized import SCALE


def to_bf16(self: Any, params: Tree | None = None, mask: Any = None) -> Tree:
    """The parameters in bfloat16: the model's own, or those given, where `mask`, a tree of booleans, is True."""
    return cast(self, params, jnp.bfloat16, mask)


def to_fp16(self: Any, params: Tree | None = None, mask: Any = None) -> Tree:
    """The parameters in float16; see `to_bf16`."""
    return cast(self, params, jnp.float16, mask)


def to_fp32(self: Any, params: Tree | None = None, mask: Any = None) -> Tree:
    """The parameters in float32; see `to_bf16`."""
    return cast(self, params, jnp.float32, mask)


def cast(self: Any, params: Tree | None, dtype: Any, mask: Any) -> Tree:
    """The parameters in a dtype, where the mask says so; InputError for a mask that is another tree."""
    flat = flatten_dict(self.fitting(params))
    wanted = dict.fromkeys(flat, True) if mask is None else as_mask(mask)
    if wanted.keys() != flat.keys():
        name = "/".join(map(str, min(wanted.keys() ^ flat.keys(), key=str)))
        raise InputError(f"mask: expected a tree of booleans like the parameters, found {name} in one of them only")
    stays = {path for path, x in flat.items() if x.dtype == jnp.int8 or path[-1].endswith(SCALE)}
    changed = {path for path, is_wanted in wanted.items() if is_wanted} - stays
    return unflatten_dict({path: x.astype(dtype) if path in changed else x for path, x in flat.items()})


def as_mask(mask: Any) -> dict[Any, Any]:
    """A nested dict of booleans, by path."""
    if not isinstance(mask, (dict, FrozenDict)):
        raise InputError(f"mask: expected a nested dict of booleans, found {type(mask).__name__}")
    return flatten_dict(mask)
