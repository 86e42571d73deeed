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
    TANH_GELU,
    Format,
    Tensors,
    beside,
    is_state,
    is_tied,
    settings_of,
    sizes_of,
    state,
)
from gpt2_multi.model.spelling import Spelling

# The heads, layers and width of each of its model types: the settings beside a file name the type alone.
TYPES = {
    "openai-gpt": (12, 12, 768), "gpt2": (12, 12, 768), "gpt2-medium": (16, 24, 1024), "gpt2-large": (20, 36, 1280),
    "gpt2-xl": (25, 48, 1600), "gopher-44m": (16, 8, 512), "gpt-mini": (6, 6, 192), "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}  # fmt: skip
INNER = {name: values for name, values in QUARTER.items() if name != "tie_word_embeddings"}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def _is_it(of: Spelling, main: Path) -> bool:
    """Whether a file has the mask of the first layer, and the head, under the names of one of the two models."""
    return {_mask(of, 0), of.spell(HEAD)} <= containers.read_outline(main).keys()


def _mask(of: Spelling, layer: int) -> str:
    return f"transformer.h.{layer}.attn.bias" if of is spelling.NANOGPT else f"blocks.{layer}.attn.mask"


def _read(main: Path) -> Tensors:
    return state(main, containers.read_torch(main, is_state))


def _config(of: Spelling, activation: str, main: Path) -> GPT2Config | None:
    """What the shapes say, and what its trainer wrote beside; or a config.json of ours."""
    path = main.with_name("config.json")
    node = read_json(path).get("model") if path.exists() else {}
    if not isinstance(node, dict):
        return beside(main)
    found = _read(main)
    sizes = sizes_of(main, of, found)
    heads = node.get("n_head") or _heads(node.get("model_type"), sizes["n_layer"], sizes["n_embd"])
    drops = {name: node[name] for name in DROPOUTS if name in node}
    tied = is_tied(of, found)
    return settings_of(
        main, {}, {}, **sizes, n_head=heads, activation_function=activation, tie_word_embeddings=tied, **drops
    )


def _heads(kind: Any, n_layer: int, n_embd: int) -> int:
    """The heads of a model type, or of the one that has these sizes; 64 a head, as in every GPT-2, of any other."""
    types = [TYPES[kind]] if isinstance(kind, str) and kind in TYPES else TYPES.values()
    fitting = [heads for heads, layers, width in types if (layers, width) == (n_layer, n_embd)]
    return fitting[0] if fitting else max(1, n_embd // 64)


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
        title, of, ("model.pt",), ("model.pt",), _read, partial(_write, of),
        partial(_config, of, activations[0]), {**PLAIN, "activation_function": activations}, INNER, DECODERS,
        ("*.pt", "*.pth"), partial(_is_it, of),
    )  # fmt: skip


MINGPT = _format("minGPT's model.pt", spelling.NANOGPT, TANH_GELU)
MINGPT_2020 = _format("the first minGPT's model.pt, of 2020", spelling.MINGPT_2020, ("gelu",))
