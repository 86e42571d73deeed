"""Karpathy's minGPT: its model.pt, a state dict without settings, of its model since 2022 and of the first one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Made
from gpt2_multi.files.json_files import read_json
from gpt2_multi.model import spelling
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import (
    DECODERS,
    EMBEDDING,
    HEAD,
    PLAIN,
    QUARTER,
    STATE_FILES,
    TANH_GELU,
    Format,
    Tensors,
    beside,
    outline,
    tensors_of,
    with_names,
)
from gpt2_multi.model.spelling import Spelling, out_first

# The heads, layers and width of each of its model types: the settings beside a file name the type alone.
TYPES = {
    "openai-gpt": (12, 12, 768), "gpt2": (12, 12, 768), "gpt2-medium": (16, 24, 1024), "gpt2-large": (20, 36, 1280),
    "gpt2-xl": (25, 48, 1600), "gopher-44m": (16, 8, 512), "gpt-mini": (6, 6, 192), "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}  # fmt: skip
INNER = {name: values for name, values in QUARTER.items() if name != "tie_word_embeddings"}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def _is_it(of: Spelling, main: Path) -> bool:
    """Whether a file has the mask of the first layer, and the head, under the names of one of the two models.

    So have some of nanoGPT's, which have settings beside the model, and transformers' before 4.30, whose kernels are
    (in, out).
    """
    if {"model_args", "config"} & outline(main).keys():
        return False
    found = with_names((_mask(of, 0), of.spell(HEAD)), main)
    shapes = {name: part.shape for name, part in found.items() if isinstance(name, str) and hasattr(part, "shape")}
    return bool(found) and out_first(shapes) is not False


def _mask(of: Spelling, layer: int) -> str:
    return f"transformer.h.{layer}.attn.bias" if of is spelling.NANOGPT else f"blocks.{layer}.attn.mask"


def _node(main: Path) -> Any:
    """What its trainer wrote of the model into the config.json beside it, or what else is there; {} without one."""
    path = main.with_name("config.json")
    return read_json(path).get("model") if path.exists() else {}


def _config(main: Path) -> GPT2Config | None:
    return None if isinstance(_node(main), dict) else beside(main)


def _known(of: Spelling, main: Path, found: Tensors) -> dict[str, Any]:
    """What its trainer wrote beside it, and the heads of a model type, or of the one that has these sizes."""
    node = _node(main) if isinstance(_node(main), dict) else {}
    drops = {name: node[name] for name in DROPOUTS if name in node}
    heads = node.get("n_head") or _heads(node.get("model_type"), of, found)
    return {**drops, "n_head": heads} if heads else drops


def _heads(kind: Any, of: Spelling, found: Tensors) -> int | None:
    types = [TYPES[kind]] if isinstance(kind, str) and kind in TYPES else TYPES.values()
    masks, width = sum(_mask(of, layer) in found for layer in range(len(found))), found[of.spell(EMBEDDING)].shape[-1:]
    return next((heads for heads, layers, n_embd in types if (layers, n_embd) == (masks, *width)), None)


def _write(of: Spelling, folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    """With what its program asks for besides: the head, which is no embedding there, and the mask of each layer."""
    embedding = tensors[of.spell(EMBEDDING)]
    shape, dtype = (1, 1, config.n_positions, config.n_positions), embedding[0]
    mask: Made = (dtype, shape, lambda: np.tril(np.ones(shape, dtype)))
    masks = {_mask(of, layer): mask for layer in range(config.n_layer)}
    containers.write_torch(folder / "model.pt", {of.spell(HEAD): embedding, **tensors, **masks})
    config.save_pretrained(folder)


def _format(title: str, of: Spelling, activations: tuple[str, ...]) -> Format:
    return Format(
        title, of, ("model.pt",), ("model.pt",), tensors_of, partial(_write, of),
        _config, {**PLAIN, "activation_function": activations}, INNER, DECODERS,
        STATE_FILES, partial(_is_it, of), known=partial(_known, of),
    )  # fmt: skip


MINGPT = _format("minGPT's model.pt", spelling.NANOGPT, TANH_GELU)
MINGPT_2020 = _format("the first minGPT's model.pt, of 2020", spelling.MINGPT_2020, ("gelu",))
