"""How each format spells and stores the table of weights, and which row of it each tensor of a file is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError, shortened
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import EMBEDDINGS, HEADS, Shape, Weight, table, weight_of

Array = np.ndarray[Any, Any]
BLOCK = re.compile(r"^h\.(\d+)\.")  # what the paths of a block begin with


@dataclass(frozen=True)
class Spelling:
    """How one format spells and stores the table: a root before the body's paths, a leaf name per kind, a layout.

    `block` spells `h.{i}`, `first_block` that of layer 0 where it has no number, and `renamed` other paths, those of a
    block without it; `named` those of single tensors, by their canonical names there. Where that gives several names,
    each has an equal part of the last dimension. Tensors of a kind or a name in `transposed` lie the other way round;
    the body's in `leading_one` have a first dimension of 1; with `unflattened` the named axes have dimensions of their
    own, the heads before all others with `heads_first`. With `always_rooted` the bare model has the root too.
    """

    name: str
    root: str
    leaves: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    separator: str = "."
    block: str = "h.{}"
    first_block: str | None = None
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    suffix: str = ""
    leading_one: frozenset[str] = frozenset()
    unflattened: bool = False
    heads_first: bool = False
    always_rooted: bool = False

    def spell(self, weight: Weight, rooted: bool = True) -> str:
        """The name of `weight` in this format, with the root in front of the body's tensors if `rooted`."""
        return self.spellings(weight, rooted)[0]

    def spellings(self, weight: Weight, rooted: bool = True) -> tuple[str, ...]:
        """The names of all tensors that `weight` is in this format, one as a rule."""
        block = BLOCK.match(weight.path)
        start = block.end() if block else 0
        before = self.root if weight.in_body and (rooted or self.always_rooted) else ""
        before += self._block(block[1]) + self.separator if block else ""
        return tuple(before + name for name in self.named.get(weight.name[start:]) or self._names(weight, start))

    def _names(self, weight: Weight, start: int) -> tuple[str, ...]:
        """The names within a block, of a path with a leaf for its kind."""
        leaf, path = self.leaves[weight.kind], weight.path[start:]
        after = (self.separator + leaf if leaf else "") + self.suffix
        return tuple(name + after for name in self.renamed.get(path, (path.replace(".", self.separator),)))

    def _block(self, layer: str) -> str:
        return self.first_block if self.first_block and layer == "0" else self.block.format(layer)

    def shape(self, weight: Weight) -> Shape:
        """The shape of `weight` as this format stores it, of each part of it where there are several."""
        shape = self.flat_shape(weight)
        if self.unflattened:
            lengths, order = self._apart(weight)
            shape = tuple(lengths[axis] for axis in order)
        shape = shape[::-1] if self.turns(weight) else shape
        leads = weight.in_body and not self.leading_one.isdisjoint((weight.kind, weight.name))
        return (1, *shape) if leads else shape

    def turns(self, weight: Weight) -> bool:
        """Whether `weight` lies the other way round here."""
        return not self.transposed.isdisjoint((weight.kind, BLOCK.sub("", weight.name)))

    def flat_shape(self, weight: Weight) -> Shape:
        """The shape of `weight` in the table's layout, of each part of it where this format has several."""
        *others, last = weight.shape
        return *others, last // len(self.spellings(weight))

    def layout(self, weight: Weight, array: Any) -> Any:
        """Turn `array` from the table's layout into this format's, or back: both are the same transposition."""
        return array.T if self.turns(weight) else array

    def stored(self, weight: Weight, part: Array) -> Array:
        """One part of `weight` from the table's layout as this format stores it."""
        if self.heads_first:
            lengths, order = self._apart(weight)
            part = part.reshape(lengths).transpose(order)
        found: Array = self.layout(weight, part).reshape(self.shape(weight))
        return found

    def restored(self, weight: Weight, part: Array) -> Array:
        """One part of `weight` as this format stores it in the table's layout; a view where there can be one."""
        flat = self.flat_shape(weight)
        if self.heads_first:
            lengths, order = self._apart(weight)
            part = self.layout(weight, part).reshape([lengths[axis] for axis in order])
            return part.transpose(np.argsort(order)).reshape(flat)
        found: Array = self.layout(weight, part.reshape(flat[::-1] if self.turns(weight) else flat))
        return found

    def _apart(self, weight: Weight) -> tuple[list[int], list[int]]:
        """The lengths of the named axes of one part of `weight`, and the order in which this format has them."""
        named = [pair for dim in zip(weight.axes, weight.lengths, strict=True) for pair in zip(*dim, strict=True)]
        named = [pair for pair in named if pair[0] != "qkv"]
        order = sorted(range(len(named)), key=lambda axis: self.heads_first and named[axis][0] != "head")
        return [length for _, length in named], order


