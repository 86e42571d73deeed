"""The bytes of a model on each device of a mesh, on paper: of its weights by their table, of all else by its sizes.

Shapes: B rows of a device, T length, E `n_embd`, H heads, D head width, M the MLP's width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from gpt2_multi.errors import InputError, nearest
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import TORCH
from gpt2_multi.model.weights import (
    FSDP,
    MESH_AXES,
    ROW_AXES,
    TENSOR,
    Rules,
    Weight,
    check_cut_once,
    check_engines,
    check_named_axes,
    check_shared,
    check_used,
    mesh_sizes,
    sizes,
    table,
)

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 0}  # numbers that an optimizer keeps of each parameter
CHUNK = 2**30  # bytes of the logits that are there at once where the loss is computed in chunks
USES = TRAINING, RECOMPUTING, GENERATION = "training", "training with checkpointing", "generation"


@dataclass(frozen=True)
class Job:
    """What a model is to do, and by which framework; `batch_size` counts the rows of all devices."""

    config: GPT2Config
    batch_size: int = 8
    length: int = 1024
    dtype: str = "float32"
    param_dtype: str = "float32"
    optimizer: str = "adamw"
    backend: str = "pt"
    rules: Rules = field(default_factory=lambda: FSDP | TENSOR)

    def check(self) -> None:
        """Raises InputError for what cannot be planned."""
        inputs.check_positions(0, self.length - 1, self.config.n_positions)
        if self.config.quantizer is not None or self.config.add_cross_attention:
            kind = "a quantized model" if self.config.quantizer is not None else "cross-attention"
            raise InputError(f"{kind} cannot be planned; plan a model of the same sizes without it")
        check_named_axes(self.rules, [*sizes(self.config)])
        if self.backend == "pt":
            check_engines(self.rules)
        known = MESH_AXES[1:]
        for over in self.rules.values():
            if over is not None and over not in known:
                raise InputError(
                    f"rules: expected mesh axes among {', '.join(known)}, found '{over}'{nearest(over, known)}"
                )


@dataclass(frozen=True)
class Need:
    """The most bytes of one device, by what they are for (`USES`) and then by what they are of."""

    mesh: dict[str, int]
    uses: dict[str, dict[str, int]]

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh.values())

    @property
    def totals(self) -> dict[str, int]:
        """The bytes of each use."""
        return {use: sum(parts.values()) for use, parts in self.uses.items()}

    def fits(self, memory: int) -> dict[str, bool]:
        """Whether a device with so many bytes has room for each use."""
        return {use: total <= memory for use, total in self.totals.items()}

    def to_dict(self) -> dict[str, object]:
        """The same for JSON."""
        uses = {use: {**parts, "total": self.totals[use]} for use, parts in self.uses.items()}
        ways = {"with": self.uses[RECOMPUTING], "without": self.uses[TRAINING]}
        kept = {f"activations {way} checkpointing": parts["activations"] for way, parts in ways.items()}
        return {"mesh": self.mesh, "devices": self.devices, **uses, **kept}


def needed(job: Job, mesh: str) -> Need:
    """What each device of a mesh needs; InputError where it cannot share the work."""
    job.check()
    found = mesh_sizes(mesh)
    if job.backend == "tf" and found["fsdp"] * found["tensor"] > 1:
        raise InputError(
            f"mesh: TensorFlow has the whole model on each device, found '{mesh}'; give data alone, or plan "
            "for pt or flax"
        )
    if job.backend == "pt":
        check_used(job.rules, found)
    rows, parts = job.batch_size, math.prod(found[axis] for axis in ROW_AXES)
    if rows % parts:
        raise InputError(
            f"batch_size: expected a number of rows that {parts} devices share equally, found {rows}; change it or the "
            "mesh"
        )
    training = (of_training(job, found, rows // parts, checkpointing) for checkpointing in (False, True))
    return Need(found, dict(zip(USES, (*training, of_generation(job, found)), strict=True)))


def of_training(job: Job, mesh: Mapping[str, int], rows: int, checkpointing: bool) -> dict[str, int]:
    """The bytes of a step, whose greatest needs may not come together."""
    held = sum(own_size(row, job, mesh) for row in table(job.config))
    stored, width = WIDTHS[job.param_dtype], WIDTHS[job.dtype]
    return {
        "weights": held * stored,
        "gradients": held * stored,
        "optimizer": held * stored * MOMENTS[job.optimizer],
        "gathered or cast": gathered(job, mesh) or cast(job, mesh, checkpointing),
        "activations": activations(job, mesh, rows, checkpointing),
        "logits": logits(job, mesh, rows, width),
    }


def of_generation(job: Job, mesh: Mapping[str, int]) -> dict[str, int]:
    """The bytes of a model that only computes, stored in the dtype in which it does, and its full cache.

    In PyTorch the devices of the axis `fsdp` write the same rows.
    """
    held, width = sum(own_size(row, job, mesh) for row in table(job.config)), WIDTHS[job.dtype]
    rows = job.batch_size // (mesh["data"] if job.backend == "pt" else mesh["data"] * mesh["fsdp"])
    heads = sum(len(job.config.heads(layer)) for layer in range(job.config.n_layer)) // by(job, mesh, "head")
    head_dim = job.config.n_embd // job.config.n_head
    cache = 2 * heads * rows * job.length * head_dim * width
    return {"weights": held * width, "gathered": gathered(job, mesh), "cache": cache}


def by(job: Job, mesh: Mapping[str, int], axis: str) -> int:
    """Over how many devices of the mesh axis `tensor` a named axis is cut."""
    return mesh["tensor"] if job.rules.get(axis) == "tensor" else 1


def own_size(row: Weight, job: Job, mesh: Mapping[str, int], among: tuple[str, ...] = MESH_AXES) -> int:
    """How many numbers of a parameter the device with the most has, cut over these axes of the mesh.

    What no rule cuts over fsdp, FSDP2 of PyTorch cuts at its first dimension, as well as that can be divided.
    """
    axes = [(axis, length) for names, lengths in zip(row.axes, row.lengths, strict=True)
            for axis, length in zip(names, lengths, strict=True)]  # fmt: skip
    check_cut_once(row.name, [axis for axis, _ in axes], job.rules)
    left, first = dict(axes), first_axis(row)
    for axis, entries in axes:
        over = job.rules.get(axis)
        if over is not None:
            check_shared(row.name, axis, entries, over, mesh[over])
            left[axis] //= mesh[over] if over in among else 1
    is_cut = "fsdp" in (job.rules.get(axis) for axis in left)
    if job.backend == "pt" and not is_cut and "fsdp" in among:
        dim = [axis for axis in left if axis in first]
        length = math.prod(left.pop(axis) for axis in dim)
        return -(-length // mesh["fsdp"]) * math.prod(left.values())
    return math.prod(left.values())


def first_axis(row: Weight) -> tuple[str, ...]:
    """The named axes of a parameter's first dimension in PyTorch, where queries, keys and values have their own."""
    names = row.axes[-1] if TORCH.turns(row) else row.axes[0]
    return names[:1] if names[0] == "qkv" else names


