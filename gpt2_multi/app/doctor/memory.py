"""The bytes of a model on each device of a mesh, on paper: of its weights by their table, of all else by its sizes.

Shapes: B rows of a device, T length, E `n_embd`, H heads, D head width, M the MLP's width, V vocabulary.
"""

from __future__ import annotations

import math
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
    check_named_axes,
    check_shared,
    mesh_sizes,
    sizes,
    table,
)

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 0}  # numbers that an optimizer keeps of each parameter
CHUNK = 2**30  # bytes of the logits that are there at once where the loss is computed in chunks
WAYS = ("with checkpointing", "without checkpointing")


@dataclass(frozen=True)
class Job:
    """What a model is to do, and by which framework; `batch_size` counts the rows of all devices."""

    config: GPT2Config
    batch_size: int = 8
    length: int = 1024
    dtype: str = "float32"
    param_dtype: str = "float32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    backend: str = "pt"
    rules: Rules = field(default_factory=lambda: FSDP | TENSOR)

    def check(self) -> None:
        """Raises InputError for what cannot be planned."""
        inputs.check_positions(0, self.length - 1, self.config.n_positions)
        if self.config.quantization is not None or self.config.add_cross_attention:
            kind = "a quantized model" if self.config.quantization is not None else "cross-attention"
            raise InputError(f"{kind} cannot be planned; plan a model of the same sizes without it")
        check_named_axes(self.rules, [*sizes(self.config)])
        known = MESH_AXES[1:]
        for over in self.rules.values():
            if over is not None and over not in known:
                raise InputError(
                    f"rules: expected mesh axes among {', '.join(known)}, found '{over}'{nearest(over, known)}"
                )


@dataclass(frozen=True)
class Need:
    """The most bytes of one device, by what they are of: of training, and of generation at the same length."""

    mesh: dict[str, int]
    training: dict[str, int]
    activations: dict[str, int]  # with checkpointing and without it
    generation: dict[str, int]

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(self.mesh.values())

    def to_dict(self) -> dict[str, object]:
        """The same for JSON."""
        training, generation = ({**part, "total": sum(part.values())} for part in (self.training, self.generation))
        kept = {"activations " + way: size for way, size in self.activations.items()}
        return {"mesh": self.mesh, "devices": self.devices, "training": training, **kept, "generation": generation}


def needed(job: Job, mesh: str) -> Need:
    """What each device of a mesh needs; InputError where it cannot share the work."""
    job.check()
    found = mesh_sizes(mesh)
    if job.backend == "tf" and found["fsdp"] * found["tensor"] > 1:
        raise InputError(
            f"mesh: TensorFlow has the whole model on each device, found '{mesh}'; give data alone, or plan "
            "for pt or flax"
        )
    rows, parts = job.batch_size, math.prod(found[axis] for axis in ROW_AXES)
    if rows % parts:
        raise InputError(
            f"batch_size: expected a number of rows that {parts} devices share equally, found {rows}; change it or the "
            "mesh"
        )
    return Need(found, *of_training(job, found, rows // parts), of_generation(job, found, rows // parts))


def of_training(job: Job, mesh: Mapping[str, int], rows: int) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes of a step, whose greatest needs may not come together; and its activations either way."""
    held = sum(own_size(row, job, mesh) for row in table(job.config))
    stored, width = WIDTHS[job.param_dtype], WIDTHS[job.dtype]
    kept = {way: activations(job, mesh, rows, way == WAYS[0]) for way in WAYS}
    parts = {
        "weights": held * stored,
        "gradients": held * stored,
        "optimizer": held * stored * MOMENTS[job.optimizer],
        "gathered or cast": gathered(job, mesh) if job.backend == "pt" else 0,
        "activations": kept[WAYS[not job.checkpointing]],
        "logits": logits(job, mesh, rows, width),
    }
    return parts, kept


def of_generation(job: Job, mesh: Mapping[str, int], rows: int) -> dict[str, int]:
    """The bytes of a model that only computes, stored in the dtype in which it does, and its full cache."""
    held, width = sum(own_size(row, job, mesh) for row in table(job.config)), WIDTHS[job.dtype]
    heads = sum(len(job.config.heads(layer)) for layer in range(job.config.n_layer)) // by(job, mesh, "head")
    head_dim = job.config.n_embd // job.config.n_head
    return {"weights": held * width, "cache": 2 * heads * rows * job.length * head_dim * width}


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
    """Of FSDP2: the embeddings, and two blocks, the second of which is fetched while the first computes.

    Without it, the copies of parameters that are stored in another dtype than they are computed in, which the backward
    pass needs.
    """
    whole = {row: own_size(row, job, mesh, ("tensor",)) for row in table(job.config)}
    if mesh["fsdp"] == 1:
        return sum(whole.values()) * WIDTHS[job.dtype] if job.dtype != job.param_dtype else 0
    blocks = [
        sum(size for row, size in whole.items() if row.path.startswith(f"h.{layer}."))
        for layer in range(job.config.n_layer)
    ]
    return (sum(whole.values()) - sum(blocks) + sum(sorted(blocks)[-2:])) * WIDTHS[job.dtype]


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
