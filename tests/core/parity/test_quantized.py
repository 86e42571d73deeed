"""Models in int8: the same integers in all three, what they compute, the files that they make, and what is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpt2_multi_conversion import convert

from gpt2_multi.errors import CheckpointError, ConfigError, InputError
from gpt2_multi.files.containers.safetensors import read_safetensors, write_safetensors
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.model import reference
from gpt2_multi.model.checkpoint import load, open
from gpt2_multi.model.checkpoint.quantized import dequantized, is_quantized, quantize, with_method
from gpt2_multi.model.config import INT8, GPT2Config
from gpt2_multi.model.weights import HEADS, table
from tests.support.fixtures import write_model

SMALL = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
IDS = np.random.default_rng(0).integers(64, size=(3, 9))
MASK = np.array([[1] * 9, [0, 0, 0] + [1] * 6, [1] * 5 + [0] * 4])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small language model in float32."""
    write_model(tmp_path / "model", SMALL, "lm", dtype=np.float32)
    return tmp_path / "model"


@pytest.fixture
def quantized(folder: Path, tmp_path: Path) -> Path:
    """The same in int8, as `convert` writes it."""
    convert(folder, tmp_path / "int8", quantize="int8")
    return tmp_path / "int8"


@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_in_float64_what_the_oracle_does(backend: Any, head: str, tmp_path: Path) -> None:
    config = SMALL.replace(tie_word_embeddings=head != "double_heads", pad_token_id=0)
    arrays = write_model(tmp_path, config, head, dtype=np.float32)
    rows = {row.name: row for row in table(config, head)}
    exact = {name: x.astype(np.float64) for name, x in arrays.items()}
    near = {
        name: dequantized(rows[name], quantize(rows[name], x), np.float64) if is_quantized(rows[name]) else exact[name]
        for name, x in arrays.items()
    }
    inputs = {"input_ids": IDS[None] if head == "double_heads" else IDS}
    expected = reference.outputs(with_method(config, "int8"), near, head, inputs)
    found = backend(head, tmp_path, "float64", inputs, quantization="int8")
    for name in (name for name in expected if "logits" in name or name == "last_hidden_state"):
        assert np.abs(found[name] - expected[name]).max() < 1e-9 * np.abs(expected[name]).max()
        assert np.abs(expected[name] - reference.outputs(config, exact, head, inputs)[name]).max() > 1e-4


def test_what_is_saved_is_what_convert_writes_and_each_row_is_as_alone(
    backend: Any, folder: Path, quantized: Path, tmp_path: Path
) -> None:
    prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[backend.__name__]
    cls = getattr(importlib.import_module(f"gpt2_multi.{backend.__name__}"), f"{prefix}GPT2LMHeadModel")
    model = cls.from_pretrained(folder, quantization="int8")
    model.save_pretrained(tmp_path / "saved")
    written, expected = (read_safetensors(path / "model.safetensors") for path in (tmp_path / "saved", quantized))
    assert written.keys() == expected.keys()
    assert all(x.dtype == expected[name].dtype and (x == expected[name]).all() for name, x in written.items())
    assert read_json(tmp_path / "saved" / "config.json")["quantization_config"] == INT8
    again = cls.from_pretrained(tmp_path / "saved")
    ids, mask = IDS, MASK
    if backend.__name__ == "pt":
        import torch

        ids, mask = torch.from_numpy(IDS), torch.from_numpy(MASK)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = np.asarray(again.generate(ids, attention_mask=mask, **options))
    assert (together == np.asarray(model.generate(ids, attention_mask=mask, **options))).all()
    for row in range(2):  # whose prompts end where they end
        alone = again.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert (np.asarray(alone)[0] == together[row]).all()
    with pytest.raises(CheckpointError, match="a quantized model cannot be resized"):
        again.resize_token_embeddings(70)
    with pytest.raises(InputError, match="safe_serialization: expected True for a quantized model"):
        again.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def test_who_trains_a_model_in_int8_is_told_where_nothing_trains(backend: Any, folder: Path) -> None:
    sentence = "quantization: expected a model of which something trains, found one in int8"
    if backend.__name__ == "pt":
        import torch

        from gpt2_multi.pt import GPT2LMHeadModel
        from gpt2_multi.pt.training import train_step

        model, ids = GPT2LMHeadModel.from_pretrained(folder, quantization="int8").train(), torch.from_numpy(IDS)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for update in (model(ids, labels=ids).loss.backward, lambda: train_step(model, optimizer, [])):
            with pytest.raises(InputError, match=sentence):
                update()
        model.transformer.ln_f.requires_grad_(True)
        train_step(model, optimizer, [{"input_ids": ids, "labels": ids}])
        assert model.transformer.ln_f.weight.grad.abs().sum() > 0
        model.transformer.ln_f.requires_grad_(False)
        assert not model.eval()(ids, labels=ids).loss.requires_grad  # as that of another model's reference
    elif backend.__name__ == "tf":
        from gpt2_multi.tf import TFGPT2LMHeadModel

        model, batch = TFGPT2LMHeadModel.from_pretrained(folder, quantization="int8"), {"input_ids": IDS, "labels": IDS}
        model.compile("sgd", run_eagerly=True)
        with pytest.raises(InputError, match=sentence):
            model.fit(batch, verbose=0)
        norm = model.transformer.ln_f
        norm.gamma.trainable = True
        model.compile("sgd", run_eagerly=True)
        before = norm.gamma.numpy()
        model.fit(batch, verbose=0)
        assert (norm.gamma.numpy() != before).any()
    else:
        import optax

        from gpt2_multi.flax import FlaxGPT2LMHeadModel
        from gpt2_multi.flax.training import create_train_state, eval_step, train_step

        model = FlaxGPT2LMHeadModel.from_pretrained(folder, quantization="int8")
        state, batch = create_train_state(model, optax.sgd(0.1)), {"input_ids": IDS, "labels": IDS}
        assert np.isfinite(eval_step(state, batch)[0])
        with pytest.raises(InputError, match=sentence):
            train_step(state, batch)


