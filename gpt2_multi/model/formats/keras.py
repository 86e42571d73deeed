"""KerasHub's presets, and the .weights.h5 that Keras makes of gpt2_multi.tf."""

from __future__ import annotations

from pathlib import Path

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Made, reading
from gpt2_multi.files.hub import WEIGHTS
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.model import spelling
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import (
    DECODERS,
    NO_ROOM,
    TANH,
    Format,
    Tensors,
    beside,
    plain,
    settings_of,
    snake_case,
)

BACKBONE = {
    "vocabulary_size": "vocab_size", "num_layers": "n_layer", "num_heads": "n_head", "hidden_dim": "n_embd",
    "intermediate_dim": "n_inner", "max_sequence_length": "n_positions",
}  # fmt: skip
OURS = "gpt2_config"  # where KerasHub's config.json keeps what its backbone has no setting for


def _is_keras_hub(main: Path) -> bool:
    path = main.with_name("config.json")
    return path.exists() and "class_name" in read_json(path)


def _keras_hub_config(main: Path) -> GPT2Config | None:
    path = main.with_name("config.json")
    found = read_json(path)
    if isinstance(ours := found.get(OURS), dict):
        with reading(path, "file of settings"):
            return GPT2Config.from_dict(ours)
    settings = found.get("config")
    if found.get("class_name") != "GPT2Backbone" or not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected KerasHub's GPT2Backbone, found {plain(found.get('class_name'))}")
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.get("dropout", 0.1))
    return settings_of(path, settings, BACKBONE, **dropouts)


def _read_keras(main: Path) -> Tensors:
    return containers.read_hdf5(main)


def _write_keras_hub(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    dtype = next(iter(tensors.values()))[0].name
    settings = {name: getattr(config, ours) for name, ours in BACKBONE.items()}
    settings["intermediate_dim"] = config.n_inner or 4 * config.n_embd
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    settings |= {"name": "gpt2_backbone", "trainable": True, "dtype": policy, "dropout": config.resid_pdrop}
    backbone = {"module": "keras_hub.src.models.gpt2.gpt2_backbone", "class_name": "GPT2Backbone", "config": settings}
    containers.write_hdf5(folder / "model.weights.h5", tensors, {})
    backbone |= {"registered_name": "keras_hub>GPT2Backbone", OURS: config.to_dict()}
    write_json(folder / "config.json", backbone)
    versions = {"keras_version": "3.15.1", "keras_hub_version": "0.32.0"}
    write_json(folder / "metadata.json", {**versions, "tasks": ["CausalLM"]})


def _write_keras_weights(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    model = snake_case(f"TF{(config.architectures or ['GPT2LMHeadModel'])[0]}")
    containers.write_hdf5(folder / "model.weights.h5", tensors, {"vars": {"name": model}})
    config.save_pretrained(folder)


KERAS_HUB = Format(
    "KerasHub's preset", spelling.KERAS_HUB, WEIGHTS["keras-hub"][:1], WEIGHTS["keras-hub"],
    _read_keras, _write_keras_hub, _keras_hub_config, TANH, NO_ROOM, DECODERS, is_it=_is_keras_hub,
)  # fmt: skip
KERAS_WEIGHTS = Format(
    "Keras' .weights.h5 of gpt2_multi.tf", spelling.KERAS_WEIGHTS, ("*.weights.h5",), WEIGHTS["keras-hub"][:1],
    _read_keras, _write_keras_weights, beside,
)  # fmt: skip
