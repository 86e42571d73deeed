"""Tensors and parameters of PyTorch: to and from NumPy, their dtypes, their first values, what is known of them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gpt2_multi.errors import InputError
from gpt2_multi.model.checkpoint.quantized import GREATEST, LEAST, UNIFORM
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import float_name
from gpt2_multi.model.inputs import Facts
from gpt2_multi.model.weights import Weight

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMPY = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: _BFLOAT16,
}
_EXTENDED = {  # what NumPy has by ml_dtypes alone: the integers that both know it as
    torch.bfloat16: (torch.int16, _BFLOAT16),
    torch.float8_e4m3fn: (torch.int8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.int8, np.dtype(ml_dtypes.float8_e5m2)),
}
_FORWARD, _LINEAR = nn.Linear.forward, F.linear
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
gelu = partial(F.gelu, approximate="tanh")
SCALED = "weight_scale"  # what a layer in int8 has beside its weight
WORTHWHILE = 2**19  # products, below which a call of oneDNN takes longer than it saves


def as_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by itself or by its name, such as "bfloat16"; None stays None."""
    return None if dtype is None else getattr(torch, float_name(name, dtype))


def to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor on the array's memory, bfloat16 and float8 included."""
    for dtype, (integers, known) in _EXTENDED.items():  # which torch.from_numpy does not know
        if array.dtype == known:
            return torch.from_numpy(array.view(f"i{integers.itemsize}")).view(dtype)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """An array with the tensor's values, bfloat16 and float8 included, on its memory where that is the CPU's."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in _EXTENDED:
        integers, dtype = _EXTENDED[tensor.dtype]
        return tensor.view(integers).numpy().view(dtype)
    return tensor.numpy()


def contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in row-major order and in this dtype, copied once where it has to be."""
    return tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()


def facts(name: str, x: object) -> Facts:
    """What is known of an input; while it is traced, or in vmap, not its values."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name}: expected a torch.Tensor, found {type(x).__name__}; use torch.as_tensor")
    kind = "integers" if x.dtype in (torch.int64, torch.int32) else "floats" if x.is_floating_point() else "others"
    return Facts(tuple(x.shape), str(x.dtype), kind, lambda: to_numpy(x) if is_concrete(x) else None)


def is_concrete(x: Tensor) -> bool:
    """Whether a tensor has values already, and may be asked for them: not while anything is traced, or CUDA trains."""
    waits = x.is_cuda and torch.is_grad_enabled()  # a step must not; CUDA's kernels stop at a wrong index themselves
    return not waits and has_values(x)


def has_values(x: Tensor) -> bool:
    """Whether a tensor has values already, for which a device may have to be waited: not while anything is traced."""
    if torch.compiler.is_compiling() or x.is_meta or active_fake_mode() is not None:
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    is_plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__  # no fake one, no DTensor
    return is_plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_at_hand(x: Tensor) -> bool:
    """Whether looking at a value does not wait for another device, which does better with much to do ahead of it."""
    return x.device.type == "cpu"


def perceptron(first: Any, second: Any, x: Tensor) -> Tensor | None:
    """What two projections give with GELU between them, if `Perceptron` may compute it."""
    is_quick = torch.is_grad_enabled() and is_plain(x) and x.numel() * first.out_features >= WORTHWHILE
    if not (is_quick and is_bare(first) and is_bare(second)) or first.bias is None or second.bias is None:
        return None
    return Perceptron.apply(x, first.weight, first.bias, second.weight, second.bias)  # type: ignore[no-untyped-call]


def project(layer: Any, x: Any) -> Any:
    """What a projection gives of (..., in): (..., out).

    Where only nn.Linear's own code would run, in float32 on a CPU, oneDNN multiplies: it reads rows of (out, in) faster
    than BLAS, and several rows in half the time.
    """
    if torch.compiler.is_compiling() or not (
        is_plain(x) and is_bare(layer) and x.numel() * layer.out_features >= WORTHWHILE
    ):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What F.linear gives, by oneDNN where it is quicker."""
    if torch.is_grad_enabled() and has_onednn(x):
        return Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return multiply(x, weight, bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., in), (out, in) and (out,) -> (..., out), by oneDNN if it can; nothing is recorded."""
    if not has_onednn(x):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """What nn.Linear gives, whose products are oneDNN's forward and backward: `apply(x, weight, bias)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        times, (of_x, *rest) = multiply if is_last(grad) else F.linear, ctx.needs_input_grad
        grad = grad.contiguous()  # it may be one number, expanded
        return times(grad, weight.t()) if of_x else None, *of_layer(x, grad, rest, times)


