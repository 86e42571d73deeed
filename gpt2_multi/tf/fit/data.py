"""What `fit` is given: labels and their weights in each of the forms that Keras knows, and datasets of rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.errors import InputError, described
from gpt2_multi.model.inputs import check_size
from gpt2_multi.tf.fit.arguments import NO_TENSORS, by_labels, names_of, plain
from gpt2_multi.tf.training import IGNORED

Row = Mapping[str, Any]
Batch = dict[str, np.ndarray[Any, Any]]
LABEL_NAMES = ("label", "label_ids")  # of datasets -> labels


def weighing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keras' own `fit`, `evaluate` or the like, which drops weights where the labels are among the inputs."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def with_weights(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options)
        values = given.arguments
        values["x"] = plain(values.get("x"))
        values.update(weighed(values["self"], values))
        if isinstance(values.get("validation_data"), (list, tuple)):
            held = dict(zip(("x", "y", "sample_weight"), values["validation_data"], strict=False))
            held |= {"x": plain(held["x"]), **weighed(values["self"], held)}
            values["validation_data"] = tuple(held.values())
        return method(*given.args, **given.kwargs)

    return with_weights


def weighed(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What changes of x, y, `sample_weight` and `class_weight`: y has the labels where weights are given."""
    x: Any = given.get("x")
    y, classes = given.get("y"), given.get("class_weight")
    if given.get("sample_weight") is None and classes is None:
        return {}
    if classes is not None and len(model.label_names) > 1:
        several = " and ".join(model.label_names)
        raise InputError(f"class_weight: {type(model).__name__} has labels of two kinds, {several}; give sample_weight")
    if isinstance(x, keras.utils.PyDataset) and model.head == "sequence_classification":
        return {}
    if isinstance(x, tf.data.Dataset):
        return {"x": x.map(functools.partial(_weighted, model, classes)), "class_weight": None} if classes else {}
    if y is None and hasattr(x, "keys"):
        y = {name: x[name] for name in model.label_names if name in x}
        x = {name: x[name] for name in x.keys() if name not in y}
        y = y if len(model.label_names) > 1 else next(iter(y.values()), None)
    if y is None:
        raise InputError(
            f"sample_weight, class_weight: expected labels to weigh, found {described(x)}; give them as y or in x, or "
            "weights in each batch, (x, y, sample_weight)"
        )
    found = {"x": x, "y": y}
    if isinstance(given.get("sample_weight"), (list, tuple)) and isinstance(y, Mapping):  # Keras asks for one structure
        found["sample_weight"] = dict(zip(model.label_names, given["sample_weight"], strict=False))
    if isinstance(given.get("sample_weight"), Mapping) and isinstance(y, Mapping):
        found["y"] = y = by_labels(model, f"y of {type(model).__name__}", y)
        weight = by_labels(model, "sample_weight", given["sample_weight"])
        found["sample_weight"] = {**{name: np.ones(len(y[name])) for name in y}, **weight}
    if classes is not None and given.get("sample_weight") is None:  # of both Keras says that they exclude each other
        found |= {"sample_weight": weights_of_classes(model, y, classes), "class_weight": None}
    return found


def weights_of_classes(model: Any, y: Any, classes: Mapping[int, float]) -> Any:
    """A weight for each label, in the labels' shape: that of its class, or 1."""
    is_one = isinstance(y, Mapping) and len(model.label_names) == 1
    labels = tf.convert_to_tensor(next(iter(y.values())) if is_one else y)
    if not labels.dtype.is_integer:
        raise InputError(
            f"class_weight: expected labels that are classes, found {labels.dtype.name}; give sample_weight"
        )
    table = np.ones(max(classes) + 1, np.float32)
    table[list(classes)] = list(classes.values())
    known = (labels >= 0) & (labels < len(table))
    return tf.where(known, tf.gather(table, tf.where(known, labels, 0)), 1.0)


