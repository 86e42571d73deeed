"""Attention by runs of tokens: documents that stand in a row, and rows without their padding.

Each kernel is called with queries, keys and values, (B, H, T or S, D), the rate of dropout and the scale of the scores,
and gives (B, H, T, D). A run's queries are its last keys, and see those up to their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_multi.errors import InputError
from gpt2_multi.pt.layers import has_values

Kernel = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]

FLASH = "flash_attention_2"
HALVES, DEVICES, WIDEST = (torch.float16, torch.bfloat16), ("cuda",), 256  # what flash-attn computes


def may_ask(x: Tensor) -> bool:
    """Whether what is done may depend on values."""
    return has_values(x) and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def begins(position_ids: Tensor) -> Tensor:
    """Where a document begins: wherever a position is not that after the one before it. (B, T) -> (B, T)"""
    return position_ids.diff(prepend=position_ids[:, :1] - 1) != 1  # as in transformers; a row's first is not counted


def documents(position_ids: Tensor) -> Tensor | None:
    """The number of each token's document in its row, (B, T); None where each row is known to be one."""
    numbers = begins(position_ids).cumsum(-1)
    return None if may_ask(numbers) and not numbers.any() else numbers


def together(numbers: Tensor) -> Tensor:
    """A mask that keeps the keys of a query's own document, (B, T) -> (B, 1, T, T)"""
    return numbers[:, None, :, None] == numbers[:, None, None, :]


def lengths_of(numbers: Tensor) -> list[int]:
    """How many tokens each document has, row after row."""
    starts = F.pad(numbers.diff() != 0, (1, 0), value=True).flatten().nonzero().flatten()
    found: list[int] = starts.diff(append=starts.new_tensor([numbers.numel()])).tolist()
    return found


@dataclass(frozen=True)
class Documents:
    """The fused kernels of PyTorch, for one document after the other."""

    lengths: list[int]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
        options: dict[str, Any] = dict(dropout_p=dropout, is_causal=True, scale=scale)
        parts = zip(*(torch.split(in_a_row(x), self.lengths, 2) for x in (q, k, v)), strict=True)
        found = [F.scaled_dot_product_attention(*part, **options) for part in parts]
        return torch.cat(found, 2).view(q.shape[1], *q.shape[::2], q.shape[3]).transpose(0, 1)


def in_a_row(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (1, H, B * T, D)"""
    return x.transpose(0, 1).flatten(1, 2)[None]


class Runs(NamedTuple):
    """Where runs lie in the tokens of all rows: which tokens are in one (None: all), and where each run begins."""

    queries: Tensor | None
    keys: Tensor | None
    starts: Tensor  # (runs + 1,) int32, in the queries
    key_starts: Tensor
    longest: int
    longest_keys: int

    @classmethod
    def of_documents(cls, numbers: Tensor) -> Runs:
        """Of documents by their numbers, (B, T)."""
        lengths = lengths_of(numbers)
        starts = torch.tensor([0, *lengths], device=numbers.device).cumsum(0).int()
        return cls(None, None, starts, starts, max(lengths), max(lengths))

    @classmethod
    def of_kept(cls, keep: Tensor, past: int) -> Runs:
        """Of rows by what they keep of their keys, (B, S) booleans, of which queries are those from `past` on."""
        parts = [keep[:, past:], keep]
        counts = [part.sum(-1) for part in parts]
        indices = [part.flatten().nonzero().flatten() for part in parts]
        starts = [F.pad(count.cumsum(0), (1, 0)).int() for count in counts]
        most = torch.stack([count.amax() for count in counts]).tolist()
        return cls(*indices, *starts, *most)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Flash:
    """The kernels of the package flash-attn (Dao 2023)."""

    runs: Runs | None  # None: whole rows

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
        package: Any = import_module("flash_attn")
        options: dict[str, Any] = dict(dropout_p=dropout, softmax_scale=scale, causal=True)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T or S, H, D)
        if self.runs is None:
            found: Tensor = package.flash_attn_func(q, k, v, **options)
            return found.transpose(1, 2)
        runs, shape = self.runs, q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if runs.queries is not None and runs.keys is not None:
            q, k, v = q[runs.queries], k[runs.keys], v[runs.keys]
        found = package.flash_attn_varlen_func(
            q, k, v, runs.starts, runs.key_starts, runs.longest, runs.longest_keys, **options
        )
        if runs.queries is not None:
            found = found.new_zeros(shape.numel() // shape[2:].numel(), *shape[2:]).index_copy(0, runs.queries, found)
        return found.view(shape).transpose(1, 2)


def check_implementation(name: str) -> None:
    """What computes attention has one of these names, and flash-attn is installed where it is to."""
    is_flash = name == FLASH
    if name not in ("sdpa", "eager") and not (is_flash and find_spec("flash_attn") is not None):
        how = "install flash-attn for it, on a machine with CUDA (pip install flash-attn), or, since " * is_flash
        raise InputError(
            f'attn_implementation: expected "sdpa" or "eager", found {name!r}; {how}"sdpa" '
            f"{'picks the flash kernel' if is_flash else 'runs the fused kernels'} of PyTorch itself"
            f"{', ' if is_flash else ': '}leave it out"
        )


def check_flash(dtype: torch.dtype, device: torch.device, head_dim: int) -> None:
    """Whether flash-attn can compute what is asked for."""
    hint = 'load the model so, or leave attn_implementation="flash_attention_2" out'
    if dtype not in HALVES:
        raise InputError(f"dtype: flash-attn computes in float16 and bfloat16, found {dtype}; {hint}")
    if device.type not in DEVICES:
        raise InputError(f"device: flash-attn computes on {' or '.join(DEVICES)}, found {device}; {hint}")
    if head_dim > WIDEST:
        raise InputError(f"n_head: flash-attn computes heads up to {WIDEST} wide, found {head_dim}; {hint}")


def kernel(implementation: str, x: Tensor, mask: Tensor | None, numbers: Tensor | None, past: int) -> Kernel | None:
    """What computes the attention of hidden states (B, T, E) by runs of tokens; None where a bias serves."""
    if not may_ask(x) or (mask is not None and mask.dim() != 2):
        return None
    numbers = None if numbers is None else numbers.expand(len(x), -1)
    if implementation != FLASH:
        return None if numbers is None else Documents(lengths_of(numbers))
    if mask is not None and not (keep := mask != 0).all():
        return Flash(Runs.of_kept(keep, past))
    return Flash(None if numbers is None else Runs.of_documents(numbers))
