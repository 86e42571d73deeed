"""LoRA (Hu et al. 2021): of kernels only a product of two small matrices is trained, under the names of peft::

    lora = LoraConfig(r=8, lora_alpha=16)
    state = create_train_state(model, optimizer(1e-3), lora=lora)
    state, metrics = train_step(state, batch)
    save_adapters("adapter", model, state.params, lora)  # which peft loads
    model.params = state.merged()

Adapters are a tree like that of the parameters. Where a kernel is adapted, `lora_A` (in, r) and `lora_B` (r, out) stand
beside it, with its named axes apart; a head for a task (a classifier, say) is there whole, and trained so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from gpt2_multi.errors import InputError, nearest
from gpt2_multi.flax.attention import upcast
from gpt2_multi.flax.parameters.tree import Leaf, Path, Tree, leaves
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.quantized import check_not_quantized
from gpt2_multi.model.spelling import FLAX
from gpt2_multi.model.weights import Weight, table

A, B = "lora_A", "lora_B"
ADAPTED = ("kernel", "linear")  # the table's kinds


@dataclass(frozen=True)
class LoraConfig:
    """Which kernels are adapted, and how: the fields that peft's LoraConfig has under these names.

    `r` is the rank. What is added to a kernel is multiplied by lora_alpha / r, or with `use_rslora` by lora_alpha /
    sqrt(r) (Kalajdzievski 2023). `target_modules` are names, or their ends: "c_proj" is that of the attention and that
    of the feed-forward layer, "mlp.c_proj" the latter; "all-linear" are all kernels of the blocks.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: Sequence[str] | str = ("c_attn",)
    use_rslora: bool = field(default=False, kw_only=True)
    lora_dropout: float = field(default=0.0, kw_only=True)  # of an adapter that was trained elsewhere

    def __post_init__(self) -> None:
        inputs.check_size("r", self.r, 1)
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))  # it is hashed
        elif self.target_modules != "all-linear":
            raise InputError(
                f"target_modules: expected names such as ['c_attn'], or 'all-linear', found {self.target_modules!r}"
            )

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def adapts(self, row: Weight) -> bool:
        """Whether a row of the table gets an adapter."""
        if row.kind not in ADAPTED or self.target_modules == "all-linear":
            return row.kind == "kernel"
        return any(is_named(row.path, name) for name in self.target_modules)


def is_named(path: str, name: str) -> bool:
    """Whether a target module's name, or its end, is that of a row of the table."""
    return f".{path}".endswith(f".{name.removeprefix('transformer.')}")


def adapted(model: Any, lora: LoraConfig) -> dict[Path, Leaf]:
    """The leaves of a model's tree that are adapted.

    Raises InputError for a name that no kernel has, and CheckpointError for a model in int8.
    """
    check_not_quantized(model.config, type(model).__name__, "given LoRA")
    found = leaves(model.config, model.head, model.scan_layers)
    kernels = [row.path for leaf in found.values() for row in leaf.rows if row.kind in ADAPTED]
    for name in () if isinstance(lora.target_modules, str) else lora.target_modules:
        if not any(is_named(path, name) for path in kernels):
            known = sorted({path.rpartition(".")[2] for path in kernels})
            raise InputError(
                f"target_modules: expected names of kernels, {', '.join(known)}, found {name!r}{nearest(name, known)}"
            )
    chosen = {path: [lora.adapts(row) for row in leaf.rows] for path, leaf in found.items()}
    if partly := next((path for path, rows in chosen.items() if any(rows) and not all(rows)), None):
        raise InputError(
            f"target_modules: expected {'/'.join(partly)} of all layers or of none, since they are scanned, found some;"
            " make the model without scan_layers"
        )
    return {path: leaf for path, leaf in found.items() if all(chosen[path])}


