"""Linen's stock layers with the table's initial values, and what is known of their inputs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.quantized import GREATEST, LEAST, UNIFORM
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import float_name
from gpt2_multi.model.inputs import Facts
from gpt2_multi.model.weights import ROW_AXES, table

MOST_PARTS = 8  # of a kernel that one row is multiplied by, however many threads there are
_STOCK = nn.DenseGeneral.__call__, nn.Embed.attend
POLICIES = (  # of jax.checkpoint_policies
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


def by_rows(x: Array, others: Any = None) -> Array:
    """x (B, ...) with its rows cut over the axes data and fsdp of the mesh that `jax.set_mesh` has set, if any.

    Without it the compiler would rather gather the activations of all rows than the parameters that FSDP cuts. `others`
    is what the other dimensions are: whole, or `PartitionSpec.UNCONSTRAINED`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(axis for axis, kind in kinds if axis in ROW_AXES and kind == AxisType.Auto)
    if not axes or len(x) % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axes, *[others] * (x.ndim - 1))))


def input_names(module: Any) -> list[str]:
    """What a module may be called with, by its `__call__` and those that it overrides."""
    calls = [vars(cls)["__call__"] for cls in type(module).__mro__ if "__call__" in vars(cls)]
    return [name for call in calls for name in getattr(call, "__annotations__", ()) if name != "return"]


def deviation(config: GPT2Config, path: str, head: str = "base") -> float:
    """The standard deviation that the table gives the tensor at the end of this path."""
    return next(w.std for w in table(config, head) if w.std and f".{w.path}".endswith(f".{path}"))


def initialiser(config: GPT2Config, path: str, head: str = "base") -> Any:
    """The first values of a tensor; the table is looked up when they are made."""

    def first(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
        return deviation(config, path, head) * jax.random.normal(key, shape, dtype)

    return first


def dense(
    owner: Any, features: int | tuple[int, ...], name: str, axis: Any = -1, head: str = "base", use_bias: bool = True
) -> Any:
    """A dense layer of a module that has `config`, `dtype` and `param_dtype`.

    Its kernel is (in, out), each with the table's named axes unflattened, so that heads can be sharded: c_attn's is
    (E, 3, H, D), c_proj's (H, D, E). Those of a quantized model are in int8, but for a task's own head.
    """
    path = f"{owner.name}.{name}" if head == "base" else name
    if owner.config.quantization is not None and head in ("base", "lm"):
        axes, std = 1 if isinstance(axis, int) else len(axis), partial(deviation, owner.config, path, head)
        return QuantizedLinear(features, axes, use_bias, owner.dtype, owner.param_dtype, std, name=name)
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        kernel_init=initialiser(owner.config, path, head),
        dot_general=of_matrices,
        name=name,
    )


def stock() -> tuple[Any, ...]:
    """What linen's layers multiply by now."""
    return nn.DenseGeneral.__call__, nn.Embed.attend


def are_stock() -> bool:
    """Whether it is what linen wrote: otherwise nothing of ours may stand in its place."""
    return stock() == _STOCK


def of_matrices(x: Array, kernel: Array, dimensions: Any, **options: Any) -> Array:
    """`lax.dot_general` of the last axes of x and the first of a kernel, on one device as the product of two matrices.

    Its gradients are such products too then. Of more axes XLA would first bring the gradients of all rows into another
    order, anew for each kernel and with all that they are the sums of. Several devices may cut any axis of a kernel.
    """
    if jax.device_count() > 1:
        return lax.dot_general(x, kernel, dimensions, **options)
    number = len(dimensions[0][0])
    width = math.prod(kernel.shape[:number])
    rows, matrix = x.reshape(-1, width), kernel.reshape(width, -1)
    is_wide = rows.dtype in (np.float32, np.float64)  # others would be rounded once for each part
    if rows.shape[0] == 1 and is_wide and jax.default_backend() == "cpu":
        y = in_parts(rows, matrix, **options)
    else:
        y = lax.dot_general(rows, matrix, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[: x.ndim - number], *kernel.shape[number:])


