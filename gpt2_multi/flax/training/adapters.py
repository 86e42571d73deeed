"""Adapters in files, as peft has them: an adapter that was trained in JAX is loaded in PyTorch, and the other way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from gpt2_multi.errors import CheckpointError, InputError, shortened
from gpt2_multi.files.containers.safetensors import read_safetensors, write_safetensors
from gpt2_multi.files.folders import replaced
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.flax.parameters import tree
from gpt2_multi.flax.parameters.tree import Tree, gathered
from gpt2_multi.flax.training.lora import A, B, LoraConfig, adapted, check_adapters, shapes, whole_heads
from gpt2_multi.model.spelling import FLAX, TORCH
from gpt2_multi.model.weights import Shape, Weight

Array = np.ndarray[Any, Any]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # before peft's names
TASKS = {
    "base": "FEATURE_EXTRACTION", "lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS",
}  # fmt: skip
HONOURED = ("r", "lora_alpha", "use_rslora", "lora_dropout")
# What else may stand in peft's file: what the tensors tell, and what does not matter once it is trained.
HARMLESS = (
    "target_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules",
    "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "runtime_config",
)  # fmt: skip
ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the kernels
}


class Place(NamedTuple):
    """Where a tensor of an adapter's file is: in a leaf of the tree, at a layer where they are stacked."""

    path: tree.Path
    row: Weight
    layer: int | None
    shape: Shape

    def stored(self, value: Any) -> Array:
        """The tensor as it is in the file, gathered from its leaf's value."""
        x = gathered(value if self.layer is None else value[self.layer])
        return self._turned(x.reshape(self.shape[::-1] if self._turns else self.shape))

    def restored(self, x: Array) -> Array:
        """The tensor of a file in the order of the tree."""
        return self._turned(x)

    @property
    def _turns(self) -> bool:
        """Whether it lies the other way round in the tree."""
        return self.path[-1] in (A, B) or FLAX.turns(self.row) != TORCH.turns(self.row)

    def _turned(self, x: Array) -> Array:
        return x.T if self._turns else x


def places(model: Any, lora: LoraConfig) -> Iterator[tuple[str, Place]]:
    """Each tensor of an adapter's file by its name."""
    rooted = model.head != "base"
    for path, leaf in adapted(model, lora).items():
        for layer, row in enumerate(leaf.rows):
            name, (outputs, inputs) = ROOT + TORCH.spell(row, rooted).removesuffix("weight"), TORCH.shape(row)
            for part, shape in ((A, (lora.r, inputs)), (B, (outputs, lora.r))):
                yield f"{name}{part}.weight", Place((*path[:-1], part), row, layer if leaf.stacked else None, shape)
    for path, leaf in whole_heads(model, lora).items():
        row = leaf.rows[0]
        yield ROOT + TORCH.spell(row, rooted), Place(path, row, None, TORCH.shape(row))


def save_adapters(folder: str | os.PathLike[str], model: Any, adapters: Tree, lora: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft loads onto the same model in PyTorch.

    `adapters` are the `params` of a state. On several hosts each has to call it, and the first one writes. Raises
    InputError for adapters that do not fit, and CheckpointError where nothing can be written.
    """
    check_adapters(model, lora, adapters)
    flat = flatten_dict(adapters)
    found = {name: place.stored(flat[place.path]) for name, place in places(model, lora)}
    if jax.process_index() == 0:
        with replaced(folder, lambda path: path.name in (CONFIG, WEIGHTS)) as stage:
            write_json(stage / CONFIG, fields_of(model, lora))
            made = {name: (x.dtype, x.shape, partial(np.ascontiguousarray, x)) for name, x in found.items()}
            write_safetensors(stage / WEIGHTS, made)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")


def fields_of(model: Any, lora: LoraConfig) -> dict[str, Any]:
    """What peft's LoraConfig reads."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    heads = sorted({leaf.rows[0].path for leaf in whole_heads(model, lora).values()})
    return {
        "peft_type": "LORA", "task_type": TASKS.get(model.head), "base_model_name_or_path": model.name_or_path or None,
        "inference_mode": True, "target_modules": targets, "modules_to_save": heads or None, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, **{name: getattr(lora, name) for name in HONOURED},
    }  # fmt: skip


def load_adapters(folder: str | os.PathLike[str], model: Any) -> tuple[Tree, LoraConfig]:
    """Adapters that `save_adapters` or peft's `save_pretrained` wrote, for `merge` and `create_train_state`.

    Raises CheckpointError for a folder without them, for what is no LoRA or a variant that computes otherwise, and for
    tensors that do not fit the model.
    """
    folder = Path(folder)
    fields, arrays = read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)
    try:
        lora = config_of(fields, [name.split(".lora_A")[0] for name in arrays if ".lora_A." in name])
        wanted = dict(places(model, lora))
    except InputError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    check_tensors(folder / WEIGHTS, {name: x.shape for name, x in arrays.items()}, wanted)
    return tree_of(model, lora, lambda name, place: arrays[name]), lora


def tree_of(model: Any, lora: LoraConfig, tensor: Callable[[str, Place], Array]) -> Tree:
    """Adapters of the tensors that a file has of them, each given by a function of its name."""
    parts: dict[tree.Path, list[Array]] = {}
    for name, place in places(model, lora):
        parts.setdefault(place.path, []).append(place.restored(tensor(name, place)))
    shape = shapes(model, lora)
    return unflatten_dict({path: jnp.asarray(np.stack(x).reshape(shape[path])) for path, x in parts.items()})


def config_of(fields: Mapping[str, Any], modules: Sequence[str]) -> LoraConfig:
    """What peft's fields say, of an adapter whose tensors are in these modules.

    Raises InputError for a field that would have an adapter compute otherwise.
    """
    for name, value in fields.items():
        known = ONLY.get(name)
        if (known and value not in known) or (value and not known and name not in (*HONOURED, *HARMLESS)):
            instead = f"one of {', '.join(map(str, known))}" if known else "none"
            raise InputError(
                f"{name}: expected {instead}, found {shortened(str(value))}; merge the adapter into its model by "
                "peft's merge_and_unload(), and load that"
            )
    lora = LoraConfig(**{name: fields[name] for name in HONOURED if name in fields})
    targets, paths = fields.get("target_modules"), [name.removeprefix(ROOT) for name in modules]
    if not isinstance(targets, list) or fields.get("layers_to_transform") is not None or fields.get("exclude_modules"):
        targets = paths  # peft's may be a pattern, and of some layers
    return replace(lora, target_modules=tuple(targets))


def check_tensors(path: Path, found: Mapping[str, Shape], wanted: Mapping[str, Place]) -> None:
    """Raises CheckpointError unless a file has each tensor of an adapter, in its shape, and no other."""
    for name in {**wanted, **found}:
        expected: Any = wanted[name].shape if name in wanted else "absent"
        if found.get(name) != expected:
            raise CheckpointError(
                f"{path}: expected {shortened(name)} to be {expected}, found {found.get(name, 'none')}; load it onto "
                "the model that it was made for"
            )