_WEIGHT_BIAS = dict(embedding="weight", kernel="weight", linear="weight", bias="bias", scale="weight", shift="bias")

TRANSFORMERS = Spelling("transformers", "transformer.", _WEIGHT_BIAS)
TORCH = Spelling("torch", "transformer.", _WEIGHT_BIAS, transposed=frozenset({"kernel"}))  # nn.Linear is (out, in)
_KERAS = dict(embedding="embeddings", kernel="kernel", linear="kernel", bias="bias", scale="gamma", shift="beta")
KERAS = Spelling("keras", "transformer.", _KERAS, transposed=frozenset({"linear"}))  # Dense is (in, out)
_FLAX = dict(embedding="embedding", kernel="kernel", linear="kernel", bias="bias", scale="scale", shift="bias")
FLAX = Spelling("flax", "transformer.", _FLAX, transposed=frozenset({"linear"}))
TF = Spelling(  # transformers' TFGPT2; its Conv1D has a weight and a bias of (1, n), its Dense layers Keras' names
    "tf",
    "transformer/",
    dict(embedding="embeddings", kernel="weight", linear="kernel", bias="bias", scale="gamma", shift="beta"),
    transposed=frozenset({"linear"}),
    separator="/",
    block="h_._{}",
    suffix=":0",
    always_rooted=True,
    leading_one=frozenset({"bias"}),
)
FLAX_FILE = Spelling(  # transformers' FlaxGPT2, whose FlaxConv1D stores (out, in)
    "flax",
    "transformer/",
    dict(embedding="embedding", kernel="kernel", linear="kernel", bias="bias", scale="scale", shift="bias"),
    transposed=frozenset({"kernel", "linear"}),
    separator="/",
    block="h/{}",
)
OPENAI = Spelling(  # OpenAI's model.py: conv1d of (1, in, out)
    "openai",
    "model/",
    dict(embedding="", kernel="w", linear="", bias="b", scale="g", shift="b"),
    separator="/",
    block="h{}",
    always_rooted=True,
    leading_one=frozenset({"kernel"}),
)
NANOGPT = replace(TORCH, always_rooted=True)
_VARS = dict(embedding="vars/0", kernel="vars/0", linear="vars/0", bias="vars/1", scale="vars/0", shift="vars/1")
_ATTENTION, _FEEDFORWARD = "_self_attention_layer", "_feedforward"
KERAS_HUB = Spelling(
    "keras-hub",
    "layers/",
    _VARS,
    separator="/",
    block="transformer_decoder_{}",
    first_block="transformer_decoder",
    renamed={
        "wte": ("reversible_embedding",),
        "wpe": ("position_embedding",),
        "ln_f": ("layer_normalization",),
        "ln_1": (f"{_ATTENTION}_norm",),
        "attn.c_attn": tuple(f"{_ATTENTION}/{part}_dense" for part in ("query", "key", "value")),
        "attn.c_proj": (f"{_ATTENTION}/output_dense",),
        "ln_2": (f"{_FEEDFORWARD}_layer_norm",),
        "mlp.c_fc": (f"{_FEEDFORWARD}_intermediate_dense",),
        "mlp.c_proj": (f"{_FEEDFORWARD}_output_dense",),
    },
    unflattened=True,
    always_rooted=True,
)
KERAS_WEIGHTS = Spelling(  # what `save_weights` makes of gpt2_multi.tf; a head is a Dense layer, whatever it is for
    "keras-weights",
    "layers/tfgpt2_model/",
    _VARS,
    transposed=frozenset({"linear"}),
    separator="/",
    block="h/block_{}",
    first_block="h/block",
    renamed={
        "wte": ("layers/reversible_embedding",),
        "wpe": ("layers/embedding",),
        "ln_f": ("layers/layer_normalization",),
        "lm_head": ("layers/dense",),
        "score": ("layers/dense",),
        "classifier": ("classifier",),  # attributes are saved by the alphabet, and this one comes before `layers`
        "qa_outputs": ("layers/dense",),
        "multiple_choice_head.summary": ("layers/sequence_summary/summary",),
    },
)