def whole_heads(model: Any, lora: LoraConfig) -> dict[Path, Leaf]:
    """The leaves of a head that is learnt for a task, a language model's is none: they are trained as they are."""
    found = leaves(model.config, model.head, model.scan_layers)
    rows = {path: leaf.rows[0] for path, leaf in found.items()}
    is_whole = {path: not row.in_body and row.path != "lm_head" and not lora.adapts(row) for path, row in rows.items()}
    return {path: leaf for path, leaf in found.items() if is_whole[path]}


def shapes_of(leaf: Leaf, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a kernel's two matrices: (in, r) and (r, out), with a first axis for layers that are stacked."""
    row, stacked = leaf.rows[0], int(leaf.stacked)
    cut = stacked + len(row.axes[-1 if row.kind in FLAX.transposed else 0])
    return {A: (*leaf.shape[:cut], rank), B: (*leaf.shape[:stacked], rank, *leaf.shape[cut:])}


def shapes(model: Any, lora: LoraConfig) -> dict[Path, tuple[int, ...]]:
    """The shape of each array of the adapters."""
    found = {path: leaf.shape for path, leaf in whole_heads(model, lora).items()}
    for path, leaf in adapted(model, lora).items():
        found |= {(*path[:-1], name): shape for name, shape in shapes_of(leaf, lora.r).items()}
    return found


def init_adapters(model: Any, lora: LoraConfig, key: Array, params: Tree) -> Tree:
    """First adapters: A is uniform as in peft, within 1 / sqrt(in), and B is 0; heads for a task are those of `params`.

    They are stored as the parameters are, in float32 at least.
    """
    number = {row.name: place for place, row in enumerate(table(model.config, model.head))}
    flat = flatten_dict(params)
    found = {path: flat[path] for path in whole_heads(model, lora)}
    for path, leaf in adapted(model, lora).items():
        shape, dtype = shapes_of(leaf, lora.r), upcast(flat[path]).dtype
        one = shape[A][int(leaf.stacked) :]
        draw = partial(jax.random.uniform, shape=one, dtype=dtype, minval=-(bound := math.prod(one[:-1]) ** -0.5))
        first = [draw(jax.random.fold_in(key, number[row.name]), maxval=bound) for row in leaf.rows]
        found[(*path[:-1], A)] = jnp.stack(first) if leaf.stacked else first[0]
        found[(*path[:-1], B)] = jnp.zeros(shape[B], dtype)
    return unflatten_dict(found)


def check_adapters(model: Any, lora: LoraConfig, adapters: Tree) -> None:
    """Raises InputError for a tree that is not what `init_adapters` makes for this model."""
    wanted = shapes(model, lora)
    found = {path: tuple(x.shape) for path, x in flatten_dict(adapters).items()}
    for path in {**wanted, **found}:
        if found.get(path) != wanted.get(path):
            raise InputError(
                f"adapters: expected {'/'.join(path)} to be {wanted.get(path, 'absent')}, found "
                f"{found.get(path, 'none')}; take what load_adapters gives, with its LoraConfig"
            )


def merge(params: Tree, adapters: Tree, lora: LoraConfig) -> Tree:
    """The parameters with adapters in them: a kernel becomes kernel + scaling * A B, in its own dtype."""
    flat, small = flatten_dict(params), flatten_dict(adapters)
    for path, a in small.items():
        if path[-1] == A:
            place, b = (*path[:-1], "kernel"), small[(*path[:-1], B)]
            flat[place] = updated(flat[place], a, b, lora.scaling)
        elif path[-1] != B:
            flat[path] = a
    return unflatten_dict(flat)


def updated(kernel: Array, a: Array, b: Array, scaling: float) -> Array:
    """A kernel with the product of its two matrices, those of each layer where they are stacked."""
    product: Any = partial(jnp.tensordot, axes=1)
    stacked = a.ndim + b.ndim - 2 > kernel.ndim
    update = (jax.vmap(product) if stacked else product)(a, b)
    return (kernel.astype(update.dtype) + scaling * update).astype(kernel.dtype)
