"""Weights that bitsandbytes and torchao quantize: a layer of theirs for each product of the blocks, made one by one.

Embeddings, norms, biases and heads stay as they are. A weight is read, quantized and dropped, so that the model is
never in memory as a whole before it is small.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from gpt2_multi.errors import CheckpointError, InputError, shortened
from gpt2_multi.files.arrays import Array, Made, release
from gpt2_multi.model.checkpoint.programs import SAYS, SCB, STATE, Said, is_skipped
from gpt2_multi.model.spelling import TORCH
from gpt2_multi.model.weights import Weight
from gpt2_multi.pt.layers import contiguous, give_back, to_numpy, to_torch
from gpt2_multi.pt.state import State, check_kind, rows, taken

Layer = Callable[[nn.Linear, Tensor], nn.Module]  # a layer, and its weight (out, in): the one that stands in its place
KINDS = ("Linear4bit", "Linear8bitLt")
OLDEST = {"bitsandbytes": "0.48.1", "torchao": "0.18"}  # before, saved weights in 8 bits came back as others, or not


def check_plain(state: Mapping[str, Any]) -> None:
    """A state dictionary that a model is made of has no weights of torchao, which config.json would have to name."""
    for name, x in state.items():
        if is_of_torchao(x):
            raise InputError(
                f"state_dict: {name} is a {type(x).__name__} of torchao; give it to load_state_dict of a model with "
                "the same quantization_config, or load a folder that save_pretrained wrote"
            )


def chosen(model: Any, said: Said, packed: Mapping[str, Any]) -> dict[str, Weight]:
    """The rows that are quantized, by the names of their parameters: what the files have so, or products of blocks."""
    found = rows(model)
    if packed:
        return {name: row for name, row in found.items() if row.name in packed}
    path = {name: name.removesuffix(".weight") for name in found}
    return {name: row for name, row in found.items() if row.kind == "kernel" and not is_skipped(path[name], said)}


def install(
    model: Any,
    said: Said,
    found: Mapping[str, Weight],
    arrays: Mapping[str, Array],
    packed: Mapping[str, Mapping[str, Array]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put the quantized layers into a model, which has all else; of `arrays` one is read at a time."""
    made = maker(said)
    for name, row in found.items():
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if SAYS in packed.get(row.name, ()):
            new = restored_by_torchao(layer, packed[row.name], name, dtype, device)
        elif row.name in packed:
            new = restored(said, layer, packed[row.name], name, device)
        else:
            weight = contiguous(TORCH.layout(row, to_torch(arrays[row.name])), dtype).to(device)
            new = made(layer, weight)
            del weight
            release(arrays[row.name])
            give_back()  # what was between, which the allocator would keep
        model.set_submodule(path, new.requires_grad_(False))
    mark(model, said)


def mark(model: Any, said: Said) -> None:
    """Say of a model what PEFT, accelerate and the files ask."""
    model.quantization_method = said["quant_method"]
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bool(said.get("load_in_4bit")), bool(said.get("load_in_8bit"))
    model.config.quantization_config = dict(said)
    model.register_load_state_dict_pre_hook(take_over)
    if said["quant_method"] == "torchao":  # where PEFT looks for what merged weights are quantized by
        config = SimpleNamespace(get_apply_tensor_subclass=partial(torchao_config, said))
        model.hf_quantizer = SimpleNamespace(quantization_config=config, is_trainable=False)