def _weighted(model: Any, classes: Mapping[int, float], *data: Any) -> tuple[Any, Any, Any]:
    """A batch of a dataset with the weights of its labels' classes."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)  # a lone x is a tuple of one
    if weight is not None:
        raise InputError("class_weight: the dataset has sample weights already; leave one of the two out")
    y = x["labels"] if y is None else y
    return x, y, weights_of_classes(model, y, classes)


def prepare_tf_dataset(
    self: Any,
    dataset: Any,
    batch_size: int = 8,
    shuffle: bool = True,
    tokenizer: Any = None,
    collate_fn: Callable[..., Mapping[str, Any]] | None = None,
    collate_fn_args: Mapping[str, Any] | None = None,
    drop_remainder: bool | None = None,
    prefetch: bool = True,
) -> tf.data.Dataset:
    """Batches for `fit` of a `datasets.Dataset`, or of what has a length and rows that are mappings, such as a list.

    A batch is (inputs, labels), both mappings unless a head has one kind of labels, or the inputs alone where there are
    none. Columns that the model does not take are left out; "label" and "label_ids" are its labels. `tokenizer` pads
    rows, their labels with -100; `collate_fn` makes a batch of a list of rows, with `collate_fn_args`. The order is
    another one in each epoch unless `shuffle` is off, and then the last batch may be smaller, if `drop_remainder` does
    not say otherwise. Raises InputError for what is no such dataset, and for rows that make no batch.
    """
    has_rows = not isinstance(dataset, Mapping) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not has_rows or not len(dataset) or not isinstance(dataset[0], Mapping):
        raise InputError(
            "dataset: expected rows with a length, such as a datasets.Dataset or a list of dicts, found "
            f"{described(dataset)}; give fit a tf.data.Dataset for a stream, or what is not empty"
        )
    check_size("batch_size", batch_size, 1)

    cls: Any = type(self)
    columns = {*names_of(cls), *LABEL_NAMES} - {*NO_TENSORS}

    def batch(rows: Sequence[Row]) -> Batch:
        kept = [{name: row[name] for name in row if name in columns} for row in rows]
        if not kept[0]:
            raise InputError(f"dataset: expected columns such as input_ids, found {', '.join(rows[0])}; rename them")
        made = collate_fn(kept, **(collate_fn_args or {})) if collate_fn else collate(kept, tokenizer)
        return of_model(cls, made)

    drop = shuffle if drop_remainder is None else drop_remainder
    indices = tf.data.Dataset.range(len(dataset))
    indices = (indices.shuffle(len(dataset)) if shuffle else indices).batch(batch_size, drop_remainder=drop)
    batches = indices.map(reader(batch, dataset, batch_size)).map(functools.partial(split, cls))
    return batches.prefetch(tf.data.AUTOTUNE) if prefetch else batches


def reader(batch: Callable[[Sequence[Row]], Batch], dataset: Any, batch_size: int) -> Callable[[tf.Tensor], Any]:
    """A function of rows' numbers (B,) that gives their batch; a first batch says what is in one."""
    rows = [dataset[at] for at in range(min(batch_size, len(dataset)))]
    first = batch(rows)
    kinds = [array.dtype for array in first.values()]

    def read(numbers: Any) -> list[Any]:
        arrays = batch([dataset[int(at)] for at in numbers])
        return [arrays[name].astype(kind) for name, kind in zip(first, kinds, strict=True)]

    def tensors(numbers: tf.Tensor) -> dict[str, tf.Tensor]:
        found = dict(zip(first, tf.numpy_function(read, [numbers], kinds), strict=True))
        for name, tensor in found.items():
            number = numbers.shape[0] if len(first[name]) == len(rows) else None  # a function may join rows
            tensor.set_shape([number, *[None] * (first[name].ndim - 1)])
        return found

    return tensors


def split(cls: Any, batch: Mapping[str, tf.Tensor]) -> Any:
    """A batch as (inputs, labels), or the inputs alone where there are no labels."""
    labels = {name: batch[name] for name in cls.label_names if name in batch}
    inputs = {name: batch[name] for name in batch if name not in labels}
    if not labels:
        return inputs
    return inputs, labels if len(cls.label_names) > 1 else labels["labels"]


def collate(rows: Sequence[Row], tokenizer: Any) -> Mapping[str, Any]:
    """Rows as a batch: with a tokenizer padded to the longest, labels of tokens with -100."""
    if tokenizer is None:
        return {name: [row[name] for row in rows] for name in rows[0]}
    labels = {name: [row[name] for row in rows] for name in ("labels", *LABEL_NAMES) if name in rows[0]}
    padded = tokenizer.pad([{k: v for k, v in row.items() if k not in labels} for row in rows], return_tensors="np")
    width, is_left = padded["input_ids"].shape[1], getattr(tokenizer, "padding_side", "right") == "left"

    def filled(label: Any) -> Any:
        fill = [IGNORED] * (width - len(label))
        return [*fill, *label] if is_left else [*label, *fill]

    return {**padded, **{name: [filled(x) if np.ndim(x) == 1 else x for x in each] for name, each in labels.items()}}


def of_model(cls: Any, made: Mapping[str, Any]) -> Batch:
    """What a model takes of a batch, as arrays; what no array holds, since rows are of several lengths, is an error."""
    found = {}
    for name, value in made.items():
        name = "labels" if name in LABEL_NAMES else name
        if name in names_of(cls):
            try:
                found[name] = np.asarray(value)
            except ValueError:
                raise InputError(
                    f"dataset: expected rows of {name} of one length, found several; give tokenizer=, which pads them, "
                    "or a collate_fn"
                ) from None
    return found