class Perceptron(torch.autograd.Function):
    """Two projections with GELU between them, `apply(x, weight, bias, weight, bias)`.

    It keeps what is before the GELU, and computes what is after it again: a quarter less than a block keeps without it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Tensor) -> Tensor:
        before = multiply(x, *given[:2])
        ctx.save_for_backward(before, x, *given)
        return multiply(gelu(before), *given[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before, *given = ctx.saved_tensors
        x, first, _, second, _ = given
        if torch.is_grad_enabled():
            return derived(
                lambda x, w, b, v, c: F.linear(gelu(F.linear(x, w, b)), v, c), given, ctx.needs_input_grad, grad
            )
        times, grad = multiply if is_last(grad) else F.linear, grad.contiguous()
        inner = torch.ops.aten.gelu_backward(times(grad, second.t()), before, approximate="tanh")
        of_second, of_first = ctx.needs_input_grad[3:], ctx.needs_input_grad[1:3]
        return (
            times(inner, first.t()) if ctx.needs_input_grad[0] else None,
            *of_layer(x, inner, of_first, times),
            *of_layer(gelu(before) if of_second[0] else None, grad, of_second, times),
        )


def of_layer(
    x: Tensor | None, grad: Tensor, wanted: Sequence[bool], times: Callable[..., Tensor] = multiply
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a layer's weight and bias, by its input and the gradient of its output, as far as wanted."""
    columns = grad.reshape(-1, grad.shape[-1]).t()  # (out, N)
    of_weight = times(columns, x.reshape(-1, x.shape[-1]).t()) if x is not None and wanted[0] else None
    return of_weight, columns.sum(1) if wanted[1] else None


def is_last(grad: Tensor) -> bool:
    """Whether a gradient is neither derived once more, nor one of many, nor watched on its way."""
    is_batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # by `is_grads_batched`
    return not torch.is_grad_enabled() and not is_batched and is_unchanged(grad)