def take_over(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dictionary is loaded: what it has of quantized weights has to be quantized as the model's are."""
    said = model.config.quantization_config
    for path, layer in list(model.named_modules()):
        name = f"{prefix}{path}.weight"
        kind = type(layer).__name__
        if name not in state or not (kind in KINDS or is_of_torchao(getattr(layer, "weight", None))):
            continue
        whole = STATE + str(said.get("bnb_4bit_quant_type")) if kind == KINDS[0] else ""
        fits = type(state[name]).__name__ == type(layer.weight).__name__ or kind in KINDS
        if not fits or state[name].dtype != layer.weight.dtype or name + whole not in state:
            raise CheckpointError(
                f"load_state_dict: {name} is not quantized as the model's is, by {said['quant_method']}; give it to "
                "from_pretrained as state_dict, with this quantization_config"
            )
        if whole:
            parts = {key[len(name) :]: state.pop(key) for key in list(state) if key.startswith(name)}
            parts = {part: to_numpy(x) for part, x in parts.items()}
            new = restored(said, layer, parts, name, layer.weight.device).requires_grad_(False)
            model.set_submodule(path, new)
            state[name] = new.weight


def maker(said: Said) -> Layer:
    """What quantizes a layer; InputError where the program is not installed."""
    if said["quant_method"] == "torchao":
        return torchao_maker(said)
    bnb = imported("bitsandbytes")
    return partial(in_8_bits if said["load_in_8bit"] else in_4_bits, bnb, said)


def imported(name: str) -> Any:
    """A program that quantizes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels for machines other than this one
            found: Any = __import__(name)
    except ImportError:
        raise InputError(f'quantization_config: needs {name}: pip install "gpt2-multi[large]"') from None
    if TorchVersion(found.__version__) < OLDEST[name]:
        raise InputError(
            f"quantization_config: needs {name} {OLDEST[name]} or newer, found {found.__version__}: "
            'pip install -U "gpt2-multi[large]"'
        )
    return found


def in_4_bits(bnb: Any, said: Said, layer: nn.Linear, weight: Tensor) -> nn.Module:
    """A layer in NF4 or FP4."""
    new = empty_in_4_bits(bnb, said, layer)
    device = weight.device
    new.weight = bnb.nn.Params4bit(
        weight,
        compress_statistics=said["bnb_4bit_use_double_quant"],
        quant_type=said["bnb_4bit_quant_type"],
        module=new,
    ).to(device)
    return new


def empty_in_4_bits(bnb: Any, said: Said, layer: nn.Linear) -> Any:
    """A layer in 4 bits that has no weight yet, with the bias of another."""
    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, getattr(torch, said["bnb_4bit_compute_dtype"]),
        said["bnb_4bit_use_double_quant"], said["bnb_4bit_quant_type"], device="meta",
    )  # fmt: skip
    new.bias = layer.bias
    # On some processors it would pack its weight anew at the first call, with scales in bfloat16, and save these.
    new.support_avx512bf16_for_cpu = False
    return new


def in_8_bits(bnb: Any, said: Said, layer: nn.Linear, weight: Tensor) -> nn.Module:
    """A layer in the integers of LLM.int8."""
    new = empty_in_8_bits(bnb, said, layer)
    new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    return new


def empty_in_8_bits(bnb: Any, said: Said, layer: nn.Linear) -> Any:
    """A layer in 8 bits that has no weight yet, with the bias of another."""
    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False,
        threshold=said["llm_int8_threshold"], device="meta",
    )  # fmt: skip
    new.bias = layer.bias
    return new


def restored(said: Said, layer: nn.Linear, parts: Mapping[str, Array], name: str, device: torch.device) -> nn.Module:
    """A layer from what a file has of it: in 4 bits its state, in 8 bits its scales."""
    bnb = imported("bitsandbytes")
    tensors = {part: to_torch(array).clone() for part, array in parts.items()}
    shape = (layer.out_features, layer.in_features)
    try:
        if SCB in tensors:
            new, found = empty_in_8_bits(bnb, said, layer), tuple(tensors[""].shape)
            new.weight = bnb.nn.Int8Params(tensors[""], False, SCB=tensors[SCB]).to(device)
            fits = tensors[SCB].shape == shape[:1]
        else:
            new, data = empty_in_4_bits(bnb, said, layer), tensors.pop("")
            stats = {part.removeprefix("."): x for part, x in tensors.items()}
            new.weight = bnb.nn.Params4bit.from_prequantized(data, stats, device=device, module=new)
            found = tuple(new.weight.quant_state.shape)
            fits = data.numel() * 2 == layer.in_features * layer.out_features
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: not what bitsandbytes writes ({shortened(str(error))}); fetch it again"
        ) from None
    if found != shape or not fits:
        raise CheckpointError(f"{name}: bitsandbytes has quantized {found}, expected {shape}; fetch or save it again")
    return new


def torchao_config(said: Said) -> Any:
    """torchao's own configuration of what is said."""
    imported("torchao")
    from torchao.core.config import config_from_dict

    try:
        return config_from_dict(dict(said["quant_type"]["default"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"quantization_config: torchao knows no such quant_type: {shortened(str(error))}") from None


def torchao_maker(said: Said) -> Layer:
    """What quantizes a layer by torchao, which leaves it an nn.Linear with a weight of another kind."""
    config = torchao_config(said)
    from torchao.quantization import quantize_

    def made(layer: nn.Linear, weight: Tensor) -> nn.Module:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantize_(layer, config)
        except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            why = shortened(" ".join(str(error).split()), 300)
            raise InputError(
                f"quantization_config: torchao cannot make {type(config).__name__} of a weight "
                f"{tuple(weight.shape)} in {weight.dtype} on {weight.device}: {why}"
            ) from None
        return layer

    return made


def quantized(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The layers of bitsandbytes in a model, by their names."""
    return ((name, part) for name, part in model.named_modules() if type(part).__name__ in KINDS)


def unpacked_numel(parameter: nn.Parameter) -> int:
    """How many numbers a parameter is, of which bitsandbytes may have packed two in a byte."""
    shape: tuple[int, ...] = getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape
    return math.prod(shape)


def restored_by_torchao(
    layer: nn.Linear, parts: Mapping[str, Array], name: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A layer from what a file has of its weight, tensors and a text, of which torchao makes one in this dtype."""
    imported("torchao")
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    before = f"{name.removesuffix('.weight')}._weight_"
    tensors = {f"{before}{part}": to_torch(array).clone() for part, array in parts.items() if part != SAYS}
    says, shape = bytes(parts[SAYS]).decode(), (layer.out_features, layer.in_features)
    try:
        made, rest = unflatten_tensor_state_dict(tensors, {name: says, "tensor_names": json.dumps([name])})
        weight = cast(made[name], dtype).to(device)
        found, is_whole = tuple(weight.dequantize().shape), not rest and tuple(weight.shape) == shape
    except (
        AssertionError,
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        why = shortened(" ".join(str(error).split()))
        raise CheckpointError(f"{name}: not what torchao writes ({why}); fetch or save it again") from None
    if found != shape or not is_whole:
        raise CheckpointError(f"{name}: torchao has quantized {found}, expected {shape}; fetch or save it again")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def is_of_torchao(weight: Any) -> bool:
    """Whether torchao has made a weight."""
    return type(weight).__module__.partition(".")[0] == "torchao"


def cast(weight: Any, dtype: torch.dtype) -> Any:
    """A weight of torchao that stands for numbers in another dtype; what it has of them, it keeps."""
    if weight.dtype == dtype:
        return weight
    kinds = ("tensor_data_names", "optional_tensor_data_names", "tensor_attribute_names")
    names = [name for kind in (*kinds, "optional_tensor_attribute_names") for name in getattr(weight, kind, ())]
    if "dtype" not in names:
        raise InputError(
            f"dtype: expected {weight.dtype}, in which torchao has made a {type(weight).__name__}, found {dtype}; load "
            "what was quantized, with this dtype"
        )
    return type(weight)(**{name: getattr(weight, name) for name in names} | {"dtype": dtype})


def follow(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Have the weights of torchao cast as others of a model were, which torch leaves as they are."""
    for layer in model.modules():
        weight: Any = getattr(layer, "weight", None)
        if is_of_torchao(weight):
            dtype = change(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
            layer.weight = nn.Parameter(cast(weight, dtype), requires_grad=False)


def parts_of_torchao(model: Any, state: State = None) -> tuple[dict[str, Made], dict[str, str]]:
    """What torchao has made of weights, to be written as it and transformers do; and what it says of each.

    Weights of a state dictionary in the place of the model's own have to be made as these are.
    """
    found: dict[str, Made] = {}
    said: dict[str, str] = {}
    for name in rows(model) if model.config.quantizer == "torchao" else ():
        own = model.get_parameter(name)
        if not is_of_torchao(own):
            continue
        weight = taken(state, name, own)
        check_kind(name, kind_of(weight), kind_of(own))
        parts, said[name] = flattened(name, weight)
        check_kind(name, said[name], flattened(name, own)[1])
        for part, x in parts.items():
            leaf = part.rpartition("._weight_")[2]
            make = partial(lambda weight, leaf: to_numpy(getattr(weight, leaf)), weight, leaf)
            found[part] = to_numpy(x.new_empty(0)).dtype, tuple(x.shape), make
    return found, said


def check_said(model: Any, said: Mapping[str, str]) -> None:
    """Files keep what torchao has made where config.json says so, which its `quantize_` does not do by itself."""
    for name, x in model.named_parameters():
        if is_of_torchao(x) and name not in said:
            raise CheckpointError(
                f"save_pretrained: {name} is {kind_of(x)}, of which config.json says nothing; load the model with "
                "quantization_config in the place of torchao's quantize_, or save it before"
            )


def flattened(name: str, weight: Tensor) -> tuple[dict[str, Tensor], str]:
    """The tensors that a weight of torchao is made of, by their names in a file, and what it says of them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    try:
        parts, says = flatten_tensor_state_dict({name: weight})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"save_pretrained: {name} is a {type(weight).__name__}, which torchao does not write "
            f"({shortened(str(error))}); save the model without quantization_config, and give it when you load that"
        ) from None
    return parts, says[name]


def kind_of(x: Tensor) -> str:
    """What a tensor is of, and its shape."""
    kind = type(x).__name__ if is_of_torchao(x) else str(x.dtype).removeprefix("torch.")
    return f"{kind}{list(x.shape)}"


def made_by_others(model: Any, state: State = None) -> dict[str, Made]:
    """What bitsandbytes has made of weights, to be written under the names that transformers reads.

    Tensors of a state dictionary in the place of the model's own have to be made as these are.
    """
    found: dict[str, Made] = {}
    for path, layer in quantized(model):
        for name, own in layer.state_dict(prefix=f"{path}.").items():
            if name != f"{path}.bias":
                x = taken(state, name, own)
                like = own.new_empty(x.shape) if STATE in name else own  # a text, with numbers that may be longer
                check_kind(name, kind_of(x), kind_of(like))
                found[name] = to_numpy(x.new_empty(0)).dtype, tuple(x.shape), partial(to_numpy, x)
    return found
