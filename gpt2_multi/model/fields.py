"""What each field of a configuration may hold. A check returns the value as it is kept, or raises ConfigError."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gpt2_multi.errors import ConfigError, InputError, shortened

Check = Callable[[str, Any], Any]

ACTIVATIONS = {  # the spellings of a file, and the function that each names
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "tanh": "tanh", "gelu_new": "tanh_gelu",
    "gelu_fast": "tanh_gelu", "gelu_pytorch_tanh": "tanh_gelu", "quick_gelu": "quick_gelu",
}  # fmt: skip
SUMMARY_TYPES = ("last", "first", "mean", "cls_index")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def wrong(name: str, expected: str, found: object) -> ConfigError:
    """The error of a field that holds the wrong thing."""
    return ConfigError(f"{shortened(name)} must be {expected}; found {shortened(repr(found))}")


def float_name(name: str, dtype: Any) -> str:
    """The name of a floating-point dtype of any framework, given by itself or by its name."""
    found = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", str(dtype)))
    if (found := str(found).removeprefix("torch.")) not in DTYPES:
        raise InputError(f"{name}: expected float64, float32, float16 or bfloat16, found {dtype!r}")
    return found


def integer(name: str, value: Any) -> int:
    """Any integer, NumPy's too; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong(name, "an integer", value)
    return int(value)


def count(name: str, value: Any) -> int:
    """A size."""
    if (number := integer(name, value)) < 1:
        raise wrong(name, "at least 1", value)
    if number >= 1 << 63:
        raise wrong(name, "a size that a tensor can have", value)
    return number


def _number(expected: str, fits: Callable[[float], bool]) -> Check:
    def check(name: str, value: Any) -> float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not _finite(value) or not fits(value):
            raise wrong(name, expected, value)
        return value if isinstance(value, int) else float(value)

    return check


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _one_of(choices: Iterable[str]) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise wrong(name, f"one of {', '.join(choices)}", value)
        return value

    return check


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def _end_tokens(name: str, value: Any) -> int | list[int]:
    if isinstance(value, (list, tuple)):
        return [integer(f"{name}[{i}]", token) for i, token in enumerate(value)]
    return integer(name, value)


def _dtype(name: str, value: Any) -> str:
    return str(
        _one_of(DTYPES)(name, str(value).removeprefix("torch."))
    )  # torch.float32 and NumPy's dtypes, by their text


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise wrong(name, "a list of strings", value)
    return list(value)


def _mapping(name: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise wrong(name, "a mapping", value)
    return value


def _key(name: str, key: Any) -> int:
    """An integer key, which JSON can only spell as a string."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        return int(key)
    return integer(f"a key of {name}", key)


def _id2label(name: str, value: Any) -> dict[int, str]:
    if not _mapping(name, value):
        raise wrong(name, "a mapping from each class number to its label, with at least one", value)
    _strings(f"the labels of {name}", list(value.values()))
    return {_key(name, key): label for key, label in value.items()}


def _label2id(name: str, value: Any) -> dict[str, int]:
    _strings(f"the keys of {name}", list(_mapping(name, value)))
    return {label: integer(f"{name}[{label!r}]", i) for label, i in value.items()}


def _pruned_heads(name: str, value: Any) -> dict[int, list[int]]:
    pruned = {}
    for layer, heads in _mapping(name, value).items():
        if not isinstance(heads, (list, tuple, set)):
            raise wrong(f"{name}[{layer!r}]", "a list of heads", heads)
        pruned[_key(name, layer)] = sorted({integer(f"{name}[{layer!r}]", head) for head in heads})
    return pruned


def _extra(name: str, value: Any) -> dict[str, Any]:
    _strings(f"the keys of {name}", list(_mapping(name, value)))
    return copy.deepcopy(dict(value))


CHECKS: dict[str, Check] = {
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), count),
    "n_inner": _optional(count),
    "activation_function": _one_of(ACTIVATIONS),
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"),
        _number("a probability, 0 <= p < 1", lambda p: 0 <= p < 1),
    ),
    "layer_norm_epsilon": _number("a positive number", lambda x: x > 0),
    "initializer_range": _number("a number from 0 up", lambda x: x >= 0),
    "summary_type": _one_of(SUMMARY_TYPES),
    "summary_activation": _optional(_one_of(ACTIVATIONS)),
    **dict.fromkeys(
        (
            "summary_use_proj", "summary_proj_to_labels", "scale_attn_weights", "use_cache",
            "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention", "is_decoder",
            "tie_word_embeddings", "output_hidden_states", "output_attentions", "return_dict",
        ),
        _flag,
    ),
    # Special ids may lie outside the vocabulary: a small model often keeps the default 50256. Who uses one checks it.
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _optional(integer)),
    "eos_token_id": _optional(_end_tokens),
    "id2label": _id2label,
    "label2id": _label2id,
    "problem_type": _optional(_one_of(PROBLEM_TYPES)),
    "pruned_heads": _pruned_heads,
    "architectures": _optional(_strings),
    "dtype": _optional(_dtype),
    "extra": _extra,
    "from_file": lambda name, value: frozenset(value),
}  # fmt: skip


def check_together(values: Mapping[str, Any]) -> None:
    """Check what no field can tell alone."""
    n_embd, n_head, n_layer = values["n_embd"], values["n_head"], values["n_layer"]
    if n_embd % n_head:
        raise ConfigError(
            f"n_embd must be a multiple of n_head; found n_embd {n_embd} and n_head {n_head} "
            "(to change both at once: config.replace(n_embd=..., n_head=...))"
        )
    for layer, heads in values["pruned_heads"].items():
        if layer not in range(n_layer) or any(head not in range(n_head) for head in heads):
            raise wrong("pruned_heads", f"heads 0 to {n_head - 1} of layers 0 to {n_layer - 1}", {layer: heads})
        if len(heads) == n_head:
            raise ConfigError(f"pruned_heads must leave each layer a head; found all {n_head} of layer {layer}")