def derived(
    call: Callable[..., Tensor], given: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a call, as far as they are wanted, which are to be derived once more."""
    # Whatever else depends on a tensor, as on a weight that is tied, is not of a view.
    views = [x.view_as(x) for x in given]
    needed = [x for x, is_wanted in zip(views, wanted, strict=False) if is_wanted]
    found = iter(torch.autograd.grad(call(*views), needed, grad, create_graph=True))
    return tuple(next(found) if is_wanted else None for is_wanted in wanted)


def is_bare(layer: Any) -> bool:
    """Whether a layer is nn.Linear itself in float32 on a CPU, which nobody has hooked, replaced or adapted."""
    if not (is_own(layer) and is_float32(layer.weight)):
        return False
    return layer.weight.is_contiguous() or layer.weight.mT.is_contiguous()  # as a mapped file has it


def is_own(layer: Any) -> bool:
    """Whether a layer is nn.Linear itself, which nobody has hooked, replaced or adapted."""
    if type(layer) is not nn.Linear or nn.Linear.forward is not _FORWARD or "forward" in vars(layer):
        return False
    before = layer._forward_pre_hooks or layer._backward_pre_hooks
    is_hooked = before or layer._forward_hooks or layer._backward_hooks or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return type(layer.weight) is nn.Parameter and not is_hooked


def is_float32(x: Tensor) -> bool:
    """Whether numbers are those that oneDNN is quicker with: dense, in float32 on a CPU."""
    return x.is_cpu and x.dtype == torch.float32 and x.layout is torch.strided


def is_plain(x: Any) -> bool:
    """Whether numbers in float32 on a CPU are to be computed with, and nobody traces or changes that."""
    return is_unchanged(x) and has_onednn(x) and not torch.is_autocast_enabled("cpu")


def is_unchanged(x: Any) -> bool:
    """Whether a tensor is computed with as it is said: nobody traces, batches, derives forward, or replaces calls."""
    modes = (torch._C._get_tracing_state(), _get_current_dispatch_mode(), torch._C._functorch.peek_interpreter_stack())
    is_seen = F.linear is not _LINEAR or torch._C._len_torch_function_stack()
    is_there = type(x) is Tensor and not x.is_meta and not is_seen
    return is_there and forward_ad._current_level < 0 and all(mode is None for mode in modes)


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN is there for it."""
    return HAS_ONEDNN and bool(torch.backends.mkldnn.enabled) and is_float32(x)


def fingerprint(x: Tensor) -> Tensor:
    """The sums of each row's and each column's bits, as integers: others where numbers have changed, however written.

    And each row's first number: where all of a row have another sign, their sum overflows to what it was.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    bits = x.detach().view(integers).flatten(0, -2)  # (N, E)
    wide = torch.int64 if x.itemsize == 1 else integers  # sums of bytes would say little
    return torch.cat([bits.sum(1, dtype=wide), bits.sum(0, dtype=wide), bits[:, 0]])


def give_back() -> None:
    """Have memory that was freed go back to the system; of blocks that are not huge, glibc keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def initialise(weight: Weight, tensor: Tensor, scale: Tensor | None = None) -> Tensor:
    """Fill a new tensor as the table says; integers with their scales."""
    if scale is not None:
        scale.fill_(weight.std / UNIFORM)
        return tensor.random_(-GREATEST, GREATEST + 1)
    return tensor.normal_(std=weight.std) if weight.std else tensor.fill_(weight.constant)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter another value and shape; a frozen one stays frozen."""
    setattr(module, name, nn.Parameter(value, getattr(module, name).requires_grad))


def projection(config: GPT2Config, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A product of the blocks, or the head: in int8 where the configuration says so."""
    return (nn.Linear if config.quantization is None else QuantizedLinear)(inputs, outputs, bias)


def embedding(config: GPT2Config) -> nn.Embedding:
    """The embedding of tokens: in int8 where the configuration says so."""
    return (bare_embedding if config.quantization is None else QuantizedEmbedding)(config.vocab_size, config.n_embd)


def bare_embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without first values: to have those on "meta", PyTorch would import its compiler for seconds."""
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The integers from -127 to 127 that the numbers of each row are nearest to, as floats, and the row's scale."""
    scale = x.abs().amax(-1, keepdim=True).div_(GREATEST).clamp_min_(LEAST)
    return (x / scale).round_(), scale


@cache
def multiplies_int8() -> bool:
    """Whether oneDNN multiplies int8 here, and exactly: processors without VNNI add up in 16 bits, which overflow."""
    if not HAS_ONEDNN or not hasattr(torch, "_int_mm"):
        return False
    ones = torch.full((2, 64), GREATEST, dtype=torch.int8)
    weight, exact = torch.full((64, 64), GREATEST, dtype=torch.int8), 64 * GREATEST * GREATEST
    with torch.no_grad():
        try:
            found = torch._int_mm(ones, weight.t()), multiplied(ones.float(), packed(weight), torch.ones(64))
        except (AttributeError, RuntimeError, TypeError):  # of a version that takes others, or without the kernel
            return False
    return all(bool((y == exact).all()) for y in found)


def packed(weight: Tensor) -> Tensor:
    """Integers (out, in) in the order in which oneDNN reads them for several rows."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def multiplied(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Integers as floats (R, in), which it may write to, by packed ones with their scales: (R, out)

    oneDNN is quick at unsigned integers, from which it takes 128 again.
    """
    zero = torch.zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        rows.add_(GREATEST + 1).to(torch.uint8), 1.0, GREATEST + 1, weight, scale, zero, None, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip


def integers(*shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters in int8, and a scale for each row of them."""
    made = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], dtype=torch.float32)
    return nn.Parameter(made[0], requires_grad=False), nn.Parameter(made[1], requires_grad=False)


def keeping_scale(layer: Any, apply: Any, *given: Any) -> Any:
    """What nn.Module's `_apply` does to a layer; its scales stay float32 where all else becomes narrower."""
    scale = layer.weight_scale.data
    apply(*given)
    if torch.finfo(layer.weight_scale.dtype).bits < 32:
        layer.weight_scale.data = scale.to(layer.weight_scale.device)
    return layer


class QuantizedLinear(nn.Linear):
    """nn.Linear with its weight in int8, (out, in), a scale for each output; what it takes is rounded alike, by rows.

    On a CPU, in float32 and where no gradient is asked for, oneDNN multiplies integers. Otherwise the same integers are
    multiplied as floats; a gradient goes through as if nothing were rounded.
    """

    weight_scale: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight, self.weight_scale = integers(out_features, in_features)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return keeping_scale(self, super()._apply, fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        is_recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
        if is_recorded or not (is_plain(x) and multiplies_int8() and self.is_at_home()):
            return self.product(x)
        return self.multiply(x)

    def multiply(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The product of integers, in float32 on a CPU; weight: of those that `packed` gives."""
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        if weight is None:
            y = torch._int_mm(rows.to(torch.int8), self.weight.t()) * self.weight_scale
        else:
            y = multiplied(rows, weight, self.weight_scale)
        y = y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale, out=y)
        return y.view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        """The same in any dtype and on any device, with a gradient."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad():
            rows, scale = quantize_rows(x.to(wide))
        if x.requires_grad:
            exact = x.to(wide) / scale
            rows = exact + (rows - exact).detach()
        y = F.linear(rows, self.weight.to(wide)) * self.weight_scale.to(wide) * scale  # sums of integers are exact
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def is_at_home(self) -> bool:
        """Whether the parameters are whole, on a CPU, and those that are no integers in float32."""
        found = [x for x in self._parameters.values() if x is not None]
        kinds = (torch.float32, torch.int8)
        return all(type(x) is nn.Parameter and x.is_cpu and x.dtype in kinds and x.is_contiguous() for x in found)


class QuantizedEmbedding(nn.Embedding):
    """nn.Embedding with its rows in int8, each with a scale; a tied head is of the same integers."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim, _weight=torch.empty(num_embeddings, embedding_dim))
        self.weight, self.weight_scale = integers(num_embeddings, embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return keeping_scale(self, super()._apply, fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].to(self.weight_scale.dtype) * self.weight_scale[ids][..., None]


def castable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a dtype is for: all but integers and their scales."""
    found = dict(module.named_parameters())
    return {name: x for name, x in found.items() if x.is_floating_point() and not name.endswith(SCALED)}
