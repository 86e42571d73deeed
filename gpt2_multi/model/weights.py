"""The table of weights: every parameter of GPT-2, one row each.

Shapes, initial standard deviations, names in files and sharding all follow from these rows; nothing else in the library
lists a parameter. Names are OpenAI's; initialisation is Radford et al. 2019, section 2.3: N(0, `initializer_range`),
with the projections that end a residual branch scaled by 1 / sqrt(2 n_layer).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt2_multi.errors import InputError, nearest
from gpt2_multi.model.config import GPT2Config

NORMAL, RESIDUAL, ZEROS, ONES = "normal", "residual", "zeros", "ones"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Param:
    """One row: `path` with `{i}` for the layer, `kind`, `axes` (parentheses: stored as one dimension), `init`."""

    path: str
    kind: str  # embedding | kernel (in, out) | linear (out, in) | bias | scale | shift
    axes: str
    init: str


def _norm(path: str) -> tuple[Param, ...]:
    return Param(path, "scale", "embed", ONES), Param(path, "shift", "embed", ZEROS)


def _kernel(path: str, inputs: str, outputs: str, init: str = NORMAL) -> tuple[Param, ...]:
    return Param(path, "kernel", f"{inputs} {outputs}", init), Param(path, "bias", outputs, ZEROS)


def _linear(path: str, outputs: str) -> tuple[Param, ...]:
    return Param(path, "linear", f"{outputs} embed", NORMAL), Param(path, "bias", outputs, ZEROS)


EMBEDDINGS = (Param("wte", "embedding", "vocab embed", NORMAL), Param("wpe", "embedding", "position embed", NORMAL))
ATTENTION = (
    *_norm("h.{i}.ln_1"),
    *_kernel("h.{i}.attn.c_attn", "embed", "(qkv head head_dim)"),
    *_kernel("h.{i}.attn.c_proj", "(head head_dim)", "embed", RESIDUAL),
)
CROSS_ATTENTION = (
    *_norm("h.{i}.ln_cross_attn"),
    *_kernel("h.{i}.crossattention.q_attn", "embed", "(head head_dim)"),
    *_kernel("h.{i}.crossattention.c_attn", "embed", "(kv head head_dim)"),
    *_kernel("h.{i}.crossattention.c_proj", "(head head_dim)", "embed", RESIDUAL),
)
MLP = (
    *_norm("h.{i}.ln_2"),
    *_kernel("h.{i}.mlp.c_fc", "embed", "mlp"),
    *_kernel("h.{i}.mlp.c_proj", "mlp", "embed", RESIDUAL),
)
HEADS: Mapping[str, tuple[Param, ...]] = {
    "base": (),
    "lm": (Param("lm_head", "linear", "vocab embed", NORMAL),),
    "double_heads": (
        Param("lm_head", "linear", "vocab embed", NORMAL),
        *_linear("multiple_choice_head.summary", "summary"),
    ),
    "sequence_classification": (Param("score", "linear", "label embed", NORMAL),),
    "token_classification": _linear("classifier", "label"),
    "question_answering": _linear("qa_outputs", "span"),
}


@dataclass(frozen=True)
class Weight:
    """One tensor of one model: a row of the table with its layer and sizes filled in.

    `axes` has one tuple of named axes per dimension, outermost first, and `lengths` those axes' lengths; `std` is 0 for
    constants.
    """

    path: str
    kind: str
    axes: tuple[tuple[str, ...], ...]
    lengths: tuple[Shape, ...]
    std: float

    @property
    def shape(self) -> Shape:
        """The length of each dimension."""
        return tuple(math.prod(dim) for dim in self.lengths)

    @property
    def name(self) -> str:
        """The canonical name: transformers' spelling without a root prefix, such as `h.0.attn.c_attn.weight`."""
        return f"{self.path}.{'bias' if self.kind in ('bias', 'shift') else 'weight'}"

    @property
    def constant(self) -> float:
        """The initial value where `std` is 0: one for a layer norm's scale, zero for biases."""
        return 1.0 if self.kind == "scale" else 0.0

    @property
    def in_body(self) -> bool:
        """Whether the tensor belongs to the bare model rather than to a head."""
        return self.path.startswith(("wte", "wpe", "h.", "ln_f"))


def table(config: GPT2Config, head: str = "lm") -> list[Weight]:
    """Every tensor of `config` with this head (a key of `HEADS`), in the order of the forward pass."""
    rows = [weight_of(param, config, None) for param in EMBEDDINGS]
    for layer in range(config.n_layer):
        cross = CROSS_ATTENTION if config.add_cross_attention else ()
        rows += [weight_of(param, config, layer) for param in (*ATTENTION, *cross, *MLP)]
    rows += [weight_of(param, config, None) for param in _norm("ln_f")]
    return rows + head_rows(config, head)


def parameter_count(config: GPT2Config, head: str = "lm") -> int:
    """How many numbers the tensors of the table hold."""
    return sum(math.prod(weight.shape) for weight in table(config, head))


def head_rows(config: GPT2Config, head: str) -> list[Weight]:
    """The rows of a head alone."""
    return [weight_of(param, config, None) for param in HEADS[head] if _stored(param, config)]


def _stored(param: Param, config: GPT2Config) -> bool:
    if param.path == "lm_head":
        return not config.tie_word_embeddings
    return config.summary_use_proj or not param.path.startswith("multiple_choice_head")


