"""The table of weights: every parameter of GPT-2, one row each, and how each format spells and stores it.

Shapes, initial standard deviations, names in files and sharding all follow from these rows; nothing else in the library
lists a parameter. Names are OpenAI's; initialisation is Radford et al. 2019, section 2.3: N(0, `initializer_range`),
with the projections that end a residual branch scaled by 1 / sqrt(2 n_layer).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt2_multi.errors import CheckpointError, InputError, shortened
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
        return f"{self.path}.{TRANSFORMERS.leaves[self.kind]}"

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
    rows = [_weight(param, config, None) for param in EMBEDDINGS]
    for layer in range(config.n_layer):
        cross = CROSS_ATTENTION if config.add_cross_attention else ()
        rows += [_weight(param, config, layer) for param in (*ATTENTION, *cross, *MLP)]
    rows += [_weight(param, config, None) for param in _norm("ln_f")]
    return rows + head_rows(config, head)


def head_rows(config: GPT2Config, head: str) -> list[Weight]:
    """The rows of a head alone."""
    return [_weight(param, config, None) for param in HEADS[head] if _stored(param, config)]


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


def _weight(param: Param, config: GPT2Config, layer: int | None) -> Weight:
    size = sizes(config, layer if ".attn." in param.path else None)  # pruning leaves cross-attention whole
    axes = tuple(tuple(dim.split()) for dim in (a or b for a, b in re.findall(r"\(([^)]*)\)|(\w+)", param.axes)))
    lengths = tuple(tuple(size[axis] for axis in dim) for dim in axes)
    std = {NORMAL: 1.0, RESIDUAL: (2 * config.n_layer) ** -0.5}.get(param.init, 0.0) * config.initializer_range
    return Weight(param.path.format(i=layer), param.kind, axes, lengths, std)


def sharding(weight: Weight, rules: Mapping[str, str]) -> tuple[str | None, ...]:
    """The mesh axis of each stored dimension under `rules` (named axis -> mesh axis), None where it is whole.

    Raises InputError for an axis that is not the outermost one of its dimension: a contiguous cut of the stored
    tensor would then mix heads with queries, keys and values. Unflatten it first.
    """
    for dim in weight.axes:
        for axis in dim[1:]:
            if axis in rules:
                raise InputError(
                    f"{weight.name}: the axis '{axis}' lies inside ({' '.join(dim)}), stored as one dimension, so "
                    f"it cannot be sharded over '{rules[axis]}'; shard '{dim[0]}' or unflatten the tensor first"
                )
    return tuple(rules.get(dim[0]) for dim in weight.axes)


@dataclass(frozen=True)
class Format:
    """How one format spells and stores the table: a root before the body's paths, a leaf name per kind, a layout.

    `block` spells `h.{i}`, `first_block` that of layer 0 where it has no number, and `renamed` other paths, those of a
    block without it. Where that gives several names, each has an equal part of the last dimension. The body's tensors
    of a kind in `widened` have a first dimension of 1; with `unflattened` the named axes have dimensions of their own.
    With `always_rooted` the bare model has the root too.
    """

    name: str
    root: str
    leaves: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    separator: str = "."
    block: str = "h.{}"
    first_block: str | None = None
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    suffix: str = ""
    widened: frozenset[str] = frozenset()
    unflattened: bool = False
    always_rooted: bool = False

    def spell(self, weight: Weight, rooted: bool = True) -> str:
        """The name of `weight` in this format, with the root in front of the body's tensors if `rooted`."""
        return self.spellings(weight, rooted)[0]

    def spellings(self, weight: Weight, rooted: bool = True) -> tuple[str, ...]:
        """The names of all tensors that `weight` is in this format, one as a rule."""
        block = re.match(r"h\.(\d+)\.", weight.path)
        path = weight.path[block.end() :] if block else weight.path
        before = self.root if weight.in_body and (rooted or self.always_rooted) else ""
        before += self._block(block[1]) + self.separator if block else ""
        leaf = self.leaves[weight.kind]
        after = (self.separator + leaf if leaf else "") + self.suffix
        return tuple(before + name + after for name in self.renamed.get(path, (path.replace(".", self.separator),)))

    def _block(self, layer: str) -> str:
        return self.first_block if self.first_block and layer == "0" else self.block.format(layer)

    def shape(self, weight: Weight) -> Shape:
        """The shape of `weight` as this format stores it, of each part of it where there are several."""
        shape = weight.shape[::-1] if weight.kind in self.transposed else weight.shape
        if self.unflattened:
            named = zip(weight.axes, weight.lengths, strict=True)
            shape = tuple(n for axes, lengths in named for axis, n in zip(axes, lengths, strict=True) if axis != "qkv")
        return (1, *shape) if weight.in_body and weight.kind in self.widened else shape

    def layout(self, weight: Weight, array: Any) -> Any:
        """Turn `array` from the table's layout into this format's, or back: both are the same transposition."""
        return array.T if weight.kind in self.transposed else array