MINGPT_2020 = Spelling(  # the first minGPT; its positions are a parameter of (1, n_positions, n_embd)
    "mingpt-2020",
    "",
    _WEIGHT_BIAS,
    transposed=frozenset({"kernel"}),
    block="blocks.{}",
    renamed={
        "wte": ("tok_emb",),
        "lm_head": ("head",),
        "ln_1": ("ln1",),
        "attn.c_attn": ("attn.query", "attn.key", "attn.value"),
        "attn.c_proj": ("attn.proj",),
        "ln_2": ("ln2",),
        "mlp.c_fc": ("mlp.0",),
        "mlp.c_proj": ("mlp.2",),
    },
    named={"wpe.weight": ("pos_emb",)},
    leading_one=frozenset({"wpe.weight"}),
)
LENS = Spelling(  # TransformerLens' HookedTransformer: each head apart, the unembedding of (embed, vocab)
    "transformer-lens",
    "",
    dict(embedding="W", kernel="W", linear="W", bias="b", scale="w", shift="b"),
    transposed=frozenset({"linear"}),
    block="blocks.{}",
    renamed={"ln_1": ("ln1",), "ln_2": ("ln2",), "ln_f": ("ln_final",)},
    named={
        "wte.weight": ("embed.W_E",),
        "wpe.weight": ("pos_embed.W_pos",),
        "lm_head.weight": ("unembed.W_U",),
        "attn.c_attn.weight": ("attn.W_Q", "attn.W_K", "attn.W_V"),
        "attn.c_attn.bias": ("attn.b_Q", "attn.b_K", "attn.b_V"),
        "attn.c_proj.weight": ("attn.W_O",),
        "attn.c_proj.bias": ("attn.b_O",),
        "mlp.c_fc.weight": ("mlp.W_in",),
        "mlp.c_fc.bias": ("mlp.b_in",),
        "mlp.c_proj.weight": ("mlp.W_out",),
        "mlp.c_proj.bias": ("mlp.b_out",),
    },
    unflattened=True,
    heads_first=True,
)
LENS_BRIDGE = Spelling(  # TransformerLens 4's TransformerBridge: Q, K and V are nn.Linear's, all else as transformers'
    "transformer-bridge",
    "",
    _WEIGHT_BIAS,
    transposed=frozenset({"attn.c_attn.weight"}),
    block="blocks.{}",
    renamed={
        "wte": ("embed",),
        "wpe": ("pos_embed",),
        "lm_head": ("unembed",),
        "ln_1": ("ln1",),
        "attn.c_attn": ("attn.q", "attn.k", "attn.v"),
        "attn.c_proj": ("attn.o",),
        "ln_2": ("ln2",),
        "mlp.c_fc": ("mlp.in",),
        "mlp.c_proj": ("mlp.out",),
        "ln_f": ("ln_final",),
    },
)

