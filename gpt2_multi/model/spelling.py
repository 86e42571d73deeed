"""How each foreign format spells and stores the table of weights; a row of the table is the same in all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gpt2_multi.model.weights import TORCH, Format, Weight

Array = np.ndarray[Any, Any]

TF = Format(  # transformers' TFGPT2; its Conv1D has a weight and a bias of (1, n), its Dense layers Keras' names
    "tf",
    "transformer/",
    dict(embedding="embeddings", kernel="weight", linear="kernel", bias="bias", scale="gamma", shift="beta"),
    transposed=frozenset({"linear"}),
    separator="/",
    block="h_._{}",
    suffix=":0",
    always_rooted=True,
    widened=frozenset({"bias"}),
)
FLAX_FILE = Format(  # transformers' FlaxGPT2, whose FlaxConv1D stores (out, in)
    "flax",
    "transformer/",
    dict(embedding="embedding", kernel="kernel", linear="kernel", bias="bias", scale="scale", shift="bias"),
    transposed=frozenset({"kernel", "linear"}),
    separator="/",
    block="h/{}",
)
OPENAI = Format(  # OpenAI's model.py: conv1d of (1, in, out)
    "openai",
    "model/",
    dict(embedding="", kernel="w", linear="", bias="b", scale="g", shift="b"),
    separator="/",
    block="h{}",
    always_rooted=True,
    widened=frozenset({"kernel"}),
)
NANOGPT = replace(TORCH, always_rooted=True)
_VARS = dict(embedding="vars/0", kernel="vars/0", linear="vars/0", bias="vars/1", scale="vars/0", shift="vars/1")
_ATTENTION, _FEEDFORWARD = "_self_attention_layer", "_feedforward"
KERAS_HUB = Format(
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
KERAS_WEIGHTS = Format(  # what `save_weights` makes of gpt2_multi.tf; a head is a Dense layer, whatever it is for
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


def parts(form: Format, weight: Weight, array: Array) -> list[Array]:
    """A row of the table in this format's shape and layout: a part per name."""
    count = len(form.spellings(weight))
    return [form.layout(weight, part).reshape(form.shape(weight)) for part in np.split(array, count, -1)]


def row(form: Format, weight: Weight, found: list[Array]) -> Array:
    """A row of the table from its parts in this format. One part is not copied."""
    *others, last = weight.shape
    shape = (*others, last // len(found))
    shape = shape[::-1] if weight.kind in form.transposed else shape
    rows: list[Array] = [form.layout(weight, part.reshape(shape)) for part in found]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, -1)
