"""Files of minGPT, build-nanogpt, llm.c and TransformerLens: read and written to the byte, or refused by name."""

import json
import re
import shutil
import struct
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import gpt2_multi_conversion as conversion
import ml_dtypes
import numpy as np
import pytest
from gpt2_multi_conversion import convert

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.containers.safetensors import read_safetensors, write_safetensors
from gpt2_multi.files.containers.torch_save import read_outline, read_torch, write_torch
from gpt2_multi.model import reference
from gpt2_multi.model.checkpoint import find, read_config
from tests.support.fixtures import DATA, write_model

PEERS = DATA / "peers"  # which make.py there has made
EXPECTED = read_safetensors(PEERS / "logits.safetensors")
PLAIN = conversion.open(PEERS / "transformers")
FILES = {  # file -> its format, and whose logits it has
    "llmc/gpt2_tiny.bin": ("llmc", "transformers"),
    "build_nanogpt/model_05000.pt": ("build-nanogpt", "transformers"),
    "lens/model.pt": ("transformer-lens", "lens"),
    "lens/bridge.pt": ("transformer-bridge", "lens"),
    "mingpt/model.pt": ("mingpt", "mingpt"),
    "mingpt_2020/model.pt": ("mingpt-2020", "mingpt_2020"),
}
NO_HEADS = ("mingpt", "mingpt-2020", "transformer-bridge")  # whose files do not say how many they have
WRITTEN = {"build-nanogpt": "model_00000.pt", "llmc": "model.bin"}


def alone(tmp_path, file):
    """A folder with this file and nothing else."""
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(PEERS / file, folder)
    return folder


@pytest.mark.parametrize("file", FILES)
def test_what_their_programs_write_is_read_and_computed(tmp_path, file):
    """By the file, and in a folder without settings, where the number of heads is an option."""
    format, logits = FILES[file]
    own = conversion.open(PEERS / file, PLAIN.config.replace(tie_word_embeddings="mingpt" not in format))
    assert (own.format, own.head) == (format, "lm")
    assert all(own[name].tobytes() == PLAIN[name].tobytes() for name in PLAIN) and own.keys() >= PLAIN.keys()
    folder = alone(tmp_path, file)
    inspected = conversion.inspect(folder, n_head=3)
    assert not inspected.missing and {entry.remark for entry in inspected.tensors} <= {"", "dropped when loaded"}
    config = read_config(folder, n_head=3)
    with pytest.raises(CheckpointError, match="say how many heads") if format in NO_HEADS else nullcontext():
        assert read_config(folder).n_head == 3
    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_inner", "layer_norm_epsilon")
    assert all(getattr(config, size) == getattr(PLAIN.config, size) for size in sizes)
    found = conversion.open(folder, config)
    weights = {name: np.asarray(found[name], np.float64) for name in found}
    computed = reference.outputs(config, weights, "lm", {"input_ids": EXPECTED["ids"]})["logits"]
    np.testing.assert_allclose(computed, EXPECTED[logits], atol=1e-5 if logits == "lens" else 1e-9)


def test_the_settings_of_mingpts_trainer_are_read(tmp_path):
    """Which has the heads, or the type of a model alone, that of the sizes."""
    config = read_config(PEERS / "mingpt")
    assert (config.n_head, config.activation_function, config.tie_word_embeddings) == (3, "gelu_new", False)
    folder = alone(tmp_path, "mingpt/model.pt")
    for n_embd, n_layer, kind, heads in ((48, 3, "gpt-nano", 3), (128, 4, None, 4), (128, 2, "gpt-nano", 2)):
        sized = PLAIN.config.replace(n_embd=n_embd, n_layer=n_layer, n_head=1)
        write_model(tmp_path / "model", sized, "lm", dtype=np.float32)
        convert(tmp_path / "model", folder, to="mingpt", force=True)
        (folder / "config.json").write_text(
            json.dumps({"model": {"model_type": kind, "n_head": None, "attn_pdrop": 0}})
        )
        config = read_config(folder)
        assert (config.n_head, config.attn_pdrop, config.resid_pdrop) == (heads, 0, 0.1)


