"""What vLLM asks of a folder, as its `vllm/model_executor/models/gpt2.py` reads (Apache-2.0, of February 2025).

Its classes are not here: they need its package. What is said here is what its loader does with names and shapes, and
what its model asserts of the configuration that transformers' AutoConfig reads.
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
CONFIG = GPT2Config(
    vocab_size=11, n_positions=16, n_embd=6, n_layer=2, n_head=3, n_inner=10, bos_token_id=1, eos_token_id=2
)


def parameters(config: Any) -> dict[str, tuple[int, ...]]:
    """The parameters of vLLM's GPT2LMHeadModel on one device, whose linear layers are (out, in); the head is tied."""
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
    return {f"transformer.{name}": shape for name, shape in found.items()}


def loaded(folder: Path, config: Any) -> dict[str, Any]:
    """What its `load_weights` puts into each parameter."""
    wanted, found = parameters(config), dict[str, Any]()
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in read_safetensors(file).items():
            if "lm_head.weight" in name or ".attn.bias" in name or ".attn.masked_bias" in name:
                continue
            name = name if name.startswith("transformer.") else f"transformer.{name}"
            array = np.asarray(value)
            array = array.T if name.endswith(".weight") and any(part in name for part in TRANSPOSED) else array
            assert array.shape == wanted[name], name
            found[name] = array
    assert found.keys() == wanted.keys()
    return found


@pytest.fixture(params=["lm", "base"])
def written(request: Any, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder of weights with a prefix or without one, and these by their canonical names."""
    return tmp_path / "model", write_model(tmp_path / "model", CONFIG, request.param, dtype=np.float32)


def test_a_folder_that_each_backend_wrote_is_what_vllm_asks_for(backend: Any, written: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source, arrays = written
    package = importlib.import_module(f"gpt2_multi.{backend.__name__}")
    kind = {"pt": "", "tf": "TF", "flax": "Flax"}[backend.__name__] + "GPT2LMHeadModel"
    getattr(package, kind).from_pretrained(source).save_pretrained(tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text("utf-8"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert raw["model_type"] == "gpt2" and config.architectures == ["GPT2LMHeadModel"]  # by which it finds its class
    assert str(config.dtype).removeprefix("torch.") == "float32"  # what dtype="auto" follows
    assert config.tie_word_embeddings and config.activation_function == "gelu_new"
    asserted = (config.add_cross_attention, config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn)
    assert not any(asserted) and config.hidden_size % config.num_attention_heads == 0
    for name, array in loaded(tmp_path / "saved", config).items():
        expected = arrays[name.removeprefix("transformer.")]
        expected = expected.T if name.endswith(".weight") and any(part in name for part in TRANSPOSED) else expected
        assert np.array_equal(array, expected), name
