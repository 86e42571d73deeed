"""Weights in int8: which rows of the table, their integers and scales, and the names that these have in a file.

Symmetric, with one scale for each output of a product: scale = max |w| / 127, and w / scale is rounded, half to even.
What is multiplied is rounded so too, each row of it by its own greatest number, when it is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gpt2_multi.errors import CheckpointError, InputError, shortened
from gpt2_multi.files.arrays import Array
from gpt2_multi.model.config import INT8, GPT2Config
from gpt2_multi.model.weights import Shape, Weight

SCALE = "_scale"  # after the name of the integers
GREATEST = 127
LEAST = 1e-30  # scale of what is multiplied, of which all may be 0
UNIFORM = (GREATEST * (GREATEST + 1) / 3) ** 0.5  # the standard deviation of integers that are equally likely
DTYPE = np.dtype(np.int8)


class Quantized(NamedTuple):
    """A row of the table in int8, in the table's layout, and its scales in float32, (outputs,)."""

    values: Array
    scale: Array


def check_method(quantization: object) -> None:
    """What weights may be quantized to: "int8", or None for nothing."""
    if quantization not in (None, "int8"):
        raise InputError(f'quantization: expected "int8" or None, found {shortened(repr(quantization))}')


def check_not_quantized(config: GPT2Config, model: str, what: str, by: tuple[str, ...] = ("gpt2-multi",)) -> None:
    """What changes a model's tables and kernels is not for integers, whose shapes and scales it would not keep.

    by: the programs whose integers it is not for.
    """
    if config.quantizer in by:
        raise CheckpointError(f"{model}: a quantized model cannot be {what}; do that before")


def check_trained(is_trained: bool, otherwise: str, found: str = "one in int8") -> None:
    """Of a model in int8 that is trained something has to train: integers have no gradient, the floats are frozen."""
    if not is_trained:
        raise InputError(
            f"quantization: expected a model of which something trains, found {found}, whose weights are frozen; train "
            f"it without quantization, and quantize what comes out, or {otherwise}"
        )


def with_method(config: GPT2Config, quantization: str | None) -> GPT2Config:
    """A configuration that says this of its weights, as config.json has it."""
    rest = {name: value for name, value in config.extra.items() if name != "quantization_config"}
    bare = config.replace(extra={})
    said = {**rest, **({} if quantization is None else {"quantization_config": dict(INT8)})}
    return bare.replace(extra=said) if said else bare


def is_quantized(weight: Weight) -> bool:
    """Whether a quantized model has this row in int8: the products of the blocks, and the tokens with their head."""
    return weight.kind == "kernel" or weight.path in ("wte", "lm_head")


def in_int8(config: GPT2Config, weight: Weight) -> bool:
    """Whether a model of this configuration has this row in int8."""
    return config.quantization is not None and is_quantized(weight)


def summed(weight: Weight) -> int:
    """The axis that a product sums over, in the table's layout: a scale is for all that is on it."""
    return 0 if weight.kind == "kernel" else 1


def scale_shape(weight: Weight) -> Shape:
    """The shape of the scales of a row."""
    return (weight.shape[1 - summed(weight)],)


def quantize(weight: Weight, array: Array) -> Quantized:
    """The integers of a row, and their scales; CheckpointError for numbers that are not finite."""
    x, axis = array.astype(np.float32, copy=False), summed(weight)
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(GREATEST)
    if not np.isfinite(scale).all():
        raise CheckpointError(f"{weight.name}: expected finite numbers to quantize, found others; it may be damaged")
    scale = np.where(scale > 0, scale, np.float32(1))  # all are 0
    return Quantized(np.rint(x / scale).clip(-GREATEST, GREATEST).astype(DTYPE), scale.reshape(-1))


def dequantized(weight: Weight, found: Quantized, dtype: Any = np.float32) -> Array:
    """The numbers that integers stand for."""
    scale = np.expand_dims(found.scale.astype(dtype), summed(weight))
    return np.asarray(found.values.astype(dtype) * scale)


def rounded(x: Array) -> Array:
    """What a product in int8 multiplies: x (..., K) with each row at the nearest of its 255 levels."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / GREATEST, LEAST)
    return np.asarray(np.rint(x / scale) * scale)


def apart(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors of a file without the scales of those in int8; and these scales by the names of the integers."""
    names = [name for name, array in tensors.items() if array.dtype == DTYPE and name + SCALE in tensors]
    scales = {name: tensors[name + SCALE] for name in names}
    return {
        name: array for name, array in tensors.items() if name.removesuffix(SCALE) not in scales or name in scales
    }, scales


def check_stored(source: str, name: str, weight: Weight, array: Array, scale: Array | None) -> None:
    """A tensor holds floats, or integers with a scale for each output of a row that may be quantized."""
    if array.dtype.kind not in "iu" and array.dtype.itemsize > 1:  # in 8 bits floats lack a scale, too
        return
    if array.dtype != DTYPE or not is_quantized(weight):
        raise CheckpointError(
            f"{source}: {name} is stored as {array.dtype.name}, expected floating-point numbers; it is quantized by "
            "another program: load what it was made of"
        )
    if scale is None:
        raise CheckpointError(
            f"{source}: {name} is stored as int8, and lacks the scales {name}{SCALE}; save or fetch it again"
        )
    wanted = scale_shape(weight)
    if scale.shape != wanted or scale.dtype != np.float32:
        raise CheckpointError(
            f"{source}: {name}{SCALE} has shape {scale.shape} in {scale.dtype.name}, expected {wanted} in float32, one "
            "number for each output; save it again"
        )
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise CheckpointError(f"{source}: {name}{SCALE} has numbers that are no scale, not finite or not above 0")