# The causal mask that old PyTorch checkpoints carry as a buffer, and a bias of TransformerLens that GPT-2 has not and
# that has to be zero: known, and dropped.
MASK_BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.(attn|crossattention)\.(bias|masked_bias)"
    r"|blocks\.\d+\.attn\.(mask|IGNORE)|unembed\.(b_U|bias)"
)


# What wraps a part of a model, and so stands within names too: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# A kernel in a state dictionary of PyTorch, whatever stands before its name.
KERNEL = re.compile(r"(^|\.)h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)\.weight$")


def turned(name: str, x: Any) -> Any:
    """A tensor of a state dictionary of PyTorch, in the other layout where it is a kernel."""
    return x.T if KERNEL.search(name) and len(x.shape) == 2 else x


def out_first(found: Mapping[str, Shape]) -> bool | None:
    """Whether a state dictionary of PyTorch has kernels of (out, in), so that it is of `TORCH` and not transformers'.

    A bias tells, since it is as long as what comes out; None where nothing does, as where all kernels are square.
    """
    found = {WRAPPERS.sub("", name): shape for name, shape in found.items()}
    for name, shape in found.items():
        if KERNEL.search(name) and len(shape) == 2 and shape[0] != shape[1]:
            out = tuple(found.get(f"{name.removesuffix('weight')}bias", ()))
            if out in ((shape[0],), (shape[1],)):
                return out == (shape[0],)
    return None


def match(
    found: Mapping[str, Shape],
    config: GPT2Config,
    head: str,
    spelling: Spelling,
    source: str,
    has_own: bool = False,
) -> dict[str, Weight]:
    """Which row of the table each tensor of a checkpoint is: name in `spelling` -> Weight.

    Strict: raises CheckpointError for a missing or an unexpected tensor, naming `source`; shapes are for the caller to
    look at. With `has_own` the model has more than the table, and the caller calls `refuse_unexpected` when he knows
    what. Old masks and a head that this model does not have are dropped; so is a tied `lm_head.weight`, which the
    caller has to compare with `wte`. The root prefix may be missing from all names, or be there although the model is
    the bare one. A task head that is missing as a whole is left out of the answer: fine-tuning starts so, and the
    caller initialises it.
    """
    wanted = named_rows(found, config, head, spelling, source)
    fresh = {name for name, weight in wanted.items() if not weight.in_body and weight.path != "lm_head"}
    if not fresh & set(found):
        wanted = {name: weight for name, weight in wanted.items() if name not in fresh}
    if lacking := [_both(name, weight) for name, weight in wanted.items() if name not in found]:
        _refuse_adapters(found, source)
        _refuse(source, "lacks", lacking)
    if not has_own:
        refuse_unexpected(found, wanted, config, spelling, source)
    return wanted


def _refuse_adapters(found: Collection[str], source: str) -> None:
    """Raises CheckpointError for the weights of a model with adapters in it, which compute with it."""
    if adapted := next((name for name in found if ".base_layer." in name), None):
        raise CheckpointError(
            f"{source}: has adapters of PEFT in it ({shortened(adapted)}); save what model.merge_and_unload() gives, "
            "or the adapters alone by its save_pretrained, and load them onto the model that they were made for"
        )


def refuse_unexpected(
    found: Collection[str], wanted: Collection[str], config: GPT2Config, spelling: Spelling, source: str
) -> None:
    """Raises CheckpointError for a tensor that is not wanted, and that no other head or old version explains."""
    extra = [name for name in found if name not in wanted and not is_known_extra(name, config, spelling)]
    _refuse(source, "has unexpected", extra, _way_to_drop(extra, spelling))