def gathered(job: Job, mesh: Mapping[str, int]) -> int:
    """Of FSDP2, which has replicas too: the embeddings, and two blocks, one fetched while the other computes."""
    if job.backend != "pt" or math.prod(mesh[axis] for axis in ROW_AXES) == 1:
        return 0
    ends, blocks = wholes(job, mesh)
    return (ends + sum(sorted(blocks)[-2:])) * WIDTHS[job.dtype]


def cast(job: Job, mesh: Mapping[str, int], checkpointing: bool) -> int:
    """Copies in PyTorch of parameters stored in another dtype than they are computed in, for the backward pass.

    With checkpointing, those of one block.
    """
    if job.backend != "pt" or job.dtype == job.param_dtype:
        return 0
    ends, blocks = wholes(job, mesh)
    return (ends + (max(blocks) if checkpointing else sum(blocks))) * WIDTHS[job.dtype]


def wholes(job: Job, mesh: Mapping[str, int]) -> tuple[int, list[int]]:
    """How many numbers the parameters outside of blocks have, and those of each block, cut over `tensor` alone."""
    found: Counter[str] = Counter()
    for row in table(job.config):
        layer = row.path.split(".")[1] if row.path.startswith("h.") else ""
        found[layer] += own_size(row, job, mesh, ("tensor",))
    return found.pop(""), [*found.values()]


def activations(job: Job, mesh: Mapping[str, int], rows: int, checkpointing: bool) -> int:
    """What the backward pass needs of the forward pass, with fused attention: (B, T, E) tensors and what is like them.

    With checkpointing, what goes into each block is kept, and all of one block.
    """
    config, width = job.config, WIDTHS[job.dtype]
    tokens, stream = rows * job.length, rows * job.length * config.n_embd * width
    noise = tokens * config.n_embd  # where dropout was, a byte each
    blocks = [of_block(job, mesh, layer, tokens) for layer in range(config.n_layer)]
    ends = 2 * stream + 8 * tokens + noise * bool(config.embd_pdrop)  # around ln_f
    return ends + (config.n_layer * stream + max(blocks) if checkpointing else sum(blocks))


def of_block(job: Job, mesh: Mapping[str, int], layer: int, tokens: int) -> int:
    """What a block keeps: inputs and outputs of its norms, q, k, v, what attention gives, the MLP before and after."""
    config, width = job.config, WIDTHS[job.dtype]
    heads = len(config.heads(layer)) // by(job, mesh, "head")
    inner = (config.n_inner or 4 * config.n_embd) // by(job, mesh, "mlp")
    head_dim = config.n_embd // config.n_head
    noise = 2 * config.n_embd * bool(config.resid_pdrop)
    return tokens * (width * (4 * config.n_embd + 4 * heads * head_dim + 2 * inner) + 4 * heads + 16 + noise)


def logits(job: Job, mesh: Mapping[str, int], rows: int, width: int) -> int:
    """The logits, their logarithms of probabilities in float32, and the gradient of these; or those of a chunk.

    In PyTorch a head that is cut by words computes them at once.
    """
    wide, every = max(width, 4), rows * job.length * job.config.vocab_size
    is_whole = job.backend == "pt" and by(job, mesh, "vocab") > 1
    return every * (width + 2 * wide) if is_whole else min(every * wide, CHUNK) * 2
