"""What the writers wrote is read by the programs that the formats belong to, and computes what it should there.

KerasHub, and the last transformers with TensorFlow, need environments of their own: their tests are there where
GPT2_MULTI_PEER_TF_KERASHUB and GPT2_MULTI_PEER_TF_TRANSFORMERS name the Pythons of them.
"""

import os
import subprocess
from types import SimpleNamespace

import gpt2_multi_conversion as conversion
import ml_dtypes
import numpy as np
import pytest

from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import ARCHITECTURES
from gpt2_multi.model.formats.table import FORMATS
from tests.support import adapters
from tests.support.fixtures import write_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2
SMALL = GPT2Config(
    vocab_size=31, n_positions=12, n_embd=12, n_layer=3, n_head=3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    num_labels=3, initializer_range=0.3,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 31, (2, 9))


def converted(tmp_path, format, head="lm", dtype=np.float32, **changes):
    """A random model in this format: its folder, configuration, and tensors."""
    config = SMALL.replace(architectures=[ARCHITECTURES[head]], **changes)
    arrays = write_model(tmp_path / "model", config, head, seed=7, dtype=dtype)
    size = changes.pop("max_shard_size", "5GB")
    conversion.convert(tmp_path / "model", tmp_path / format, to=format, max_shard_size=size)
    return tmp_path / format, config, arrays


def expected(config, arrays, head="lm"):
    """What the model gives for IDS by the oracle, in float64."""
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    return reference.outputs(config, wide, head, {"input_ids": IDS})


def close(found, wanted):
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("head", ARCHITECTURES)
@pytest.mark.parametrize("format", ["safetensors", "pytorch"])
def test_transformers_loads_every_head(tmp_path, format, head):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, config, arrays = converted(tmp_path, format, head, np.float64)
    if head == "base":
        conversion.convert(folder, folder.with_name("shards"), to=format, max_shard_size="10KB")
        folder = folder.with_name("shards")
    load = getattr(transformers, ARCHITECTURES[head]).from_pretrained
    model, report = load(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = model(torch.from_numpy(IDS))
    wanted = expected(config, arrays, head)
    for key in {"logits", "mc_logits", "start_logits", "end_logits", "last_hidden_state"} & wanted.keys():
        if not (head == "double_heads" and key == "mc_logits"):  # IDS are no choices
            close(found[key], wanted[key])


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_torch_loads_weights_only(tmp_path, dtype, mmap):
    torch = pytest.importorskip("torch")
    folder, _, arrays = converted(tmp_path, "pytorch", dtype=dtype)
    found = torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=mmap)
    assert {name.removeprefix("transformer.") for name in found} == arrays.keys()
    for name, array in arrays.items():
        tensor = found[f"transformer.{name}"]
        assert str(tensor.dtype) == f"torch.{np.dtype(dtype).name}" and tuple(tensor.shape) == array.shape
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes()