def test_int8_becomes_floats_where_a_format_has_no_room_for_it(folder: Path, quantized: Path, tmp_path: Path) -> None:
    for to, dtype in (("pytorch", None), ("safetensors", "float32")):
        report = convert(quantized, tmp_path / to, to, dtype=dtype)
        assert report.cast["wte.weight"] == "int8 to float32"
        found, stored = open(tmp_path / to), open(quantized)
        assert found.config.quantization is None
        assert all((found[name] == stored[name]).all() for name in found)
    convert(quantized, tmp_path / "same")
    assert open(tmp_path / "same").quantized("h.0.mlp.c_fc.weight") is not None
    with pytest.raises(InputError, match='quantize: expected to="safetensors"'):
        convert(folder, tmp_path / "no", "pytorch", quantize="int8")


def damaged(folder: Path, change: Any) -> None:
    """Write the tensors of a folder anew, after a change."""
    found = {name: np.array(x) for name, x in read_safetensors(folder / "model.safetensors").items()}
    change(found)
    made = {name: (x.dtype, x.shape, lambda x=x: x) for name, x in found.items()}
    write_safetensors(folder / "model.safetensors", made)


KERNEL = "transformer.h.1.mlp.c_fc.weight"
DAMAGE = {
    "lacks the scales": lambda found: found.pop(f"{KERNEL}_scale"),
    r"has shape \(32,\) in float32, expected \(128,\)": lambda found: found.update(
        {f"{KERNEL}_scale": np.ones(32, "f")}
    ),
    "in float64, expected": lambda found: found.update({f"{KERNEL}_scale": np.ones(128)}),
    "not finite or not above 0": lambda found: found[f"{KERNEL}_scale"].fill(0),
    "is stored as uint8, expected floating": lambda found: found.update({"transformer.ln_f.bias": np.ones(32, "u1")}),
    "has unexpected": lambda found: found.update({KERNEL: found[KERNEL].astype(np.float32)}),
    r"wpe.weight is stored as int8": lambda found: found.update({"transformer.wpe.weight": np.ones((16, 32), np.int8)}),
}


@pytest.mark.parametrize("sentence", DAMAGE)
def test_a_damaged_file_is_refused_in_a_sentence(quantized: Path, sentence: str) -> None:
    damaged(quantized, DAMAGE[sentence])
    with pytest.raises(CheckpointError, match=sentence):
        load(quantized, "lm", None, {})


def test_methods_of_others_are_refused_and_the_files_say_what_they_are(folder: Path, quantized: Path) -> None:
    keys = read_json(folder / "config.json")
    write_json(folder / "config.json", {**keys, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ConfigError, match=r"quantization_config: expected .* found the method 'gptq'"):
        load(folder, "lm", None, {})
    with pytest.raises(InputError, match="quantization: expected \"int8\" or None, found 'int4'"):
        load(quantized, "lm", None, {}, quantization="int4")
    write_json(quantized / "config.json", keys)  # which says nothing: the tensors do
    assert load(quantized, "lm", None, {}).config.quantization == "int8"