def in_parts(row: Array, kernel: Array, **options: Any) -> Array:
    """The product of a row (1, K) with a kernel (K, N), on all threads of a CPU.

    XLA multiplies one row on a single thread, which does not read as fast as memory gives, but several products at once
    on all of them: so a kernel is read as parts, each with some of the inputs, and what they make is added up. Nothing
    is copied. The kernels of GPT-2 124M's blocks take 6.5 ms so with two threads, and 8.2 otherwise.
    """
    width = kernel.shape[0]
    parts = next(count for count in range(MOST_PARTS, 0, -1) if width % count == 0)
    rows, kernels = row.reshape(parts, -1), kernel.reshape(parts, width // parts, -1)
    return lax.dot_general(rows, kernels, (((1,), (1,)), ((0,), (0,))), **options).sum(0, keepdims=True)  # (1, N)


def embed(owner: Any, rows: int, name: str) -> Any:
    """An embedding (rows, E); that of tokens is in int8 in a quantized model."""
    if owner.config.quantization is not None and name == "wte":
        std = partial(deviation, owner.config, name)
        return QuantizedEmbedding(rows, owner.config.n_embd, owner.dtype, std, name=name)
    return nn.Embed(
        rows,
        owner.config.n_embd,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        embedding_init=initialiser(owner.config, name),
        name=name,
    )


def integers(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
    """First integers, each as likely."""
    return jax.random.randint(key, shape, -GREATEST, GREATEST + 1, jnp.int32).astype(dtype)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """The integers from -127 to 127 that the numbers of each row (..., K) are nearest to, as floats, and its scale."""
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) / GREATEST, jnp.asarray(LEAST, x.dtype))
    return jnp.round(x / scale), scale


