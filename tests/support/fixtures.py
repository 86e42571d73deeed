"""The models of tests/data and of the shared fixtures, and models with every tensor randomised."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.files.containers.safetensors import Array, read_safetensors
from gpt2_multi.model.checkpoint import read_weights, write_weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import Weight, table
from tests.support.shared_data import shared

DATA = Path(__file__).parents[1] / "data"
HEADS = {
    "GPT2Model": "base",
    "GPT2LMHeadModel": "lm",
    "GPT2DoubleHeadsModel": "double_heads",
    "GPT2ForSequenceClassification": "sequence_classification",
    "GPT2ForTokenClassification": "token_classification",
    "GPT2ForQuestionAnswering": "question_answering",
}
VARIANTS = [
    f"variant_{name}"
    for name in (
        "epsilon", "gelu_erf", "inner_relu", "inverse_layer_scale", "silu", "tanh", "unscaled", "untied", "upcast",
    )
]  # fmt: skip
MODELS = ["lm", "base", *HEADS.values(), "cross_attention", *VARIANTS]
MODELS = list(dict.fromkeys(MODELS))


def folder(name: str) -> Path:
    """A model folder of tests/data, or of the shared fixtures."""
    return DATA / name if (DATA / name).exists() else shared("fixtures", name)


@functools.cache
def config(name: str) -> GPT2Config:
    """A fixture's configuration."""
    return GPT2Config.from_json_file(folder(name) / "config.json")


def head(name: str) -> str:
    """Which head a fixture has."""
    return HEADS[(config(name).architectures or [""])[0]]


def weights(name: str, dtype: Any = np.float64) -> dict[str, Array]:
    """A fixture's weights by their canonical names."""
    arrays = read_weights(folder(name), config(name), head(name))
    return {key: array.astype(dtype) for key, array in arrays.items()}


@functools.cache
def reference(name: str) -> dict[str, Array]:
    """Inputs and outputs of a fixture."""
    return read_safetensors(folder(name) / "reference.safetensors")


def cases(name: str) -> dict[str, dict[str, Array]]:
    """The calls that a fixture recorded: case -> arguments, under the names of `forward`."""
    given = {key.removeprefix("in."): value for key, value in reference(name).items() if key.startswith("in.")}
    ids = {"input_ids": given["input_ids"]}
    every = {
        "plain": ids,
        "mask_right": ids | {"attention_mask": given["mask_right"]},
        "mask_left": ids | {"attention_mask": given["mask_left"]},
        "types": ids | {"token_type_ids": given["token_type_ids"]},
        "positions": ids | {"position_ids": given["position_ids"]},
        "head_mask": ids | {"head_mask": given["head_mask"]},
        "embeds": {"inputs_embeds": given["inputs_embeds"]},
        "labels": ids | {"labels": given.get("labels", ids["input_ids"])},
        "tok": ids | {"attention_mask": given["mask_right"], "labels": given.get("labels", ids["input_ids"])},
    }
    if name == "double_heads":
        choices = {"input_ids": given["choice_ids"]}
        labels = {"labels": given["choice_ids"], "mc_labels": given["mc_labels"]}
        every["double"] = choices | labels | {"mc_token_ids": given["mc_token_ids"]}
        every["double_default_mc"] = choices
    if name == "sequence_classification":
        padded = {"input_ids": given["padded_ids"]}
        every["single"] = padded | {"attention_mask": given["mask_right"], "labels": given["labels"]}
        every["multi"] = padded | {"labels": given["multi_labels"]}
    if name == "question_answering":
        every["qa"] = ids | {key: given[key] for key in ("start_positions", "end_positions")}
    if name == "cross_attention":
        every["cross"] = ids | {key: given[key] for key in ("encoder_hidden_states", "encoder_attention_mask")}
    recorded = {key.split(".")[0] for key in reference(name)}
    return {case: inputs for case, inputs in every.items() if case in recorded}


def randomised(weight: Weight, rng: np.random.Generator) -> Array:
    """A tensor whose every number matters: at fresh initialisation two layer norms could be swapped unseen."""
    std = {"scale": 0.2, "bias": 0.1, "shift": 0.1}.get(weight.kind, 0.3)
    return rng.normal(1.0 if weight.kind == "scale" else 0.0, std, weight.shape)


def write_model(where: Path, config: GPT2Config, head: str, seed: int = 0, dtype: Any = np.float64) -> dict[str, Array]:
    """A model folder with randomised weights; returns them by their canonical names."""
    rng = np.random.default_rng(seed)
    arrays = {weight.name: randomised(weight, rng).astype(dtype) for weight in table(config, head)}
    where.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(where)
    write_weights(where, [(w, np.dtype(dtype), lambda w=w: arrays[w.name]) for w in table(config, head)], head)
    return arrays