def nano_gpt(torch, args):
    """nanoGPT's model.GPT, with its names; biases where `bias` is true."""
    nn, functional = torch.nn, torch.nn.functional

    class LayerNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(args.n_embd))
            self.bias = nn.Parameter(torch.zeros(args.n_embd)) if args.bias else None

        def forward(self, x):
            return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

    def linear(inputs, outputs, bias=args.bias):
        return nn.Linear(inputs, outputs, bias=bias)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            n = args.n_embd
            self.ln_1, self.ln_2 = LayerNorm(), LayerNorm()
            self.attn = nn.ModuleDict({"c_attn": linear(n, 3 * n), "c_proj": linear(n, n)})
            self.mlp = nn.ModuleDict({"c_fc": linear(n, 4 * n), "c_proj": linear(4 * n, n)})

        def forward(self, x):
            parts = self.attn.c_attn(self.ln_1(x)).split(args.n_embd, 2)
            q, k, v = (t.view(*t.shape[:2], args.n_head, -1).transpose(1, 2) for t in parts)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn.c_proj(y.transpose(1, 2).reshape(x.shape))
            return x + self.mlp.c_proj(functional.gelu(self.mlp.c_fc(self.ln_2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            wte, wpe = nn.Embedding(args.vocab_size, args.n_embd), nn.Embedding(args.block_size, args.n_embd)
            blocks = nn.ModuleList(Block() for _ in range(args.n_layer))
            self.transformer = nn.ModuleDict({"wte": wte, "wpe": wpe, "h": blocks, "ln_f": LayerNorm()})
            self.lm_head = linear(args.n_embd, args.vocab_size, False)
            self.transformer.wte.weight = self.lm_head.weight

        def forward(self, ids):
            x = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.shape[1]]
            for block in self.transformer.h:
                x = block(x)
            return self.lm_head(self.transformer.ln_f(x))

    return GPT()


@pytest.mark.parametrize("bias", [True, False])
def test_nano_gpt_resumes(tmp_path, bias):
    """As its train.py and sample.py do, which may have compiled the model before they saved it."""
    torch = pytest.importorskip("torch")
    folder, config, arrays = converted(tmp_path, "nanogpt", activation_function="gelu")
    checkpoint = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)
    assert checkpoint["iter_num"] == 0 and checkpoint["best_val_loss"] == 1e9 and checkpoint["config"] == {}
    names = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout"}
    assert checkpoint["model_args"].keys() == names
    model = nano_gpt(torch, SimpleNamespace(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        close(model(torch.from_numpy(IDS)), expected(config, arrays)["logits"])
    checkpoint["model_args"]["bias"] = bias
    again = nano_gpt(torch, SimpleNamespace(**checkpoint["model_args"]))
    state = {f"_orig_mod.{name}": tensor for name, tensor in again.state_dict().items()}
    optimizer = torch.optim.AdamW(again.parameters())
    again(torch.from_numpy(IDS)).sum().backward()
    optimizer.step()
    torch.save({**checkpoint, "model": state, "optimizer": optimizer.state_dict()}, folder / "ckpt.pt")
    (folder / "config.json").unlink()
    with torch.no_grad():
        opened = conversion.open(folder)
        assert opened.config.n_positions == 12 and opened.config.activation_function == "gelu"
        close(again(torch.from_numpy(IDS)), expected(opened.config, dict(opened))["logits"])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_tensorflow_reads_the_bundle(tmp_path, dtype):
    tf = pytest.importorskip("tensorflow")
    folder, _, arrays = converted(tmp_path, "openai", dtype=dtype)
    reader = tf.train.load_checkpoint(str(folder))
    opened = conversion.open(folder)
    assert reader.get_variable_to_shape_map() == {name: list(array.shape) for name, array in opened.found.items()}
    for name, array in opened.found.items():
        found = reader.get_tensor(name)
        assert found.dtype == array.dtype == np.dtype(dtype) and found.tobytes() == array.tobytes()
    assert opened["h.2.mlp.c_fc.weight"].tobytes() == arrays["h.2.mlp.c_fc.weight"].tobytes()
    assert reader.get_tensor("model/h2/mlp/c_fc/w").shape == (1, 12, 48)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_flax_restores_the_tree(tmp_path, dtype):
    flax = pytest.importorskip("flax")
    folder, _, arrays = converted(tmp_path, "flax-msgpack", "token_classification", dtype)
    tree = flax.serialization.msgpack_restore((folder / "flax_model.msgpack").read_bytes())
    found = flax.traverse_util.flatten_dict(tree, sep="/")
    opened = conversion.open(folder)
    assert found.keys() == opened.found.keys() and len(found) == len(arrays)
    for name, array in opened.found.items():
        assert found[name].dtype == np.dtype(dtype) and found[name].tobytes() == array.tobytes()
    assert np.array_equal(found["transformer/h/1/attn/c_attn/kernel"], arrays["h.1.attn.c_attn.weight"].T)


@pytest.mark.parametrize(("compute", "stored"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16",) * 2])
@pytest.mark.parametrize("head", ARCHITECTURES)
def test_keras_loads_and_saves_weights(tmp_path, head, compute, stored):
    keras = pytest.importorskip("keras")
    tf = pytest.importorskip("gpt2_multi.tf")
    dtype = ml_dtypes.bfloat16 if stored == "bfloat16" else np.float32
    folder, config, arrays = converted(tmp_path, "keras-weights", head, dtype, add_cross_attention=head == "lm")
    with keras.name_scope("outer"), keras.name_scope("inner"):
        model = adapters.classes(tf)[head](config, dtype=compute, param_dtype=stored, name="mine")
    model.load_weights(folder / "model.weights.h5")
    for weight in conversion.open(folder).weights.values():
        assert (
            keras.ops.convert_to_numpy(model.parameter(weight)).tobytes()
            == tf_layout(weight, arrays[weight.name]).tobytes()
        )
    model.save_weights(folder / "again.weights.h5")
    (folder / "model.weights.h5").unlink()
    opened = conversion.open(folder)
    assert (opened.format, opened.head) == ("keras-weights", head) and opened.keys() == arrays.keys()
    for name, array in arrays.items():
        assert opened[name].dtype == array.dtype and opened[name].tobytes() == array.tobytes(), name


def tf_layout(weight, array):
    return np.ascontiguousarray(array.T if weight.kind == "linear" else array)


def test_h5py_finds_what_transformers_asks_for(tmp_path):
    import h5py

    folder, _, arrays = converted(tmp_path, "tf-h5", "double_heads")
    with h5py.File(folder / "tf_model.h5") as file:
        layers = list(file.attrs["layer_names"])
        assert layers == ["transformer", "multiple_choice_head"] and file.attrs["backend"] == "tensorflow"
        names = {layer: list(file[layer].attrs["weight_names"]) for layer in layers}
        assert sum(map(len, names.values())) == len(arrays)
        for layer, given in names.items():
            for name in given:
                assert name.startswith(f"tfgpt2_double_heads_model/{layer}/") and name.endswith(":0")
                assert file[layer][name].dtype == np.float32


def peer(variable, code, *arguments):
    """What a program prints that runs in the environment of a peer."""
    call = [os.environ[variable], "-c", code, *map(str, arguments)]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "TF_USE_LEGACY_KERAS": "1"}
    quiet = (
        quiet if "TRANSFORMERS" in variable else {**quiet, "TF_USE_LEGACY_KERAS": "0", "KERAS_BACKEND": "tensorflow"}
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(call, env=clean | quiet, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


TRANSFORMERS = """
import sys, numpy as np, transformers
folder, name, ids, out = sys.argv[1:]
model, report = getattr(transformers, "TF" + name).from_pretrained(folder, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
np.savez(out, **{key: value.numpy() for key, value in model(np.load(ids)).items() if hasattr(value, "numpy")})
"""
KERAS_HUB = """
import sys, numpy as np, keras_hub
folder, _, ids, out = sys.argv[1:]
backbone = keras_hub.models.GPT2Backbone.from_preset(folder)
ids = np.load(ids)
hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
logits = backbone.get_layer("token_embedding")(hidden, reverse=True)
np.savez(out, logits=logits.numpy(), last_hidden_state=hidden.numpy())
"""


def _computes(tmp_path, variable, code, format, head):
    folder, config, arrays = converted(tmp_path, format, head)
    np.save(tmp_path / "ids.npy", IDS.astype(np.int32))
    peer(variable, code, folder, ARCHITECTURES[head], tmp_path / "ids.npy", tmp_path / "out.npz")
    found, wanted = np.load(tmp_path / "out.npz"), expected(config, arrays, head)
    keys = {"logits", "start_logits", "end_logits", "last_hidden_state"} & set(found) & wanted.keys()
    assert keys
    for key in keys:
        close(found[key], wanted[key])


if "GPT2_MULTI_PEER_TF_TRANSFORMERS" in os.environ:
    WITH_TF = [head for head in ARCHITECTURES if head not in ("token_classification", "question_answering")]

    @pytest.mark.parametrize("head", WITH_TF)
    @pytest.mark.parametrize("format", ["tf-h5", "tf-safetensors"])
    def test_the_last_transformers_with_tensorflow(tmp_path, format, head):
        assert head in FORMATS[format].heads
        _computes(tmp_path, "GPT2_MULTI_PEER_TF_TRANSFORMERS", TRANSFORMERS, format, head)


if "GPT2_MULTI_PEER_TF_KERASHUB" in os.environ:

    def test_keras_hub(tmp_path):
        _computes(tmp_path, "GPT2_MULTI_PEER_TF_KERASHUB", KERAS_HUB, "keras-hub", "lm")
