"""What the tests of all three packages go through: settings, options, labels, and folders that are broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError, ConfigError, GPT2Error
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.fields import ACTIVATIONS

CHANGES = {  # settings that change the logits, by name or by name=value
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "n_inner": 20,
    "layer_norm_epsilon": 0.3,
    "tie_word_embeddings": False,
    **{f"activation_function={name}": name for name in ACTIVATIONS},
}
SAMPLING: dict[str, dict[str, Any]] = {  # the cases of sampling.safetensors
    "plain": {},
    "temperature_0.7_top_k_20": {"temperature": 0.7, "top_k": 20},
    "top_p_0.9": {"top_p": 0.9},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2},
}
PROBLEMS = [  # problem_type, number of labels, labels of three texts
    (None, 1, np.array([0.5, -1.0, 2.0])),
    ("regression", 1, np.array([[0.5], [-1.0], [2.0]])),
    (None, 3, np.array([0, 2, 1])),
    ("single_label_classification", 3, np.array([0, 2, 1])),
    ("single_label_classification", 3, np.array([0, -100, 1])),
    (None, 3, np.array([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
    ("multi_label_classification", 3, np.array([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
]


def write(folder: Path, **files: bytes) -> None:
    """Write files into a folder; `__` stands for a dot."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


def change(folder: Path, **settings: Any) -> None:
    """Change a config.json alone."""
    GPT2Config.from_json_file(folder / "config.json", **settings).save_pretrained(folder)


def deepen(folder: Path) -> None:
    """One layer more in config.json than in the weights."""
    change(folder, n_layer=GPT2Config.from_json_file(folder / "config.json").n_layer + 1)


def cut(folder: Path) -> None:
    """Weights without their end."""
    write(folder, model__safetensors=(folder / "model.safetensors").read_bytes()[:-7])


BROKEN = {  # what to do to a folder of 31 words, the error, and a part of its sentence
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir()], CheckpointError, "found no weights, but nothing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "found no weights"),
    "truncated weights": (cut, CheckpointError, "not a whole safetensors"),
    "a wider config": (lambda f: change(f, n_embd=24), CheckpointError, r"expected \(31, 24\)"),
    "a deeper config": (deepen, CheckpointError, "lacks 12 tensors"),
    "no JSON": (lambda f: write(f, config__json=b"{"), ConfigError, "not valid JSON"),
    "another kind": (lambda f: write(f, config__json=b'{"model_type": "bert"}'), ConfigError, "found 'bert'"),
    "no JSON for generation": (
        lambda f: write(f, generation_config__json=b"]"),
        CheckpointError,
        "not valid JSON",
    ),
    "odd generation": (
        lambda f: write(f, generation_config__json=json.dumps({"top_p": 7}).encode()),
        GPT2Error,
        r"generation_config\.json: top_p: expected",
    ),
}

# Labels of one row that are no list of one: head, and what it is given.
ALONE = [
    ("sequence_classification", {"labels": np.array(1)}),
    ("question_answering", {"start_positions": np.array(2), "end_positions": np.array(4)}),
    ("double_heads", {"mc_labels": np.array(0)}),
]
