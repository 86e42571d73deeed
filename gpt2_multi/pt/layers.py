"""Tensors and parameters of PyTorch: to and from NumPy, their dtypes, their first values, what is known of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gpt2_multi.errors import InputError
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
_FORWARD = nn.Linear.forward
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
WORTHWHILE = 2**20  # products, below which the 40 microseconds of a call of oneDNN are more than it saves


def as_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by itself or by its name, such as "bfloat16"; None stays None."""
    return None if dtype is None else getattr(torch, float_name(name, dtype))


def to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor on the array's memory, bfloat16 included."""
    if array.dtype == _BFLOAT16:  # which torch.from_numpy does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """An array with the tensor's values, bfloat16 included, on its memory where that is the CPU's."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
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
    """Whether a tensor has values already, and may be asked for them: not while anything is traced."""
    if torch.compiler.is_compiling() or x.is_meta or active_fake_mode() is not None:
        return False
    if x.is_cuda and (torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing()):
        return False  # a training step must not wait, a graph cannot; CUDA's kernels stop at a wrong index themselves
    is_plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__  # no fake one, no DTensor
    return is_plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_at_hand(x: Tensor) -> bool:
    """Whether looking at a value does not wait for another device, which does better with much to do ahead of it."""
    return x.device.type == "cpu"


def project(layer: Any, x: Any) -> Any:
    """What a projection gives of (..., in): (..., out).

    Where only nn.Linear's own code would run, in float32 on a CPU and with nothing to record, oneDNN multiplies: it
    reads rows of (out, in) faster than BLAS, and several rows in half the time.
    """
    if torch.compiler.is_compiling() or not (
        is_plain(x) and is_bare(layer) and x.numel() * layer.out_features >= WORTHWHILE
    ):
        return layer(x)
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is nn.Linear itself in float32 on a CPU, which nobody has hooked, replaced or adapted."""
    if type(layer) is not nn.Linear or nn.Linear.forward is not _FORWARD or "forward" in vars(layer):
        return False
    weight = layer.weight
    is_own = type(weight) is nn.Parameter and weight.is_cpu and weight.dtype == torch.float32 and weight.is_contiguous()
    is_hooked = layer._forward_hooks or layer._forward_pre_hooks or _has_any_global_hook()  # type: ignore[no-untyped-call]
    return is_own and not is_hooked


def is_plain(x: Any) -> bool:
    """Whether numbers in float32 on a CPU are to be computed with, and nobody records, traces or changes that."""
    if torch.is_grad_enabled() or type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32:
        return False
    if not HAS_ONEDNN or not torch.backends.mkldnn.enabled or torch.is_autocast_enabled("cpu"):
        return False
    modes = (torch._C._get_tracing_state(), _get_current_dispatch_mode(), torch._C._functorch.peek_interpreter_stack())
    return all(mode is None for mode in modes)


def initialise(weight: Weight, tensor: Tensor) -> Tensor:
    """Fill a new tensor as the table says."""
    return tensor.normal_(std=weight.std) if weight.std else tensor.fill_(weight.constant)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter another value and shape; a frozen one stays frozen."""
    setattr(module, name, nn.Parameter(value, getattr(module, name).requires_grad))
