"""TransformerLens: the state dict of its HookedTransformer, whose heads lie apart."""

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
    HEAD,
    NO_ROOM,
    TANH,
    Format,
    Tensors,
    beside,
    is_state,
    state,
)
from gpt2_multi.model.spelling import LENS

FIRST = "blocks.0.attn.W_Q"  # (n_head, n_embd, head_dim)
SHIFT = "unembed.b_U"


def _is_it(main: Path) -> bool:
    return FIRST in containers.read_outline(main)


def _read(main: Path) -> Tensors:
    """The tensors of a model whose layer norms are its own; CheckpointError where they were folded into others."""
    found = state(main, containers.read_torch(main, is_state))
    shift = found.get(SHIFT)
    if "ln_final.w" not in found or (shift is not None and shift.any()):
        why = f"it has no ln_final.w, but LayerNormPre: {SHIFT}" if "ln_final.w" not in found else f"its {SHIFT}"
        raise CheckpointError(
            f"{main}: TransformerLens has folded the layer norms of this model into the weights beside them (fold_ln), "
            f"and what they were cannot be got back ({why} is not zero); save the state dict of "
            "HookedTransformer.from_pretrained_no_processing(name), or of one with fold_ln=False"
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


ROOM = {name: values for name, values in NO_ROOM.items() if name != "tie_word_embeddings"}
TRANSFORMER_LENS = Format(
    "TransformerLens' state dict", LENS, ("model.pt",), ("model.pt",),
    _read, _write, beside, TANH, ROOM, DECODERS, ("*.pt", "*.pth"), _is_it, known=_known,
)  # fmt: skip
