"""What `save_pretrained` of the three frameworks writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.files import arguments, containers
from gpt2_multi.files.arrays import NOTHING, Array, Made
from gpt2_multi.files.containers.safetensors import fitting
from gpt2_multi.files.folders import PathLike, replaced
from gpt2_multi.files.hub import SETTINGS, WEIGHTS, matches, push, varied
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.model.checkpoint.programs import metadata
from gpt2_multi.model.checkpoint.quantized import DTYPE, SCALE, Quantized, scale_shape
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.formats.transformers import write_safetensors
from gpt2_multi.model.spelling import TRANSFORMERS, Spelling, parts_of
from gpt2_multi.model.weights import Weight

Source = tuple[Weight, np.dtype[Any], Callable[[], Any]]  # which makes an array, or a Quantized for int8


def upload(save_pretrained: Callable[..., Any], repo_id: str, options: Mapping[str, Any]) -> str:
    """Upload what a model's `save_pretrained` writes, by its options and those of `hub.push`: the commit's address."""
    how = {name: options[name] for name in ("max_shard_size", "safe_serialization", "variant") if name in options}
    wanted = {name: value for name, value in options.items() if name not in how}
    return push(partial(save_pretrained, **how), repo_id, **arguments.sort_saving("push_to_hub", wanted))


def save(
    folder: PathLike,
    config: GPT2Config,
    generation_config: Any,
    sources: Iterable[Source],
    head: str,
    max_shard_size: int | str,
    kind: str = "safetensors",
    variant: str | None = None,
    own: Mapping[str, Made] | None = None,
    said: Mapping[str, str] = NOTHING,
) -> None:
    """Write config.json, generation_config.json (where there is one) and the weights, or their shards and index.

    `own` are tensors that a caller's class has besides the table, by their names in the file, and `said` is what
    torchao says of weights of which these are parts. `kind` is a key of
    `formats.table`; a `variant` has another name and leaves the others. The model's files are replaced together,
    other files of the folder stay: see `files.folders.replaced`.
    """
    if config.quantizer is not None and kind != "safetensors":
        raise InputError(
            "safe_serialization: expected True for a quantized model, which safetensors alone have room for"
        )
    with replaced(folder, partial(is_model_file, kind=kind, variant=variant)) as stage:
        tensors = {**spelled(sources, head, FORMATS[kind].spelling), **(own or {})}
        write = partial(write_safetensors, metadata=metadata(tensors, said)) if said else FORMATS[kind].write
        write(stage, tensors, config, max_shard_size)
        if generation_config is not None:
            generation_config.save_pretrained(stage)
        for path in list(stage.iterdir()) if variant else []:
            _vary(path, variant)


def _vary(path: Path, variant: str | None) -> None:
    """Give a file of weights, or an index of shards and what it names, the name of a variant."""
    if path.name.endswith(".index.json"):
        index = read_json(path)
        index["weight_map"] = {name: varied(file, variant) for name, file in index["weight_map"].items()}
        write_json(path, index)
    path.rename(path.with_name(varied(path.name, variant)))


def _in_layout(spelling: Spelling, weight: Weight, make: Callable[[], Any]) -> Array:
    found = make()
    array = found.values if isinstance(found, Quantized) else found
    (part,) = parts_of(spelling, weight, fitting(weight.name, array, weight.shape))
    return part


def _scale(make: Callable[[], Quantized]) -> Array:
    return make().scale


def spelled(sources: Iterable[Source], head: str, spelling: Spelling) -> dict[str, Made]:
    """Rows of the table under the names and in the layout of a format; those in int8 with their scales behind them."""
    made: dict[str, Made] = {}
    for weight, dtype, make in sources:
        name = spelling.spell(weight, head != "base")
        made[name] = dtype, spelling.shape(weight), partial(_in_layout, spelling, weight, make)
        if dtype == DTYPE:
            made[name + SCALE] = np.dtype(np.float32), scale_shape(weight), partial(_scale, make)
    return made


def write_weights(
    folder: Path,
    sources: Iterable[Source],
    head: str,
    spelling: Spelling = TRANSFORMERS,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write rows of the table, each with its dtype and a function that makes its array in the table's layout."""
    tensors = spelled(sources, head, spelling)
    containers.write_shards(folder / WEIGHTS["safetensors"][0], tensors, containers.write_safetensors, max_shard_size)


def is_model_file(path: Path, kind: str = "safetensors", variant: str | None = None) -> bool:
    """Whether a file of a folder is one of those that save_pretrained writes, or would be read in their place."""
    weights = [varied(name, variant) for name in (*WEIGHTS["safetensors"], *WEIGHTS[kind])]
    return matches(path.name, (*SETTINGS, *weights)) and not path.is_dir()
