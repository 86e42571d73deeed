"""Karpathy's nanoGPT: its ckpt.pt; and build-nanogpt, of his lecture: the files in its folder log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Made
from gpt2_multi.files.containers.pickles import Inert
from gpt2_multi.files.hub import WEIGHTS
from gpt2_multi.model import spelling
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import (
    DECODERS,
    PLAIN,
    QUARTER,
    SAME,
    TANH,
    TORCH_FILES,
    Format,
    Tensors,
    beside,
    has_settings,
    is_state,
    settings_of,
    state,
)
from gpt2_multi.model.weights import table

MODEL_ARGS = {"vocab_size": "vocab_size", "block_size": "n_positions", **SAME}


def _is_nanogpt(main: Path) -> bool:
    return has_settings(containers.read_outline(main))


def _config(main: Path) -> GPT2Config | None:
    if main.with_name("config.json").exists():
        return beside(main)
    found = containers.read_torch(main).get("model_args")
    if not isinstance(found, dict):
        return None
    drop = found.get("dropout", 0.0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), drop)
    return settings_of(main, found, MODEL_ARGS, activation_function="gelu", **dropouts)


def _read(main: Path) -> Tensors:
    """The weights, whatever stands before their names; biases that were left out are zeros."""
    found = containers.read_torch(main, is_state)
    model = found.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{main}: expected the weights under 'model', as nanoGPT writes them, found none")
    tensors = state(main, model)
    args = found.get("model_args")
    if not isinstance(args, dict) or args.get("bias", True):
        return tensors
    config = _config(main)
    assert config is not None  # the arguments are there
    if config.n_layer > max(1000, len(tensors)):
        raise CheckpointError(f"{main}: has {len(tensors)} tensors, too few for {config.n_layer} layers")
    (positions,) = (spelling.NANOGPT.spell(row) for row in table(config) if row.path == "wpe")
    before = next((name.removesuffix(positions) for name in tensors if name.endswith(positions)), "")
    rows = {before + spelling.NANOGPT.spell(row): row for row in table(config)}
    zeros = {name: np.zeros(row.shape, np.float32) for name, row in rows.items() if row.kind in ("bias", "shift")}
    return {**zeros, **tensors}


def _write(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    args: dict[str, Any] = {name: getattr(config, ours) for name, ours in MODEL_ARGS.items()}
    args |= {"bias": True, "dropout": config.resid_pdrop}
    around = {"model_args": args, "iter_num": 0, "best_val_loss": 1e9, "config": {}}
    tied = {"lm_head.weight": tensors["transformer.wte.weight"]}
    containers.write_torch(folder / "ckpt.pt", {**tensors, **tied}, lambda state: {"model": state, **around})
    config.save_pretrained(folder)


NANOGPT = Format(
    "nanoGPT's ckpt.pt", spelling.NANOGPT, WEIGHTS["nanogpt"], WEIGHTS["nanogpt"],
    _read, _write, _config, {**PLAIN, "activation_function": ("gelu",)},
    QUARTER, DECODERS, TORCH_FILES, _is_nanogpt,
)  # fmt: skip


def _is_log(main: Path) -> bool:
    """Whether a file has what build-nanogpt saves, an instance of its GPTConfig, or the dict of one."""
    found = containers.read_outline(main)
    return isinstance(found.get("model"), dict) and MODEL_ARGS.keys() <= _settings(found.get("config")).keys()


def _settings(found: Any) -> dict[str, Any]:
    attributes = found.attributes if isinstance(found, Inert) else found
    return attributes if isinstance(attributes, dict) else {}


def _log_config(main: Path) -> GPT2Config | None:
    if main.with_name("config.json").exists():
        return beside(main)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return settings_of(main, _settings(containers.read_outline(main).get("config")), MODEL_ARGS, **dropouts)


def _write_log(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    settings = Inert("__main__ GPTConfig", {name: getattr(config, ours) for name, ours in MODEL_ARGS.items()})
    tied = {"lm_head.weight": tensors["transformer.wte.weight"]}
    around = {"config": settings, "step": 0, "val_loss": 0.0}
    containers.write_torch(folder / "model_00000.pt", {**tensors, **tied}, lambda state: {"model": state, **around})
    config.save_pretrained(folder)


BUILD_NANOGPT = Format(
    "build-nanogpt's log/model_XXXXX.pt", spelling.NANOGPT, ("model_[0-9]*.pt",), ("model_00000.pt",),
    _read, _write_log, _log_config, TANH, QUARTER, DECODERS, TORCH_FILES, _is_log,
)  # fmt: skip
