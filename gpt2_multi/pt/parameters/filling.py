"""From files into parameters: what is read becomes a model's own, row by row, or in parts where it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2_multi.files import arguments
from gpt2_multi.files.arrays import Array
from gpt2_multi.files.folders import PathLike
from gpt2_multi.model import checkpoint
from gpt2_multi.model.checkpoint import Loaded, Quantized
from gpt2_multi.model.checkpoint.quantized import SCALE, quantize
from gpt2_multi.model.config import SETTINGS
from gpt2_multi.model.spelling import TORCH, turned
from gpt2_multi.model.weights import Weight
from gpt2_multi.pt.layers import contiguous, initialise, to_numpy, to_torch
from gpt2_multi.pt.parameters import quantization
from gpt2_multi.pt.parameters.initialising import freeze
from gpt2_multi.pt.state import cut_as, is_callers, is_split, joined, other_names, own, rows, scale_of

Model = TypeVar("Model", bound=nn.Module)
NOTHING: Mapping[str, Any] = MappingProxyType({})


def constructors(cls: type, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the options goes to the __init__ of a caller's class; and the others."""
    if not is_callers(cls):
        return {}, dict(options)
    takes = signature(cls).parameters
    is_open = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in takes.values())
    known = {*SETTINGS, *arguments.ARGUMENTS} - (takes.keys() & {*arguments.NAMES})
    given = {name: x for name, x in options.items() if name not in known and (is_open or name in takes)}
    return given, {name: x for name, x in options.items() if name not in given}


def arrays_of(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """A state dictionary that a model is made of, as a file would have it."""
    quantization.check_plain(state)
    return {name: to_numpy(joined(name, x)) for name, x in state.items()}


def fill(model: Any, found: Loaded, dtype: torch.dtype, mmap: bool, device: torch.device | None) -> None:
    """Take over what was read: the table's weights, and what a class of a caller's has besides."""
    others = {} if found.said is None else quantization.chosen(model, found.said, found.packed)
    assign(model, {**found.arrays, **found.quantized}, dtype, mmap, others)
    if found.said is not None:
        place = device or torch.device("cpu")
        quantization.install(model, found.said, others, found.arrays, found.packed, dtype, place)
    freeze(model)
    fill_own(model, found.beside)


def assign(
    model: Any,
    arrays: Mapping[str, Any],
    dtype: torch.dtype,
    mmap: bool = False,
    later: Mapping[str, Weight] = NOTHING,
) -> None:
    """Let the rows of the table be what was read of them, by their names there, or their first values.

    With `mmap`, what needs no other dtype stays on the memory of the file. `later` are rows that wait.
    """
    if any(map(is_split, model.parameters())):
        from gpt2_multi.pt.parameters import shards  # which few programs need

        return shards.fill(model, arrays, dtype)
    tensors, others = dict[str, Tensor](), other_names(model)
    for name, weight in rows(model).items():
        if name in later:
            continue
        found, kind = arrays.get(weight.name), dtype
        if found is None:
            found = first(weight, dtype, in_int8=scale_of(model, name) is not None)
        if isinstance(found, Quantized):
            tensors[name + SCALE], kind = to_torch(found.scale).clone(), torch.int8
            found = found.values
        tensor = TORCH.layout(weight, to_torch(found))
        tensors[name] = tensor.to(kind) if mmap else contiguous(tensor, kind)
    model.load_state_dict(tensors, strict=False, assign=True)  # every row is there; a subclass may have more
    for name, row in others.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(row))
    model.to(dtype)


def first(weight: Weight, dtype: torch.dtype, in_int8: bool) -> Array | Quantized:
    """The first value of a row, as a file would have it."""
    found = to_numpy(initialise(weight, torch.empty(weight.shape, dtype=dtype, device="cpu")))
    return quantize(weight, found) if in_int8 else found


@torch.no_grad()
def fill_own(model: Any, arrays: Mapping[str, Any]) -> None:
    """Give what is a model's own the values of a file, in place: who shares a parameter goes on to."""
    for name, x in own(model).items():
        if name in arrays:
            value = turned(name, to_torch(arrays[name]))
            x.copy_(cut_as(x, value) if is_split(x) else value)


def load_tf_weights_in_gpt2(model: Model, path: Any, gpt2_checkpoint_path: PathLike | None = None) -> Model:
    """Fill a model from OpenAI's TensorFlow checkpoint, a prefix or a folder; TensorFlow is not needed.

    The old function of transformers. It was given a configuration before the path: of three arguments the second is not
    looked at, since the model's own configuration counts. Raises CheckpointError for what does not fit.
    """
    given: Any = model
    found = checkpoint.open(path if gpt2_checkpoint_path is None else gpt2_checkpoint_path, given.config, given.head)
    checkpoint.warn_of_fresh(found, stacklevel=3)
    assign(given, dict(found), next(given.parameters()).dtype)
    return model