@jax.custom_jvp
def product(x: Array, kernel: Array, kernel_scale: Array) -> Array:
    """x (..., K) in at least float32, each row rounded, by integers (N, K) with their scales (N,): (..., N)

    On a CPU, XLA multiplies one row of integers by a loop that is slow, and two by a kernel that is quick.
    """
    rows, scale = quantize_rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))  # of no row -1 would say nothing
    several = jnp.concatenate([rows, jnp.zeros_like(rows)]) if len(rows) == 1 else rows
    several = lax.optimization_barrier(several.astype(jnp.int8))
    y = lax.dot_general(several, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    y = lax.optimization_barrier(y)[: len(rows)].astype(x.dtype) * kernel_scale.astype(x.dtype)[None, :] * scale
    return y.reshape(*x.shape[:-1], len(kernel))


@product.defjvp
def _slope(given: Any, tangents: Any) -> tuple[Array, Array]:
    """A gradient goes through as if nothing were rounded; integers and their scales have none."""
    x, kernel, scale = given
    weight = kernel.astype(x.dtype) * scale.astype(x.dtype)[:, None]
    return product(x, kernel, scale), tangents[0] @ weight.T


class QuantizedLinear(nn.Module):
    """A dense layer whose kernel is in int8, (out, in), a scale for each output; what it takes is rounded alike."""

    features: int | tuple[int, ...]
    axes: int  # the last ones of what it takes, over which it sums
    use_bias: bool
    dtype: Any
    param_dtype: Any
    std: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        batch, inputs, outputs = x.shape[: -self.axes], math.prod(x.shape[-self.axes :]), math.prod(features)
        kernel = self.param("kernel", integers, (outputs, inputs), jnp.int8)
        scale = self.param("kernel_scale", nn.initializers.constant(self.std() / UNIFORM), (outputs,), jnp.float32)
        y = product(x.reshape(*batch, inputs).astype(widened(self.dtype)), kernel, scale).reshape(*batch, *features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features, self.param_dtype)
            y = y + bias.astype(y.dtype).reshape(*[1] * len(batch), *features)
        return y.astype(self.dtype)


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are in int8, each with a scale; a tied head is of the same integers."""

    num_embeddings: int
    features: int
    dtype: Any
    std: Any

    def setup(self) -> None:
        self.embedding = self.param("embedding", integers, (self.num_embeddings, self.features), jnp.int8)
        first = nn.initializers.constant(self.std() / UNIFORM)
        self.embedding_scale = self.param("embedding_scale", first, (self.num_embeddings,), jnp.float32)

    def __call__(self, ids: Array) -> Array:
        wide = widened(self.dtype)
        return (self.embedding[ids].astype(wide) * self.embedding_scale[ids].astype(wide)[..., None]).astype(self.dtype)

    def attend(self, x: Array) -> Array:
        """The tied head: (..., E) -> (..., V)"""
        return product(x.astype(widened(self.dtype)), self.embedding, self.embedding_scale).astype(self.dtype)


def widened(dtype: Any) -> Any:
    """What rows are rounded in: float32 at least."""
    return np.promote_types(jnp.dtype(dtype), np.float32)


class LayerNorm(nn.LayerNorm):
    """Linen's, which sums in float32, whatever the caller has set for promotions."""

    def __call__(self, x: Any, *, mask: Array | None = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask=mask)


def norm(owner: Any, name: str) -> LayerNorm:
    """A layer norm (Ba et al. 2016), with the variance from the deviations: the fast formula cancels."""
    return LayerNorm(
        epsilon=owner.config.layer_norm_epsilon,
        dtype=owner.dtype,
        param_dtype=owner.param_dtype,
        use_fast_variance=False,
        name=name,
    )


def facts(x: Any) -> Facts:
    """What is known of an input; while it is traced, not its values, and of sizes that are symbols, nothing."""
    kinds = {"integers": jnp.integer, "floats": jnp.floating}
    kind = next((kind for kind, dtype in kinds.items() if jnp.issubdtype(x.dtype, dtype)), "others")
    shape = tuple(size if isinstance(size, int) else None for size in x.shape)
    return Facts(shape, str(x.dtype), kind, lambda: np.asarray(x) if is_concrete(x) else None)


def is_concrete(value: Any) -> bool:
    """Whether an array has values already."""
    return not isinstance(value, jax.core.Tracer)


def is_traced(*trees: Any) -> bool:
    """Whether anything in these trees has no value yet."""
    return not all(map(is_concrete, jax.tree.leaves(trees)))


def as_array(name: str, value: Any) -> Any:
    """Lists and NumPy arrays as arrays of JAX."""
    if value is None or isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(narrowed(value))
    except OverflowError:
        raise InputError(f"{name}: found an integer that no id can be; give what the tokenizer made") from None
    except (TypeError, ValueError):
        raise no_numbers(name, value) from None


def on_host(name: str, value: Any) -> Any:
    """Lists as arrays of NumPy; arrays of JAX stay where they are."""
    if isinstance(value, jax.Array):
        return value
    try:
        found = np.asarray(value)
    except (TypeError, ValueError):
        raise no_numbers(name, value) from None
    if found.dtype.kind in "OSU":
        raise no_numbers(name, value)
    return found


def no_numbers(name: str, value: Any) -> InputError:
    """The error for what is no array."""
    return InputError(
        f"{name}: expected rows of numbers, all of one length, found {type(value).__name__}; pad them, and give "
        "attention_mask"
    )


def narrowed(value: Any) -> Any:
    """An array of NumPy; integers that JAX's would cut off are as great as they can be, so that they stay wrong."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        return value
    limit = np.iinfo(np.int64 if jax.config.jax_enable_x64 else np.int32)  # type: ignore[attr-defined]
    return value.clip(limit.min, limit.max) if value.dtype.itemsize == 8 else value


def check_remat(policy: str | None) -> None:
    """What a backward pass computes again is the name of a policy, one that needs nothing more."""
    if policy is not None and policy not in POLICIES:
        raise InputError(f"remat: expected None or one of {', '.join(POLICIES)}, found {policy!r}")


def as_dtype(name: str, dtype: Any) -> Any:
    """A floating-point dtype by itself or by its name, such as "bfloat16"; None stays None."""
    if dtype is None:
        return None
    found = jnp.dtype(float_name(name, dtype))
    if found == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise InputError(f'{name}: JAX computes in float64 only after jax.config.update("jax_enable_x64", True)')
    return found


def check_classes(labels: Array | None, number: int) -> None:
    """Labels have to be classes or -100; what is wrong in them but their values, the loss finds while it is traced."""
    if labels is not None and jnp.issubdtype(labels.dtype, jnp.integer):
        inputs.check_classes(facts(labels), number)


def check_key(name: str, key: Any) -> None:
    """Dropout is drawn with one key, typed or of the old kind."""
    dtype, rank = getattr(key, "dtype", None), np.ndim(key)
    if dtype is None or not (
        dtype == np.uint32 if rank == 1 else not rank and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    ):
        found = type(key).__name__ if dtype is None else f"{dtype}{list(np.shape(key))}"
        raise InputError(f"{name}: expected one key, such as jax.random.key(0), found {found}")


def as_flag(name: str, value: Any) -> bool:
    """Whether something is wanted; it decides what is compiled."""
    try:
        return bool(value)
    except (TypeError, ValueError):  # traced, or several values
        raise InputError(f"{name}: expected True or False, found {type(value).__name__}; it cannot be traced") from None


def interceptors() -> tuple[Any, ...]:
    """The functions that `nn.intercept_methods` has set."""
    return tuple(nn.module._global_interceptor_stack)  # Flax shows them nowhere else
