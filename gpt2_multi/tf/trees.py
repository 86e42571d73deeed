"""Make a dataclass a structure of tensors to TensorFlow and to Keras, so that functions may take and return it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import optree

_Class = TypeVar("_Class", bound=type)


def register(cls: _Class) -> _Class:
    """Let `tf.function`, `tf.while_loop` and Keras look into a dataclass; a field that is None does not count."""

    def parts(value: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        names = tuple(field.name for field in fields(cls) if getattr(value, field.name) is not None)
        return names, tuple(getattr(value, name) for name in names)

    def whole(names: Any, values: Any) -> Any:
        return cls(**dict(zip(names, values, strict=True)))

    cls.__tf_flatten__ = parts  # type: ignore[attr-defined]
    cls.__tf_unflatten__ = staticmethod(whole)  # type: ignore[attr-defined]
    optree.register_pytree_node(cls, lambda value: parts(value)[::-1], whole, namespace="keras")  # Keras' own
    return cls
