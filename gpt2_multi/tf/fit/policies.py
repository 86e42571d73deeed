"""The two dtypes of a model, to compute in and to store in, as a policy of Keras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from gpt2_multi.model.fields import float_name

Policy = keras.DTypePolicy | str | None


@keras.saving.register_keras_serializable("gpt2_multi")
class TwoDtypes(keras.DTypePolicy):
    """A policy that computes in one dtype and stores in another, whichever they are; "float16_over_float64"."""

    def _parse_name(self, name: str) -> tuple[str, str]:
        compute, stored = name.split("_over_")
        return compute, stored


def as_dtype(name: str, dtype: Any) -> str | None:
    """The name of a floating-point dtype, given by itself or by its name; None stays None."""
    return None if dtype is None else float_name(name, dtype)


def policy_of(dtype: Any, param_dtype: Any) -> keras.DTypePolicy:
    """What to compute and to store in. Stock policies where Keras has one, since `quantize` asks for them by name."""
    if isinstance(dtype, Mapping):  # as get_config has it
        dtype = keras.dtype_policies.deserialize(dtype)
    if dtype in ("mixed_float16", "mixed_bfloat16"):
        dtype = keras.DTypePolicy(dtype)
    if isinstance(dtype, keras.DTypePolicy) or (dtype is None and param_dtype is None):
        policy = dtype or keras.config.dtype_policy()
        dtype, param_dtype = policy.compute_dtype, param_dtype or policy.variable_dtype
    stored = as_dtype("param_dtype", param_dtype) or keras.config.floatx()
    compute = as_dtype("dtype", dtype) or stored
    if compute == stored:
        return keras.DTypePolicy(compute)
    mixed = stored == "float32" and compute in ("float16", "bfloat16")
    return keras.DTypePolicy(f"mixed_{compute}") if mixed else TwoDtypes(f"{compute}_over_{stored}")
