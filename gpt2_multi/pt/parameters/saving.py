"""From parameters to files: what is written of a model, and what makes each array when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gpt2_multi.errors import CheckpointError, shortened
from gpt2_multi.files.arrays import Array, Made
from gpt2_multi.model.checkpoint import Quantized
from gpt2_multi.model.checkpoint.quantized import DTYPE, SCALE
from gpt2_multi.model.checkpoint.saving import Source
from gpt2_multi.model.spelling import TORCH, turned
from gpt2_multi.model.weights import Weight
from gpt2_multi.pt.layers import NUMPY, to_numpy
from gpt2_multi.pt.parameters import quantization
from gpt2_multi.pt.state import (
    State,
    check_kind,
    fetched,
    gather,
    is_callers,
    own,
    rows,
    same,
    scale_of,
    taken,
    write_together,
)


class Written(NamedTuple):
    """What is written of a model: rows of the table, and tensors beside them by their names in the file.

    `beside` are the parts of weights that other programs have quantized, and what a caller's class has besides the
    table; `said` is what torchao says of the former.
    """

    sources: list[Source]
    beside: dict[str, Made]
    said: dict[str, str]

    @property
    def dtype(self) -> str:
        """What config.json says of the parameters: that of the positions, which are never quantized."""
        return self.sources[1][1].name

    def together(self, tensors: Iterable[object], write: Callable[[Self], None]) -> None:
        """Have all processes that have parts of these tensors make what one of them writes; see `write_together`."""

        def made(makes: Sequence[Callable[[], Any]]) -> None:
            each = iter(makes)
            sources = [(*source[:2], next(each)) for source in self.sources]
            beside = {name: (*x[:2], next(each)) for name, x in self.beside.items()}
            write(self._replace(sources=sources, beside=beside))

        write_together(tensors, [make for *_, make in (*self.sources, *self.beside.values())], made)


def written(model: Any, state: State) -> Written:
    """What is written of a model, or of a state dictionary in the place of its own.

    Raises CheckpointError for what a file would lose.
    """
    if state is None:
        check_rows(model)
    packed = quantization.made_by_others(model, state)
    parts, said = quantization.parts_of_torchao(model, state)
    if state is None:
        quantization.check_said(model, said)
    check_tie(model)
    saved = [(name, weight) for name, weight in rows(model).items() if name not in packed and name not in said]
    sources = [source(model, name, weight, state) for name, weight in saved]
    besides = made_of_own(model, state) if is_callers(type(model)) else {}
    return Written(sources, packed | parts | besides, said)


def source(model: Any, name: str, weight: Weight, state: State) -> Source:
    """A row of the table, its dtype, and what makes its array: of one in int8, with its scales."""
    parameter = model.parameter(weight) if state is None else taken(state, name)
    scale = scale_of(model, name)
    if state is not None:
        check_row(name, parameter, in_int8=scale is not None)
    if scale is None:
        if parameter.is_meta:  # offloaded: it is fetched when it is written
            return weight, NUMPY[parameter.dtype], lambda: whole_array(weight, fetched(model, name))
        return weight, NUMPY[parameter.dtype], partial(whole_array, weight, parameter)
    scale = taken(state, name + SCALE, scale)
    return weight, DTYPE, lambda: Quantized(whole_array(weight, parameter), to_numpy(gather(scale).float()))


def check_row(name: str, x: Tensor, in_int8: bool) -> None:
    """What is written of a row are floats, or the integers of this library."""
    expected = "int8" if in_int8 else "floats"
    fits = x.dtype == torch.int8 if in_int8 else x.dtype in NUMPY and not quantization.is_of_torchao(x)
    check_kind(name, expected if fits else quantization.kind_of(x), expected)


def whole_array(weight: Weight, x: Tensor) -> Array:
    """A row of the table from its parameter, which is gathered: one that is cut by heads has dimensions apart."""
    found = gather(x.detach())
    return TORCH.layout(weight, to_numpy(found.flatten(0, 1) if found.dim() > len(weight.shape) else found))


def made_of_own(model: Any, state: State) -> dict[str, Made]:
    """What is its own, to be written; of a model that is split all processes make each together."""
    found: dict[str, Made] = {}
    for name, parameter in own(model).items():
        x = taken(state, name, parameter).detach()
        dtype = to_numpy(torch.empty(0, dtype=x.dtype)).dtype
        shape = turned(name, torch.empty(x.shape, device="meta")).shape
        make = partial(_offloaded, model, name) if state is None and x.is_meta else partial(_array, name, x)
        found[name] = dtype, tuple(shape), make
    return found


def _array(name: str, x: Tensor) -> Array:
    return to_numpy(turned(name, gather(x)).contiguous())


def _offloaded(model: Any, name: str) -> Array:
    return _array(name, fetched(model, name))


def check_tie(model: Any) -> None:
    """A head that is to be the token embedding is written once: it may not differ."""
    head, embedding = getattr(getattr(model, "lm_head", None), "weight", None), model.body.wte.weight
    if not model.config.tie_word_embeddings or head is None:
        return
    if model.head == "base" and head.shape != embedding.shape:  # of a class of a caller's, which only calls it so
        return
    if head is not embedding and not same(head, embedding):
        raise CheckpointError(
            "lm_head.weight differs from wte.weight although config.tie_word_embeddings is true, and a file would "
            "lose it; set tie_word_embeddings to False, or call tie_weights()"
        )


def check_rows(model: Any) -> None:
    """A file keeps the table, and what a class has besides; what else somebody put into a model would be lost."""
    named = dict(model.named_parameters(remove_duplicate=False))
    is_whole = all(name in named for name in rows(model))
    if (extra := list(own(model))) and not (is_whole and is_callers(type(model))):
        raise CheckpointError(
            f"save_pretrained: {shortened(', '.join(extra))} of {type(model).__name__} is none of GPT-2's tensors, "
            "and a file would lose it; make it in the __init__ of a class of your own, or use "
            "torch.save(model.state_dict(), path) and load_state_dict"
        )