def sizes(config: GPT2Config, layer: int | None = None) -> dict[str, int]:
    """The length of every named axis; `layer` matters only where heads were pruned."""
    return {
        "vocab": config.vocab_size,
        "position": config.n_positions,
        "embed": config.n_embd,
        "qkv": 3,
        "kv": 2,
        "head": config.n_head if layer is None else len(config.heads(layer)),
        "head_dim": config.n_embd // config.n_head,
        "mlp": config.n_inner or 4 * config.n_embd,
        "label": config.num_labels,
        "summary": 1 if config.summary_proj_to_labels else config.n_embd,  # a choice has one score
        "span": 2,
    }


def weight_of(param: Param, config: GPT2Config, layer: int | None) -> Weight:
    """The tensor that a row of the table is in a model, in one of its layers or, with None, outside of them."""
    size = sizes(config, layer if ".attn." in param.path else None)  # pruning leaves cross-attention whole
    axes = tuple(tuple(dim.split()) for dim in (a or b for a, b in re.findall(r"\(([^)]*)\)|(\w+)", param.axes)))
    lengths = tuple(tuple(size[axis] for axis in dim) for dim in axes)
    std = {NORMAL: 1.0, RESIDUAL: (2 * config.n_layer) ** -0.5}.get(param.init, 0.0) * config.initializer_range
    return Weight(param.path.format(i=layer), param.kind, axes, lengths, std)


Rules = Mapping[str, str | None]  # which mesh axis cuts a named axis; None: whole, as without a rule

MESH_AXES = ("data", "fsdp", "tensor")
ROW_AXES = MESH_AXES[:2]  # over which the rows of a batch are cut
DATA: dict[str, str] = {}  # every device holds every parameter
FSDP = {"embed": "fsdp"}  # Rajbhandari et al. 2020: parameters, gradients and the optimizer's state are cut
TENSOR = {"head": "tensor", "mlp": "tensor"}  # Shoeybi et al. 2019; "vocab" too where it divides: 50257 does not

ENGINES = {  # which axes each mesh axis can cut in PyTorch
    "fsdp": ("vocab", "position", "embed", "head", "mlp", "label", "summary", "span"),
    "tensor": ("vocab", "position", "head", "mlp", "label", "span"),
}


def mesh_sizes(shape: str) -> dict[str, int]:
    """The size of each axis of the mesh that a text such as "data=2,fsdp=2" describes; one that it leaves out has 1.

    Raises InputError for an unknown axis, for one that is there twice, and for a size that is no positive number.
    """
    axes = [_mesh_axis(part) for part in shape.split(",") if part.strip()]
    if len(dict(axes)) < len(axes):
        raise InputError(f"mesh: expected each axis once, found '{shape}'; write one size for each")
    return dict.fromkeys(MESH_AXES, 1) | dict(axes)


def _mesh_axis(part: str) -> tuple[str, int]:
    name, _, size = (piece.strip() for piece in part.partition("="))
    if name not in MESH_AXES:
        raise InputError(f"mesh: expected the axes {', '.join(MESH_AXES)}, found '{name}'{nearest(name, MESH_AXES)}")
    if not size.isdecimal() or not int(size):
        raise InputError(f"mesh: expected a positive number for '{name}', found '{size}'; write for example {name}=2")
    return name, int(size)


def check_named_axes(rules: object, known: Sequence[str], why: Mapping[str, str] | None = None) -> None:
    """Rules have to be a dict of known named axes; `why` says of others what they are, where that is worth saying."""
    if not isinstance(rules, Mapping):
        raise InputError(
            f"rules: expected a dict such as sharding.FSDP, found {type(rules).__name__}; dict(...) makes one"
        )
    for axis in rules:
        if axis not in known:
            hint = (why or {}).get(axis) or nearest(axis, known)
            raise InputError(f"rules: expected named axes among {', '.join(known)}, found '{axis}'{hint}")


def check_engines(rules: Rules) -> None:
    """In PyTorch rules have to name mesh axes whose engines can cut the named axes."""
    for axis, over in rules.items():
        if over is not None and axis not in ENGINES.get(over, ()):
            _refuse_axis(axis, over)


def _refuse_axis(axis: str, over: str) -> None:
    able = [name for name, axes in ENGINES.items() if axis in axes]
    if able:
        hint = f"expected {' or '.join(able)}{nearest(str(over), able)}"
    else:
        hint = f"expected none; {', '.join(ENGINES['fsdp'])} can be cut"
    raise InputError(f"rules: '{axis}' is to be cut over the mesh axis '{over}', {hint}")


def check_used(rules: Rules, shape: Mapping[str, int]) -> None:
    """In PyTorch the devices of a mesh axis have to have something to share."""
    for axis, rule in (("fsdp", "FSDP"), ("tensor", "TENSOR")):
        if shape[axis] > 1 and axis not in rules.values():
            raise InputError(
                f"rules: nothing is cut over '{axis}', of which the mesh has {shape[axis]}; add sharding.{rule}, or "
                "give the processes to another axis of the mesh"
            )


def check_cut_once(name: str, axes: Sequence[str], rules: Rules) -> None:
    """A mesh axis cuts a parameter of these named axes along one of them at most."""
    cut = [axis for axis in axes if rules.get(axis) is not None]
    for i, axis in enumerate(cut):
        for other in cut[:i]:
            if rules[axis] == rules[other]:
                raise InputError(
                    f"rules: '{other}' and '{axis}' are both cut over '{rules[axis]}', but {name} has both, and a mesh "
                    "axis can cut only one; take another mesh axis, or leave one out"
                )


def check_shared(name: str, axis: str, entries: int, over: str, count: int, what: str = "devices") -> None:
    """The entries of a parameter's named axis have to be shared equally, by devices or by processes."""
    if entries % count:
        raise InputError(
            f"{name}: the axis '{axis}' has {entries} entries, which {count} {what} of the mesh axis '{over}' "
            f"cannot share equally; change the mesh or leave '{axis}' out of the rules"
        )
