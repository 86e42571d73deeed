"""Weights that other programs quantize, bitsandbytes and torchao: what is asked of them, and what files hold of it.

What is asked is a dict, as config.json has it under `quantization_config`, in the words of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gpt2_multi.errors import CheckpointError, ConfigError, InputError, described, nearest, shortened
from gpt2_multi.files.arrays import Array
from gpt2_multi.model.checkpoint.source import Source
from gpt2_multi.model.config import INT8, GPT2Config
from gpt2_multi.model.fields import float_name
from gpt2_multi.model.weights import Weight, table

PROGRAMS = ("bitsandbytes", "torchao")
STATE = ".quant_state.bitsandbytes__"  # what is left of a name in 4 bits behind ".weight"
PART = re.compile(r"(.+)\._weight_(\w+)")  # a tensor of a weight of torchao, in a file
SAYS = "says torchao"  # among the parts of such a weight: what a file says of it
SCB = ".SCB"  # scales in 8 bits, beside ".weight"
Said = Mapping[str, Any]


class Programs(NamedTuple):
    """That other programs may quantize, and what is wanted of one."""

    wanted: Said | None


@dataclass(kw_only=True)
class BitsAndBytesConfig:
    """What bitsandbytes makes of the weights, in the words of transformers' class of this name, which may be given too.

    `load_in_8bit` (LLM.int8, Dettmers 2022) or `load_in_4bit` (QLoRA, Dettmers 2023). dtypes may be names. Raises
    InputError for what no weights are quantized to.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = "float32"
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = "uint8"
    quant_method: ClassVar[str] = "bitsandbytes"

    def __post_init__(self) -> None:
        if self.load_in_8bit == self.load_in_4bit:
            raise InputError(
                f"quantization_config: expected load_in_8bit=True or load_in_4bit=True, found {self.load_in_8bit} and "
                f"{self.load_in_4bit}; give one of them"
            )
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            found = shortened(repr(self.bnb_4bit_quant_type))
            raise InputError(f'bnb_4bit_quant_type: expected "nf4" or "fp4", found {found}')
        if self.llm_int8_has_fp16_weight:
            raise InputError("llm_int8_has_fp16_weight: keeps weights in float16; leave it out, and give dtype")
        if str(self.bnb_4bit_quant_storage or "uint8").removeprefix("torch.") != "uint8":
            raise InputError(
                f"bnb_4bit_quant_storage: expected uint8, found {self.bnb_4bit_quant_storage}; leave it out"
            )
        self.bnb_4bit_quant_storage = "uint8"
        self.bnb_4bit_compute_dtype = float_name("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype or "float32")

    def to_dict(self) -> dict[str, Any]:
        """Its fields, as config.json has them."""
        return {**asdict(self), "quant_method": self.quant_method}


def said_by(given: Any) -> Said | None:
    """What a `quantization_config` says, as config.json has it: a dict, or an object of transformers or torchao."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return sound(given)
    if hasattr(given, "to_dict"):
        return sound(given.to_dict())
    if type(given).__module__.partition(".")[0] == "torchao":
        from torchao.core.config import config_to_dict

        return {"quant_method": "torchao", "quant_type": {"default": config_to_dict(given)}}
    raise InputError(
        f"quantization_config: expected a BitsAndBytesConfig, a TorchAoConfig or a configuration of torchao, found "
        f"{described(given)}"
    )


def sound(keys: Said) -> Said:
    """What is said, checked as far as it is known without the program; InputError for another program's."""
    method = getattr(keys.get("quant_method"), "value", keys.get("quant_method"))
    if method is None and (keys.get("load_in_8bit") or keys.get("load_in_4bit")):
        method = "bitsandbytes"
    if method not in PROGRAMS:
        raise InputError(
            f"quantization_config: expected the method {' or '.join(PROGRAMS)}, found {shortened(repr(method))}; load "
            'what was quantized, with one of these or with quantization="int8"'
        )
    if method == "torchao":
        if not isinstance(keys.get("quant_type"), Mapping) or keys["quant_type"].keys() != {"default"}:
            raise InputError("quantization_config: expected a quant_type with a default, as TorchAoConfig writes it")
        if keys.get("include_input_output_embeddings"):
            raise InputError(
                "include_input_output_embeddings: embeddings and their head stay as they are; leave it out"
            )
        return {**keys, "quant_method": method}
    known = BitsAndBytesConfig.__dataclass_fields__
    rest = {name: value for name, value in keys.items() if not name.startswith("_") and name != "quant_method"}
    for name in rest.keys() - known.keys():
        raise InputError(f"quantization_config: BitsAndBytesConfig has no {name!r}{nearest(name, known)}")
    return BitsAndBytesConfig(**rest).to_dict()


def program_of(config: GPT2Config) -> Said | None:
    """What a configuration says that another program has done to its weights; None where none did."""
    found = config.extra.get("quantization_config")
    if found is None or found == INT8:
        return None
    try:
        return sound(found if isinstance(found, Mapping) else {"quant_method": found})
    except InputError as error:
        raise ConfigError(str(error)) from None


def agreed(stored: Said | None, wanted: Said | None, packed: Packed, where: str) -> Said | None:
    """What a model is to be, by its files and by its caller, who may not want others than the files have."""
    by = {"torchao" if SAYS in parts else "bitsandbytes" for parts in packed.values()}
    if by and (stored is None or by != {stored["quant_method"]}):
        raise CheckpointError(
            f"{where}: holds weights that {' and '.join(sorted(by))} has quantized, of which config.json says nothing, "
            "or which are wanted otherwise; load what was quantized"
        )
    if not by or wanted is None:
        return stored if wanted is None else wanted
    of_bitsandbytes = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    fixed = ("quant_method", *of_bitsandbytes, "quant_type")
    for name in fixed:
        if stored is not None and stored.get(name) != wanted.get(name):
            raise InputError(
                f"quantization_config: the files have {name}={stored.get(name)}, found {wanted.get(name)}; leave it "
                "out, or load what was quantized"
            )
    return wanted


def is_skipped(path: str, said: Said) -> bool:
    """Whether a layer stays as it is: one of `llm_int8_skip_modules` or `modules_to_not_convert`, or part of one."""
    patterns = said.get("llm_int8_skip_modules") or said.get("modules_to_not_convert") or ()
    parts = path.split(".")
    above = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(re.fullmatch(pattern, whole) or whole.endswith(f".{pattern}") for pattern in patterns for whole in above)


Packed = dict[
    str, dict[str, Array]
]  # a weight's name in its file -> its parts by what follows this name, or its layer's


def unpacked(source: Source, config: GPT2Config, head: str) -> tuple[dict[str, Array], Packed]:
    """The tensors of a file with what another program has packed taken out; and that, by the names of the weights.

    In its place are zeros of the shape that the weight has there, which take no memory.
    """
    tensors, spelling = source.names.tensors, source.kind.spelling
    names = [name for name in tensors if any(f"{name}{STATE}{kind}" in tensors for kind in ("nf4", "fp4"))]
    names += [name for name in tensors if _layer(name) + SCB in tensors and name.endswith(".weight")]
    packed = {name: _parts(tensors, name) for name in names} | _of_torchao(source)
    if not packed:
        return dict(tensors), {}
    parts = {f"{_layer(name)}._weight_{part}" for name in packed for part in packed[name] if SAYS in packed[name]}
    parts |= {f"{name}{part}" for name in names for part in packed[name]}
    parts |= {f"{_layer(name)}{part}" for name in names for part in (SCB, ".weight_format")}
    rest = {name: array for name, array in tensors.items() if name not in parts}
    rows = {spelling.spell(row, rooted): row for row in _all_rows(config, head) for rooted in (False, True)}
    dtype = next((array.dtype for array in rest.values() if array.dtype.kind not in "iu"), np.dtype(np.float32))
    for name in packed:
        if name not in rows:
            raise CheckpointError(f"{name}: is quantized by another program, and no weight of this GPT-2")
        rest[name] = np.broadcast_to(np.zeros((), dtype), spelling.shape(rows[name]))
    return rest, packed


def _of_torchao(source: Source) -> Packed:
    """What a file has of the weights that torchao has quantized, and under SAYS the text that it says of each."""
    found: Packed = {}
    for name, array in source.names.tensors.items():
        if parts := PART.fullmatch(name):
            found.setdefault(f"{parts[1]}.weight", {})[parts[2]] = array
    says = source.metadata if found else {}
    for name, given in found.items():
        parts = PART.fullmatch(source.names.originals[f"{_layer(name)}._weight_{next(iter(given))}"])
        text = says.get(f"{parts[1]}.weight") if parts else None
        if text is None:
            raise CheckpointError(
                f"{source.path}: has parts of {name}, as torchao writes them, and does not say what they are parts of; "
                "save or fetch it again"
            )
        given[SAYS] = np.frombuffer(text.encode(), np.uint8)
    return found


def metadata(names: Iterable[str], said: Mapping[str, str]) -> dict[str, str]:
    """What a file says of tensors with these names, as torchao has it: which are whole, and what others are parts of.

    `said` is torchao's own of each of the latter.
    """
    whole = {name: '{"_type": "Tensor"}' for name in names if not PART.fullmatch(name)}
    return {**whole, **said, "tensor_names": json.dumps([*whole, *said])}


def _all_rows(config: GPT2Config, head: str) -> list[Weight]:
    return table(config.replace(tie_word_embeddings=False), "lm" if head == "base" else head)


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _parts(tensors: Mapping[str, Array], name: str) -> dict[str, Array]:
    """All that a file has of a weight: "" is itself, ".absmax" and others follow its name, SCB follows its layer's."""
    found = {key[len(name) :]: array for key, array in tensors.items() if key == name or key.startswith(f"{name}.")}
    return found | {SCB: tensors[_layer(name) + SCB]} if _layer(name) + SCB in tensors else found