def _way_to_drop(names: list[str], spelling: Spelling) -> str:
    """How to leave tensors out that stand beside a model, and are not more layers of it."""
    layer = re.escape(spelling.block.format("@")).replace("@", r"\d+")
    if not names or any(re.match(f"({re.escape(spelling.root)})?{layer}", name) for name in names):
        return ""
    same = "".join(ones[0] for ones in takewhile(lambda ones: len(set(ones)) == 1, zip(*names, strict=False)))
    pattern = names[0] if len(names) == 1 else re.sub(r"[^./]*$", "", same) + "*"
    how = "patterns of their names in drop=[...]" if pattern == "*" else f"drop={shortened(pattern)!r}"
    return f", or leave out what is no part of it: {how} (--drop)"


def misshapen(
    found: Mapping[str, Shape], wrong: Mapping[str, Weight], spelling: Spelling, source: str
) -> CheckpointError:
    """The error of tensors that have other shapes than the configuration says."""
    name, weight = next(iter(wrong.items()))
    return CheckpointError(
        f"{source}: {_both(name, weight)} has shape {tuple(found[name])}, expected {spelling.shape(weight)} by "
        "config.json; the weights and config.json belong to different models (ignore_mismatched_sizes=True initialises "
        "what does not fit)"
    )


def named_rows(
    found: Collection[str], config: GPT2Config, head: str, spelling: Spelling, source: str
) -> dict[str, Weight]:
    """The rows of the table by the names that a file in `spelling` has for them, with the root if any name has it.

    Raises CheckpointError for far more layers than the file can have, a table of which would be absurd.
    """
    if config.n_layer > max(1000, len(found)):
        raise CheckpointError(
            f"{source} has {len(found)} tensors, too few for the {shortened(str(config.n_layer))} layers of its "
            "configuration; the weights and config.json belong to different models"
        )
    rooted = any(name.startswith(spelling.root) for name in found)
    rows = {name: weight for weight in table(config, head) for name in spelling.spellings(weight, rooted)}
    lone = _lone_head(found, config, spelling, rooted)
    return {lone.get(name, name): weight for name, weight in rows.items()}


def _lone_head(found: Collection[str], config: GPT2Config, spelling: Spelling, rooted: bool) -> dict[str, str]:
    """The embedding's name -> the head's, where a saver that drops what is there twice has kept the tied head."""
    params = EMBEDDINGS[0], HEADS["lm"][0]
    embedding, head = (spelling.spell(weight_of(param, config, None), rooted) for param in params)
    is_lone = spelling in (TRANSFORMERS, TORCH) and config.tie_word_embeddings and head in found
    return {embedding: head} if is_lone and embedding not in found else {}


def is_known_extra(name: str, config: GPT2Config, spelling: Spelling) -> bool:
    """Whether a tensor that a model does not have may be in its file: an old mask, or another head."""
    return bool(MASK_BUFFERS.fullmatch(name)) or name in _heads(config, spelling)


def _heads(config: GPT2Config, spelling: Spelling) -> set[str]:
    return {
        name for rows in HEADS.values() for param in rows for name in spelling.spellings(weight_of(param, config, None))
    }


def _both(name: str, weight: Weight) -> str:
    return name if name == weight.name else f"{name} ({weight.name} in the table)"


def _refuse(source: str, verb: str, names: Iterable[str], advice: str = "") -> None:
    names = [shortened(name) for name in sorted(names)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        tensors = "the tensor" if len(names) == 1 else f"{len(names)} tensors:"
        raise CheckpointError(
            f"{source} {verb} {tensors} {', '.join(names[:3])}{more}; it is not a checkpoint of this configuration and "
            "class: check n_layer, add_cross_attention, tie_word_embeddings and the class that you load it with"
            f"{advice}"
        )


def parts_of(spelling: Spelling, weight: Weight, array: Array) -> list[Array]:
    """A row of the table in this format's shape and layout: a part per name."""
    return [spelling.stored(weight, part) for part in np.split(array, len(spelling.spellings(weight)), -1)]


def row_of(spelling: Spelling, weight: Weight, found: list[Array]) -> Array:
    """A row of the table from its parts in this format. One part is not copied, but where its heads come first."""
    rows = [spelling.restored(weight, part) for part in found]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, -1)
