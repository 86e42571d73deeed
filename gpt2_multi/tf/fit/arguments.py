"""The ways to give a call its arguments, and what becomes of them: tensors by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs

NO_TENSORS = (
    "past_key_values", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "training",
    "logits_to_keep", "skip_logits",
)  # fmt: skip


@functools.cache
def names_of(cls: Any) -> tuple[str, ...]:
    """The arguments of a class's `call`, in their order; a subclass may leave them to `**kwargs`."""
    parameters = list(inspect.signature(cls.call).parameters.values())[1:]
    own = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    inherited = names_of(cls.__base__) if len(own) < len(parameters) else ()
    return (*own, *(name for name in inherited if name not in own))


def signature_of(cls: Any) -> inspect.Signature:
    """The arguments of a class's `call`, of which `**kwargs` is none: Keras lets one not hold tensors and others."""
    own = dict(list(inspect.signature(cls.call).parameters.items())[1:])
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([own.get(name, inspect.Parameter(name, kind, default=None)) for name in names_of(cls)])


def as_keywords(cls: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, without those that are None.

    The first may hold others: in a mapping, as a tokenizer returns it, or in a list of tensors in their order.
    """
    call, names = f"{cls.__name__}()", names_of(cls)
    held = inputs.renamed(call, by_name(call, names, args[0])) if args else {}
    parts = [held, in_order(call, names, (None, *args[1:])), inputs.renamed(call, kwargs)]
    given = [(name, value) for part in parts for name, value in part.items() if value is not None]
    inputs.check_names(call, [name for name, _ in given], names)
    return {name: as_tensor(name, value) for name, value in given}


def by_name(call: str, names: Sequence[str], first: Any) -> Mapping[str, Any]:
    """What the first argument holds."""
    if hasattr(first, "keys"):
        return dict(first)
    if isinstance(first, (list, tuple)) and any(hasattr(x, "shape") for x in first):
        return in_order(call, names, without_past(names, first))
    return {names[0]: first}


def plain(x: Any) -> Any:
    """A tokenizer's encoding as a dict, since Keras looks into no other mapping; anything else as it is."""
    return dict(x) if isinstance(x, Mapping) else x


def by_labels(model: Any, call: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping under the names of labels, given under them or, as for Keras' models of several outputs, of logits."""
    label = dict(zip(model.logit_names, model.label_names, strict=False))
    found = {label.get(name, name): each for name, each in given.items()}
    inputs.check_names(call, list(found), model.label_names)
    return found


def without_past(names: Sequence[str], values: Sequence[Any]) -> Sequence[Any]:
    """Tensors in the order of a call's arguments, in which a past may be missing: [ids, mask] are no [ids, past].

    A past is a cache, or a sequence with a pair or a tensor (2, B, H, S, D) for each layer.
    """
    place = names.index("past_key_values") if "past_key_values" in names else len(values)
    is_tensor = place < len(values) < len(names) and hasattr(values[place], "shape")
    return [*values[:place], None, *values[place:]] if is_tensor else values


def is_old(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has an argument under its name of 2019."""
    held = args[0] if args and hasattr(args[0], "keys") else ()
    return any(name in kwargs or name in held for name in inputs.OLD_NAMES)


def in_order(call: str, names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Arguments without names."""
    inputs.check_count(call, len(values), len(names))
    return dict(zip(names, values, strict=False))


def as_tensor(name: str, value: Any) -> Any:
    """Nested lists as an array; what has a shape as it is, for Keras to convert."""
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        kind = type(value).__name__
        raise InputError(f"{name}: expected a tensor, found {kind}; make it dense, and give attention_mask")
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        value = value.tolist()
    if name in NO_TENSORS or hasattr(value, "shape"):
        return value
    if isinstance(value, (list, tuple)):
        return from_lists(name, value)
    raise InputError(f"{name}: expected a tensor, found {type(value).__name__}; the tokenizer makes one of texts")


def tensor(name: str, value: Any) -> Any:
    """An input as a tensor; None stays None."""
    return None if value is None else tf.convert_to_tensor(as_tensor(name, value))


def from_lists(name: str, value: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Rows of numbers as an array; integers where there are none."""
    try:
        array = np.array(value)
    except (ValueError, TypeError, NotImplementedError):  # the last two of tensors without values
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name}: expected rows of numbers, all of one length; pad them, and give attention_mask")
    return array if array.size else array.astype(np.int64)