def test_bfloat16_of_llmc():
    found = conversion.open(PEERS / "llmc/gpt2_tiny_bf16.bin")
    assert (found.keys() == PLAIN.keys() and found.config.dtype == "float32") or found.config.dtype is None
    assert all(found[name].tobytes() == PLAIN[name].astype(ml_dtypes.bfloat16).tobytes() for name in PLAIN)


@pytest.mark.parametrize(("dtype", "file"), [("float32", "gpt2_tiny.bin"), ("bfloat16", "gpt2_tiny_bf16.bin")])
def test_llmc_is_written_to_the_byte(tmp_path, dtype, file):
    convert(PEERS / "transformers", tmp_path / "new", to="llmc", dtype=dtype)
    assert (tmp_path / "new/model.bin").read_bytes() == (PEERS / "llmc" / file).read_bytes()


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".pt")])
def test_files_of_torch_have_what_their_programs_ask_for(tmp_path, file):
    """The same names, types and shapes, masks and buffers too: their load_state_dict is strict."""
    format, _ = FILES[file]
    convert(PEERS / file, tmp_path / "new", to=format, n_head=3)
    ours, theirs = (read_outline(path) for path in (tmp_path / "new" / WRITTEN.get(format, "model.pt"), PEERS / file))
    if format == "build-nanogpt":
        assert ours.keys() == theirs.keys() and repr(ours["config"]) == repr(theirs["config"]) == "__main__ GPTConfig"
        assert ours["config"].attributes == theirs["config"].attributes
        ours, theirs = ours["model"], theirs["model"]
    kinds = [{name: (stored.storage.dtype, stored.shape) for name, stored in found.items()} for found in (ours, theirs)]
    assert kinds[0] == kinds[1]
    again = conversion.open(tmp_path / "new")
    assert again.format == format and all(again[name].tobytes() == PLAIN[name].tobytes() for name in PLAIN)


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".pt") and "build" not in file])
def test_a_key_and_a_prefix_may_stand_before_their_names(tmp_path, file):
    """As a trainer saves them; nanoGPT, whose model may look the same, has its settings beside it."""
    torch = pytest.importorskip("torch")
    state = {f"module.{name}": tensor for name, tensor in torch.load(PEERS / file).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.pt")
    found = conversion.open(tmp_path / "last.pt", n_head=3)
    assert found.format == FILES[file][0] and found.names.prefix == "state_dict.module."
    assert all(found[name].tobytes() == PLAIN[name].tobytes() for name in PLAIN)
    args = {"vocab_size": 37, "block_size": 10, "n_layer": 2, "n_head": 3, "n_embd": 12, "bias": True}
    for name in ("last.pt", "last.ckpt", "pytorch_model.bin"):
        torch.save({"model": torch.load(PEERS / "mingpt/model.pt"), "model_args": args}, tmp_path / name)
        assert find(tmp_path / name).format == "nanogpt"


@pytest.mark.parametrize("file", ["lens/model.pt", "lens/bridge.pt", "mingpt_2020/model.pt"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.ckpt"])
def test_their_state_dicts_may_lie_in_files_of_any_name(tmp_path, file, name):
    found = {key: np.ascontiguousarray(array) for key, array in read_torch(PEERS / file).items()}
    made = {key: (array.dtype, array.shape, partial(np.asarray, array)) for key, array in found.items()}
    (write_safetensors if name.endswith("safetensors") else write_torch)(tmp_path / name, made)
    opened = conversion.open(tmp_path, n_head=3)
    assert opened.format == FILES[file][0] and all(opened[key].tobytes() == PLAIN[key].tobytes() for key in PLAIN)


@dataclass
class GPTConfig:
    """As build-nanogpt's train_gpt2.py has it."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


def test_torch_loads_what_build_nanogpt_would_and_its_kin_are_read(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    convert(PEERS / "transformers", tmp_path / "new", to="build-nanogpt")
    found = torch.load(tmp_path / "new/model_00000.pt", weights_only=False)
    assert found["config"] == GPTConfig(10, 37, 2, 3, 12) and found["step"] == 0
    assert found["model"]["lm_head.weight"].data_ptr() == found["model"]["transformer.wte.weight"].data_ptr()
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in found["model"].items()}
    torch.save({**found, "model": compiled, "config": vars(found["config"])}, tmp_path / "step_5.pt")  # as some do
    again = conversion.open(tmp_path / "step_5.pt")
    assert again.format == "build-nanogpt" and again.config.n_head == 3 and again["wpe.weight"].shape == (10, 12)


WHOLE = (PEERS / "llmc/gpt2_tiny.bin").read_bytes()


def headed(place, number):
    """llm.c's file with another number in its header."""
    return WHOLE[: 4 * place] + struct.pack("<i", number) + WHOLE[4 * place + 4 :]


LLMC = {
    "another's magic": (headed(0, 20240327), "llm.c's, but a state to debug with"),
    "an old version": (headed(1, 1), "is of version 1; expected 3 .float32. or 5"),
    "another type's version": (headed(1, 5), "has 22816 bytes; by its header it has 11920"),
    "a negative length": (headed(2, -10), "sizes that no GPT-2 has: n_positions -10"),
    "no tokens": (headed(3, 0), "sizes that no GPT-2 has: .*vocab_size 0"),
    "very many layers": (headed(4, 2**31 - 1), "sizes that no GPT-2 has: .*n_layer 2147483647"),
    "heads that do not fit": (headed(5, 5), "n_embd"),
    "very wide": (headed(6, 3 * 2**29), "by its header it has"),
    "less than the vocabulary": (headed(7, 36), "vocabulary of 37 is padded to 36, which is less"),
    "more than there is": (headed(7, 256), "by its header it has 28960"),
    "cut off": (WHOLE[:-1], "has 22815 bytes; by its header it has 22816"),
    "a header cut off": (WHOLE[:1000], "its header would lie at bytes 0 to 1024 of 1000"),
    "hardly anything": (WHOLE[:30], "its header would lie at bytes 0 to 1024 of 30"),
    "something behind": (WHOLE + b"\0", "has 22817 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", LLMC)
def test_files_of_llmc_that_are_none(outcome, name):
    data, sentence = LLMC[name]
    assert re.match(f"(CheckpointError|ConfigError): .*{sentence}", found := outcome({"model.bin": data})), found


def test_a_config_of_another_model_beside_llmc(outcome):
    """The number of heads is in no shape."""
    settings = json.loads((PEERS / "transformers/config.json").read_text())
    assert outcome({"model.bin": WHOLE, "config.json": json.dumps(settings).encode()}) == "opened"
    found = outcome({"model.bin": WHOLE, "config.json": json.dumps({**settings, "n_head": 2}).encode()})
    assert "has n_head 3, the config.json beside it 2; they belong to different models" in found


def test_folded_layer_norms_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"folded the layer norms .*no ln_final.w.*no_processing"):
        conversion.open(PEERS / "lens/folded.pt")
    with pytest.raises(CheckpointError, match=r"folded the layer norms .*unembed.bias is not zero.*compatibility_mode"):
        conversion.inspect(PEERS / "lens/bridge_folded.pt")
    torch = pytest.importorskip("torch")
    state = torch.load(PEERS / "lens/model.pt")
    state["unembed.b_U"][3] = 1.0
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"unembed.b_U is not zero.*fold_ln=False"):
        conversion.open(tmp_path)


SEVERAL = {  # which programs write as they train; the first is what is written here
    "build-nanogpt": ("model_00000.pt", "model_05000.pt"),
    "openai": ("model.ckpt", "model.ckpt-500"),
    "keras-weights": ("model.weights.h5", "model-02.weights.h5"),
}


def test_several_checkpoints_in_a_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gpt2_tiny.bin, gpt2_tiny_bf16.bin; give the one"):
        conversion.open(PEERS / "llmc")
    for format, names in SEVERAL.items():
        found = ".*".join(names)
        folder = tmp_path / format
        convert(PEERS / "transformers", folder, to=format)
        for file in list(folder.glob(f"{names[0]}*")):
            shutil.copy(file, folder / file.name.replace(*names))
        with pytest.raises(CheckpointError, match=rf"one file of weights, found {found}.*; give the one"):
            conversion.open(folder)
        file = folder / f"{names[1]}{'.index' if format == 'openai' else ''}"
        assert conversion.open(file)["wte.weight"].tobytes() == PLAIN["wte.weight"].tobytes()
