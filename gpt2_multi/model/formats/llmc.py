"""Karpathy's llm.c: a file of a header and all parameters, in float32 or in bfloat16."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files import containers
from gpt2_multi.files.arrays import MOST, Made, Shape, reading
from gpt2_multi.model import spelling
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import DECODERS, QUARTER, TANH, Format, Tensors, beside
from gpt2_multi.model.weights import Weight, table

MAGIC = 20240326
NO_MODEL = {  # its other files
    20240327: "a state to debug with", 20240328: "a tokenizer", 20240520: "a text's tokens",
    20240522: "questions to evaluate by", 20240527: "the state of an optimizer",
}  # fmt: skip
VERSIONS = {3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}  # of the file; both with a padded vocabulary
SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")  # as the header has them, from its third number
MULTIPLE = 128  # of which the vocabulary is made by rows of zeros behind it
PADDING = "padding"


def _is_it(main: Path) -> bool:
    """Whether a file begins as one of llm.c's; many others end with .bin too."""
    return containers.read_header(main)[:1] in [(magic,) for magic in (MAGIC, *NO_MODEL)]


def _sizes(header: Sequence[int]) -> tuple[dict[str, Any], int]:
    """The sizes in a header, and to how many rows the vocabulary is padded; ValueError where they cannot be."""
    if len(header) < 8:
        raise ValueError("its header is cut off")
    magic, version, *numbers = header[:8]
    sizes, padded = dict(zip(SIZES, numbers, strict=False)), numbers[-1]
    if magic != MAGIC:
        raise ValueError(f"it is llm.c's, but {NO_MODEL.get(magic, 'not a model')}: give the file of the model")
    if version not in VERSIONS:
        raise ValueError(
            f"it is of version {version}; expected 3 (float32) or 5 (bfloat16), as llm.c writes them since May 2024: "
            "write it again by its train_gpt2.py"
        )
    if min(sizes.values()) < 1 or 12 * sizes["n_layer"] > MOST:
        raise ValueError(f"its header has sizes that no GPT-2 has: {', '.join(f'{k} {n}' for k, n in sizes.items())}")
    if padded < sizes["vocab_size"]:
        raise ValueError(f"its vocabulary of {sizes['vocab_size']} is padded to {padded}, which is less")
    return sizes, padded


def _order(config: GPT2Config) -> list[Weight]:
    """The rows of the table as llm.c has them: each for all layers before the next one."""
    rows = {row: re.sub(r"^h\.\d+", "h", row.name) for row in table(config, "base")}
    kinds = list(dict.fromkeys(rows.values()))
    return sorted(rows, key=lambda row: kinds.index(rows[row]))


def _layout(header: Sequence[int]) -> tuple[np.dtype[Any], Mapping[str, Shape]]:
    """The type of a file's numbers, and its tensors: those of nn.Linear under the names that train_gpt2.py has."""
    sizes, padded = _sizes(header)
    shapes: dict[str, Shape] = {}
    for row in _order(GPT2Config(**sizes)):
        shapes[spelling.NANOGPT.spell(row)] = spelling.NANOGPT.shape(row)
        if row.path == "wte":
            shapes[PADDING] = (padded - sizes["vocab_size"], sizes["n_embd"])
    return VERSIONS[header[1]], shapes


def _read(main: Path) -> Tensors:
    """The tensors, without the rows behind the vocabulary."""
    found = containers.read_flat(main, _layout)
    del found[PADDING]
    return found


def _config(main: Path) -> GPT2Config | None:
    with reading(main, "file of llm.c"):
        sizes, _ = _sizes(containers.read_header(main))
        if not main.with_name("config.json").exists():
            return GPT2Config(**sizes)
    config = beside(main)
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise CheckpointError(
                f"{main}: has {name} {size}, the config.json beside it {getattr(config, name)}; they belong to "
                "different models: move one of them to a folder of its own"
            )
    return config


def _write(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    (dtype, *_others) = {made[0] for made in tensors.values()}
    (version,) = (number for number, kind in VERSIONS.items() if kind == dtype)
    padded = -(-config.vocab_size // MULTIPLE) * MULTIPLE
    shape = (padded - config.vocab_size, config.n_embd)
    ordered: dict[str, Made] = {}
    for row in _order(config):
        ordered[row.name] = tensors[spelling.NANOGPT.spell(row)]
        if row.path == "wte":
            ordered[PADDING] = dtype, shape, lambda: np.zeros(shape, dtype)
    header = (MAGIC, version, *(getattr(config, name) for name in SIZES), padded)
    containers.write_flat(folder / "model.bin", header, ordered)
    config.save_pretrained(folder)


LLMC = Format(
    "llm.c's .bin", spelling.NANOGPT, ("model.bin",), ("model.bin",),
    _read, _write, _config, TANH, QUARTER, DECODERS, ("*.bin",), _is_it,
    tuple(dtype.name for dtype in VERSIONS.values()),
)  # fmt: skip
