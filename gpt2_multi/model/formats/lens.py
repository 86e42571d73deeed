"""TransformerLens: the state dicts of its HookedTransformer, whose heads lie apart, and of its TransformerBridge."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Made
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import (
    DECODERS,
    EMBEDDING,
    FOREIGN,
    HEAD,
    NO_ROOM,
    STATE_FILES,
    TANH,
    Format,
    Tensors,
    beside,
    has_names,
    tensors_of,
)
from gpt2_multi.model.spelling import LENS, LENS_BRIDGE

FIRST, BRIDGE_FIRST, _ = FOREIGN  # the former is (n_head, n_embd, head_dim)
NORM, SHIFT = "ln_final.w", "unembed.b_U"  # what is not there where layer norms were folded, and what is zero otherwise
BRIDGE_SHIFT = "unembed.bias"
UNFOLDED = "HookedTransformer.from_pretrained_no_processing(name), or of one with fold_ln=False"
NOT_COMPATIBLE = "the bridge before enable_compatibility_mode()"


def _read(norm: str, shift: str, advice: str, main: Path) -> Tensors:
    """The tensors of a model whose layer norms are its own; CheckpointError where they were folded into others."""
    found = tensors_of(main)
    lacks = not any(name.endswith(norm) for name in found)
    if lacks or any(name.endswith(shift) and array.any() for name, array in found.items()):
        why = f"it has no {norm}, but LayerNormPre" if lacks else f"{shift} is not zero"
        raise CheckpointError(
            f"{main}: TransformerLens has folded the layer norms of this model into the weights beside them, and what "
            f"they were cannot be got back ({why}); save the state dict of {advice}"
        )
    return found


def _known(_: Path, found: Tensors) -> dict[str, Any]:
    """The heads, which lie apart."""
    return {"n_head": (found[FIRST].shape or (0,))[0]} if FIRST in found else {}


def _write(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    """With what its program asks for besides: an unembedding with a bias, and two buffers in each layer."""
    dtype, shape, embedding = tensors[LENS.spell(EMBEDDING)]
    more: dict[str, Made] = {
        LENS.spell(HEAD): (dtype, shape[::-1], lambda: embedding().T),
        SHIFT: (dtype, shape[:1], partial(np.zeros, shape[:1], dtype)),
    }
    square = (config.n_positions, config.n_positions)
    mask: Made = (np.dtype(bool), square, lambda: np.tril(np.ones(square, bool)))
    ignored: Made = (np.dtype("<f4"), (), partial(np.full, (), -np.inf, "<f4"))
    for layer in range(config.n_layer):
        more |= {f"blocks.{layer}.attn.mask": mask, f"blocks.{layer}.attn.IGNORE": ignored}
    containers.write_torch(folder / "model.pt", {**more, **tensors})
    config.save_pretrained(folder)


def _write_bridge(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    dtype, shape, _embedding = embedding = tensors[LENS_BRIDGE.spell(EMBEDDING)]
    shift: Made = (dtype, shape[:1], partial(np.zeros, shape[:1], dtype))
    head = {LENS_BRIDGE.spell(HEAD): embedding, BRIDGE_SHIFT: shift}
    containers.write_torch(folder / "model.pt", {**head, **tensors})
    config.save_pretrained(folder)


ROOM = {name: values for name, values in NO_ROOM.items() if name != "tie_word_embeddings"}
TRANSFORMER_LENS = Format(
    "TransformerLens' HookedTransformer", LENS, ("model.pt",), ("model.pt",),
    partial(_read, NORM, SHIFT, UNFOLDED), _write, beside, TANH, ROOM, DECODERS, STATE_FILES,
    partial(has_names, (FIRST,)), known=_known,
)  # fmt: skip
TRANSFORMER_BRIDGE = Format(
    "TransformerLens 4's TransformerBridge", LENS_BRIDGE, ("model.pt",), ("model.pt",),
    partial(_read, "ln_final.weight", BRIDGE_SHIFT, NOT_COMPATIBLE), _write_bridge, beside, TANH, ROOM, DECODERS,
    STATE_FILES, partial(has_names, (BRIDGE_FIRST,)),
)  # fmt: skip
