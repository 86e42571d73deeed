"""What vLLM asks of a folder, as its `model_executor/models/{gpt2,utils}.py` read in version 0.33.0 (Apache-2.0).

Its classes are not here: they need its package. What is said here is what its loader does with names and shapes, and
what its models assert of the configuration that transformers' AutoConfig reads.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_multi.files.containers.safetensors import read_safetensors
from gpt2_multi.model.config import GPT2Config
from tests.support.fixtures import write_model

TRANSPOSED = ("c_attn", "c_proj", "c_fc")
BESIDE = ("transformer.", "lm_head.", "score.")  # names without one of these get the first
CONFIG = GPT2Config(
    vocab_size=11, n_positions=16, n_embd=6, n_layer=2, n_head=3, n_inner=10, bos_token_id=1, eos_token_id=2
)


def parameters(config: Any) -> dict[str, tuple[int, ...]]:
    """The parameters of vLLM's class on one device, whose linear layers are (out, in)."""
    wide, inner = config.hidden_size, config.n_inner or 4 * config.hidden_size
    found = {"wte.weight": (config.vocab_size, wide), "wpe.weight": (config.max_position_embeddings, wide)}
    for i in range(config.num_hidden_layers):
        linear = {"attn.c_attn": (3 * wide, wide), "attn.c_proj": (wide, wide)}
        linear |= {"mlp.c_fc": (inner, wide), "mlp.c_proj": (wide, inner)}
        for name, shape in linear.items():
            found |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
        for name in ("ln_1", "ln_2"):
            found |= {f"h.{i}.{name}.weight": (wide,), f"h.{i}.{name}.bias": (wide,)}
    found |= {"ln_f.weight": (wide,), "ln_f.bias": (wide,)}
    found = {f"transformer.{name}": shape for name, shape in found.items()}
    if config.architectures == ["GPT2ForSequenceClassification"]:
        return found | {"score.weight": (config.num_labels, wide)}
    return found if config.tie_word_embeddings else found | {"lm_head.weight": (config.vocab_size, wide)}


def loaded(folder: Path, config: Any) -> dict[str, Any]:
    """What its `load_weights` puts into each parameter."""
    wanted, found = parameters(config), dict[str, Any]()
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in read_safetensors(file).items():
            name = name if name.startswith(BESIDE) else f"transformer.{name}"
            if ".attn.bias" in name or ".attn.masked_bias" in name:
                continue
            if name == "lm_head.weight" and config.tie_word_embeddings:  # the embedding under another name
                continue
            array = np.asarray(value)
            array = array.T if name.endswith(".weight") and any(part in name for part in TRANSPOSED) else array
            assert array.shape == wanted[name], name
            found[name] = array
    assert found.keys() == wanted.keys()
    return found


HEADS = {  # the head of the files, what the configuration has besides, and the class
    "lm": ("lm", {}, "LMHeadModel"),
    "base": ("base", {}, "LMHeadModel"),
    "untied": ("lm", {"tie_word_embeddings": False}, "LMHeadModel"),
    "classifier": ("sequence_classification", {"num_labels": 3, "pad_token_id": 0}, "ForSequenceClassification"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_folder_that_each_backend_wrote_is_what_vllm_asks_for(backend: Any, name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    head, more, kind = HEADS[name]
    arrays = write_model(tmp_path / "model", CONFIG.replace(**more), head, dtype=np.float32)
    package = importlib.import_module(f"gpt2_multi.{backend.__name__}")
    ours = getattr(package, {"pt": "", "tf": "TF", "flax": "Flax"}[backend.__name__] + "GPT2" + kind)
    ours.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert raw["model_type"] == "gpt2" and config.architectures == [f"GPT2{kind}"]  # by which it finds its class
    assert str(config.dtype).removeprefix("torch.") == "float32"  # what dtype="auto" follows
    assert config.tie_word_embeddings == (name != "untied") and config.activation_function == "gelu_new"
    asserted = (config.add_cross_attention, config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn)
    assert not any(asserted) and config.hidden_size % config.num_attention_heads == 0
    for key, array in loaded(tmp_path / "saved", config).items():
        expected = arrays[key.removeprefix("transformer.")]
        expected = expected.T if key.endswith(".weight") and any(part in key for part in TRANSPOSED) else expected
        assert np.array_equal(array, expected), key
