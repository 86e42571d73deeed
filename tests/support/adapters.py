"""One call for every backend: run a head of a model folder on NumPy inputs and get NumPy outputs, flat.

The keys are those of the fixtures: `logits`, `hidden_states.{i}`, `attentions.{i}`, `past.{i}.key` and so on.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Outputs = dict[str, Any]
kept = functools.lru_cache(maxsize=6)  # models, each for the calls that follow each other; calls do not change them
LISTS = ("hidden_states", "attentions", "cross_attentions")


def flatten(output: Any, to_numpy: Callable[[Any], Any]) -> Outputs:
    """An output dataclass as a flat mapping of arrays."""
    flat = {}
    for key, value in output.items():
        if key == "past_key_values":
            for i, (k, v) in enumerate(value):
                flat |= {f"past.{i}.key": to_numpy(k), f"past.{i}.value": to_numpy(v)}
        elif key in LISTS:
            flat |= {f"{key}.{i}": to_numpy(each) for i, each in enumerate(value)}
        else:
            flat[key] = to_numpy(value)
    return flat


def classes(package: Any) -> dict[str, Any]:
    """The class of each head, once, whatever other names it has."""
    return {cls.head: cls for cls in vars(package).values() if hasattr(cls, "head")}


@kept
def pt_model(head: str, folder: Path, dtype: str, **options: Any) -> Any:
    """A PyTorch model of this head, stored and computing in `dtype`."""
    from gpt2_multi import pt

    return classes(pt)[head].from_pretrained(folder, param_dtype=dtype, **options)


def pt(head: str, folder: Path, dtype: str, inputs: dict[str, Any], call: Any = (), **options: Any) -> Outputs:
    """Run PyTorch."""
    import torch

    def tensor(value: Any) -> Any:
        value = torch.from_numpy(np.asarray(value))
        return value.to(getattr(torch, dtype)) if value.is_floating_point() else value

    with torch.no_grad():
        model = pt_model(head, folder, dtype, **options)
        output = model(**{key: tensor(value) for key, value in inputs.items()}, **dict(call))
    return flatten(output, lambda value: value.numpy())


@kept
def tf_model(head: str, folder: Path, dtype: str, **options: Any) -> Any:
    """A TensorFlow model of this head, stored and computing in `dtype`; it has one attention only."""
    from gpt2_multi import tf

    options.pop("attn_implementation", None)
    return classes(tf)[head].from_pretrained(folder, param_dtype=dtype, **options)


def tf(head: str, folder: Path, dtype: str, inputs: dict[str, Any], call: Any = (), **options: Any) -> Outputs:
    """Run TensorFlow."""
    return flatten(tf_model(head, folder, dtype, **options)(inputs, **dict(call)), lambda value: value.numpy())


@kept
def flax_model(head: str, folder: Path, dtype: str, **options: Any) -> Any:
    """A Flax model of this head, stored and computing in `dtype`; it has one attention only."""
    import jax

    from gpt2_multi import flax

    jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
    options.pop("attn_implementation", None)
    return classes(flax)[head].from_pretrained(folder, param_dtype=dtype, **options)


def flax(head: str, folder: Path, dtype: str, inputs: dict[str, Any], call: Any = (), **options: Any) -> Outputs:
    """Run Flax, with a cache, which has room for the call alone."""
    model = flax_model(head, folder, dtype, **options)
    source = np.asarray(inputs.get("input_ids", inputs.get("inputs_embeds")))
    choices = head == "double_heads" and source.ndim >= 3
    if head not in ("token_classification", "question_answering"):
        batch, length = (source.shape[0] * source.shape[1], source.shape[2]) if choices else source.shape[:2]
        inputs = {**inputs, "past_key_values": model.init_cache(batch, length)}
    return flatten(model(**inputs, **dict(call)), np.asarray)


BACKENDS: dict[str, tuple[str, Callable[..., Outputs]]] = {
    "pt": ("torch", pt),
    "tf": ("tensorflow", tf),
    "flax": ("flax", flax),
}


def tensor(backend: str, array: Any) -> Any:
    """An array as a model of the backend takes it."""
    if backend == "pt":
        import torch

        return torch.from_numpy(np.array(array))
    if backend == "tf":
        import tensorflow

        return tensorflow.constant(array)
    import jax.numpy as jnp

    return jnp.asarray(array)


def by_last(backend: str, table: Any) -> Callable[..., Any]:
    """A function for callers' rules: of a table (V, ...) the row of the last id of each text, `shift` rows further."""
    rows = tensor(backend, table)

    def found(ids: Any, *length: Any, shift: Any = 0) -> Any:
        last = ids[..., -1] if backend == "pt" else ids[..., length[0] - 1]
        if backend != "tf":
            return rows[(last + shift) % len(table)]
        import tensorflow

        return tensorflow.gather(rows, (last + shift) % len(table))

    return found