_WEIGHT_BIAS = dict(embedding="weight", kernel="weight", linear="weight", bias="bias", scale="weight", shift="bias")

TRANSFORMERS = Format("transformers", "transformer.", _WEIGHT_BIAS)
TORCH = Format("torch", "transformer.", _WEIGHT_BIAS, transposed=frozenset({"kernel"}))  # nn.Linear is (out, in)
_KERAS = dict(embedding="embeddings", kernel="kernel", linear="kernel", bias="bias", scale="gamma", shift="beta")
KERAS = Format("keras", "transformer.", _KERAS, transposed=frozenset({"linear"}))  # Dense is (in, out)
_FLAX = dict(embedding="embedding", kernel="kernel", linear="kernel", bias="bias", scale="scale", shift="bias")
FLAX = Format("flax", "transformer.", _FLAX, transposed=frozenset({"linear"}))

# The causal mask that old PyTorch checkpoints carry as a buffer: known, and dropped.
MASK_BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")


def match(found: Mapping[str, Shape], config: GPT2Config, head: str, form: Format, source: str) -> dict[str, Weight]:
    """Which row of the table each tensor of a checkpoint is: name in `form` -> Weight.

    Strict: raises CheckpointError for a missing, an unexpected or a wrongly shaped tensor, naming `source`. Old masks
    and a head that this model does not have are dropped; so is a tied `lm_head.weight`, which the caller has to compare
    with `wte`. The root prefix may be missing from all names, or be there although the model is the bare one. A task
    head that is missing as a whole is left out of the answer: fine-tuning starts so, and the caller initialises it.
    """
    wanted = named_rows(found, config, head, form, source)
    fresh = {name for name, weight in wanted.items() if not weight.in_body and weight.path != "lm_head"}
    if not fresh & set(found):
        wanted = {name: weight for name, weight in wanted.items() if name not in fresh}
    _refuse(source, "lacks", [_both(name, weight) for name, weight in wanted.items() if name not in found])
    known = wanted.keys() | _heads(config, form)
    extra = [name for name in found if name not in known and not MASK_BUFFERS.fullmatch(name)]
    _refuse(source, "has unexpected", extra)
    for name, weight in wanted.items():
        if tuple(found[name]) != form.shape(weight):
            raise CheckpointError(
                f"{source}: {_both(name, weight)} has shape {tuple(found[name])}, expected {form.shape(weight)} by "
                "config.json; the weights and config.json belong to different models"
            )
    return wanted


def named_rows(found: Collection[str], config: GPT2Config, head: str, form: Format, source: str) -> dict[str, Weight]:
    """The rows of the table by the names that a file in `form` has for them, with the root if any name there has it.

    Raises CheckpointError for far more layers than the file can have, a table of which would be absurd.
    """
    if config.n_layer > max(1000, len(found)):
        raise CheckpointError(
            f"{source} has {len(found)} tensors, too few for the {shortened(str(config.n_layer))} layers of its "
            "configuration; the weights and config.json belong to different models"
        )
    rooted = any(name.startswith(form.root) for name in found)
    return {name: weight for weight in table(config, head) for name in form.spellings(weight, rooted)}


def is_known_extra(name: str, config: GPT2Config, form: Format) -> bool:
    """Whether a tensor that a model does not have may be in its file: an old mask, or another head."""
    return bool(MASK_BUFFERS.fullmatch(name)) or name in _heads(config, form)


def _heads(config: GPT2Config, form: Format) -> set[str]:
    return {name for rows in HEADS.values() for param in rows for name in form.spellings(_weight(param, config, None))}


def _both(name: str, weight: Weight) -> str:
    return name if name == weight.name else f"{name} ({weight.name} in the table)"


def _refuse(source: str, verb: str, names: Iterable[str]) -> None:
    names = [shortened(name) for name in sorted(names)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        tensors = "the tensor" if len(names) == 1 else f"{len(names)} tensors:"
        raise CheckpointError(
            f"{source} {verb} {tensors} {', '.join(names[:3])}{more}; it is not a checkpoint of this configuration and "
            "class: check n_layer, add_cross_attention, tie_word_embeddings and the class that you load it with"
        )


def parameter_count(config: GPT2Config, head: str = "lm") -> int:
    """How many numbers the tensors of the table hold."""
    return sum(math.prod(weight.shape) for weight in table(config, head))
