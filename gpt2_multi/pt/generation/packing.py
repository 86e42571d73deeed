"""Weights in the order in which oneDNN reads them, copied for a generation and kept a while for the next one.

A copy serves as long as its weight has the same bits: whoever writes through `.data` counts no version. `IDLE` seconds
after the last generation of a model its copies are freed, whatever became of it, and their memory is given back.
"""

from __future__ import annotations

import os
import time
import weakref
from math import inf
from threading import RLock, Timer
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpt2_multi.pt.layers import fingerprint, give_back, packed

IDLE = 20.0  # seconds
LEAST = 32  # tokens to come, above which it is worth the time to pack for many rows; for one, twice as many
MOST = 2**31  # bytes of weights, above which a second copy is no small matter
ROWS = 8  # which oneDNN is told to pack for; what it makes then is quick at 1 as at 512
_LOCK = RLock()


class Copies:
    """The packed weights of a model, and what it was asked for lately."""

    def __init__(self) -> None:
        self.weights: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()  # with their prints
        self.users = self.tokens = 0
        self.last = -inf  # when it was asked
        self.timer: Timer | None = None

    def ask(self, tokens: int) -> int:
        """How many tokens were asked for, these included, with less than `IDLE` seconds between them."""
        now = time.monotonic()
        self.tokens = tokens + (self.tokens if now - self.last < IDLE else 0)
        self.last = now
        return self.tokens

    def free(self) -> None:
        """Drop the copies, unless somebody has begun to use them."""
        with _LOCK:
            if self.users:
                return
            self.weights.clear()
        give_back()


class Loan:
    """The use of a model's copies, for as long as anybody refers to it."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        copies.users += 1
        weakref.finalize(self, returned, copies).atexit = False

    def packed(self, layer: Any) -> Tensor:
        """A layer's weight, packed anew where its bits have changed."""
        weight = layer.weight.detach()
        with _LOCK:
            found, kept = fingerprint(words(weight)), self.copies.weights.get(layer)
            if kept is None or kept[0].dtype != found.dtype or not torch.equal(kept[0], found):
                kept = self.copies.weights[layer] = found, pack(weight)
            return kept[1]


def returned(copies: Copies) -> None:
    """One user less; after the last the copies wait for another."""
    with _LOCK:
        copies.users -= 1
        if copies.timer is not None:
            copies.timer.cancel()
        copies.timer = Timer(IDLE, copies.free)
        copies.timer.daemon = True
        copies.timer.start()


_KEPT: WeakKeyDictionary[nn.Module, Copies] = WeakKeyDictionary()


def borrow(model: Any, rows: int, room: int) -> Loan | None:
    """Packed weights for a loop of `room` steps of so many rows, where it is quicker with them, the packing counted."""
    if sum(x.nbytes for x in model.parameters()) > MOST or (rows == 1 and model.config.quantization is not None):
        return None
    with _LOCK:
        copies = _KEPT.setdefault(model, Copies())
        return Loan(copies) if copies.ask(room) > LEAST * (1 + 1 / rows) else None


def words(weight: Tensor) -> Tensor:
    """A weight as it lies, in integers of 8 bytes if it is made of such."""
    weight = weight if weight.is_contiguous() else weight.mT  # as a mapped file has it
    is_whole = weight.is_contiguous() and weight.shape[-1] * weight.itemsize % 8 == 0
    return weight.view(torch.int64) if is_whole else weight


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's order."""
    if weight.dtype == torch.int8:
        return packed(weight)
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def forget() -> None:
    """Begin without copies in a process that was forked, in which no timer runs."""
    _KEPT.clear()
    _LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=forget)
