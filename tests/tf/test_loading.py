"""TensorFlow models to and from files: PyTorch, transformers, Keras' own; resizing, pruning, fresh heads, damage."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import tf as tfm
from gpt2_multi.errors import CheckpointError, ConfigError, InputError
from gpt2_multi.model import reference
from gpt2_multi.model.checkpoint import read_weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table
from tests.support import adapters, fixtures
from tests.support.cases import BROKEN
from tests.support.effort import pairs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=3, n_head=3, num_labels=3, pad_token_id=0)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
CLASSES = [*adapters.classes(tfm).values()]
DTYPES = ("float32", "float16", "bfloat16", "float64")


def name_of(value):
    return "-".join(value.values()) or "float32" if isinstance(value, dict) else getattr(value, "__name__", value)


def outputs(model, ids=IDS):
    out = model(ids[None] if "DoubleHeads" in type(model).__name__ else ids)
    keys = ("last_hidden_state", "logits", "mc_logits", "start_logits", "end_logits")
    return [out[key].numpy() for key in keys if key in out]


def same(left, right, bound=0.0):
    pairs = list(zip(outputs(left), outputs(right), strict=True))
    return bool(pairs) and all(np.abs(a.astype(float) - b.astype(float)).max() <= bound for a, b in pairs)


def arrays_of(model):
    return {weight.name: model.parameter(weight).numpy() for weight in table(model.config, model.head)}


def random_model(cls, config=SMALL, **options):
    """A model of this class with every variable randomised."""
    model = cls(config.replace(), **options)  # a copy: some tests change it
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(tf.cast(rng.normal(0, 0.3, variable.shape), variable.dtype))
    return model


@pytest.mark.parametrize(("cls", "dtype"), pairs(CLASSES, DTYPES), ids=name_of)
def test_what_is_saved_is_loaded_bit_for_bit(cls, dtype, tmp_path):
    model = random_model(cls, param_dtype=dtype)
    model.save_pretrained(tmp_path / "m")
    again = cls.from_pretrained(tmp_path / "m", param_dtype="auto")
    assert same(model, again) and again.config.architectures == [cls.__name__[2:]] and again.config.dtype == dtype
    found, expected = arrays_of(again), arrays_of(model)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    again.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before and same(model, again)


CHANGES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "cross-attention": {"add_cross_attention": True},
    "inner": {"n_inner": 20, "activation_function": "relu"},
}


@pytest.mark.parametrize(("cls", "change"), pairs(CLASSES, [*CHANGES]), ids=name_of)
def test_pytorch_reads_what_tensorflow_writes_and_back(cls, change, tmp_path):
    pytest.importorskip("torch")
    from gpt2_multi import pt

    theirs = getattr(pt, cls.__name__[2:])
    model = random_model(cls, SMALL.replace(**CHANGES[change]), param_dtype="float64")
    model.save_pretrained(tmp_path / "tf", max_shard_size=5000 if change == "plain" else "5GB")
    assert (tmp_path / "tf" / "model.safetensors.index.json").exists() == (change == "plain")
    other = theirs.from_pretrained(tmp_path / "tf", param_dtype="auto")
    assert_as_pytorch(model, other)
    other.save_pretrained(tmp_path / "pt", max_shard_size=5000)
    again = cls.from_pretrained(tmp_path / "pt", param_dtype="auto")
    found, expected = arrays_of(again), arrays_of(model)
    assert all(np.array_equal(found[name], expected[name]) for name in expected) and same(model, again)
    other.save_pretrained(tmp_path / "pt whole")
    model.save_pretrained(tmp_path / "tf whole")
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("pt whole", "tf whole")]
    assert both[0] == both[1]


def assert_as_pytorch(model, other):
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(IDS)
        out = other(ids[None] if model.head == "double_heads" else ids)
    keys = [key for key in out.keys() if isinstance(out[key], torch.Tensor)]
    assert keys
    for found, key in zip(outputs(model), keys, strict=True):
        np.testing.assert_allclose(found, out[key].numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pytorch_reads_half_precision_and_back(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    from gpt2_multi import pt

    model = random_model(tfm.TFGPT2LMHeadModel, param_dtype=dtype)
    model.save_pretrained(tmp_path / "tf")
    other = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "tf", param_dtype="auto")
    assert other.dtype == getattr(torch, dtype)
    other.save_pretrained(tmp_path / "pt")
    assert (tmp_path / "pt" / "model.safetensors").read_bytes() == (tmp_path / "tf" / "model.safetensors").read_bytes()
    assert same(model, tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "pt", param_dtype="auto"))


@pytest.mark.parametrize(("cls", "change"), pairs(CLASSES, [*CHANGES]), ids=name_of)
def test_transformers_reads_what_we_write_and_back(cls, change, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = random_model(cls, SMALL.replace(**CHANGES[change]))
    model.save_pretrained(tmp_path / "ours", max_shard_size=5000 if change == "plain" else "5GB")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # theirs, about their own code
        theirs = getattr(transformers, cls.__name__[2:])
        other, report = theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        ids = torch.from_numpy(IDS)
        found = other.eval()(ids[None] if cls.head == "double_heads" else ids)
        found = found.last_hidden_state if cls.head == "base" else found[0]
        assert np.abs(found.numpy() - outputs(model)[0]).max() < 1e-4
        other.save_pretrained(tmp_path / "theirs")
    again, expected = arrays_of(cls.from_pretrained(tmp_path / "theirs")), arrays_of(model)
    assert all(np.array_equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["float16_safetensors", "bfloat16_safetensors", "sharded_safetensors"])
def test_half_precision_and_sharded_folders_load(name):
    folder = fixtures.shared("fixtures", "lm_formats", name)
    model = tfm.TFGPT2LMHeadModel.from_pretrained(folder, param_dtype="auto")
    kind = name.split("_")[0]
    assert model.compute_dtype == model.variable_dtype == (kind if kind in DTYPES else "float32")
    recorded = fixtures.reference("lm")
    found = model(recorded["in.input_ids"]).logits.numpy().astype(float)
    bound = {"float16": 1e-2, "bfloat16": 5e-2}.get(kind, 1e-5)
    assert np.abs(found - recorded["plain.logits"]).max() <= bound * np.abs(recorded["plain.logits"]).max()


def test_files_load_into_every_dtype_and_policy(tmp_path):
    random_model(tfm.TFGPT2LMHeadModel).save_pretrained(tmp_path / "m")
    for options, dtypes in {
        (("param_dtype", "bfloat16"),): ("bfloat16", "bfloat16"),
        (("dtype", "mixed_bfloat16"),): ("bfloat16", "float32"),
        (("dtype", "float16"), ("param_dtype", "float32")): ("float16", "float32"),
        (("dtype", "float32"), ("param_dtype", "float64")): ("float32", "float64"),
        (("dtype", tf.float32), ("param_dtype", np.float16)): ("float32", "float16"),
    }.items():
        model = tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m", **dict(options))
        assert (model.compute_dtype, model.variable_dtype) == dtypes and model(IDS).logits.dtype.name == dtypes[0]


def test_a_bare_checkpoint_loads_into_a_head_and_the_head_starts_anew(tmp_path):
    random_model(tfm.TFGPT2Model).save_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"has no score\.weight: initialised anew; train the model"):
        model = tfm.TFGPT2ForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=5)
    assert model.score.kernel.shape == (12, 5) and 0.005 < float(model.score.kernel.numpy().std()) < 0.05
    assert same(
        tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m").transformer,
        tfm.TFGPT2Model.from_pretrained(tmp_path / "m"),
    )


def test_a_language_model_loads_into_the_bare_model(tmp_path):
    model = random_model(tfm.TFGPT2LMHeadModel, SMALL.replace(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "m")
    assert same(tfm.TFGPT2Model.from_pretrained(tmp_path / "m"), model.transformer)


def test_generation_settings_and_the_tokenizer_stay_with_the_model(tmp_path):
    model = random_model(tfm.TFGPT2LMHeadModel)
    model.generation_config = model.generation_config.with_options({"top_k": 7, "do_sample": True})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "vocab.json").write_text("{}")
    model.save_pretrained(tmp_path / "m")
    again = tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m")
    assert again.generation_config == model.generation_config and (tmp_path / "m" / "vocab.json").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_new_embeddings_are_the_mean_of_the_old_ones(tied, tmp_path):
    model = random_model(tfm.TFGPT2LMHeadModel, SMALL.replace(tie_word_embeddings=tied))
    generation_config = model.generation_config
    before, mean, count = (
        model(IDS).logits.numpy(),
        model.transformer.wte.embeddings.numpy().mean(0),
        len(model.weights),
    )
    old = model.transformer.wte.embeddings
    embedding = model.resize_token_embeddings(34)
    assert embedding is model.get_input_embeddings() and embedding.input_dim == model.config.vocab_size == 34
    np.testing.assert_allclose(embedding.embeddings[31:], np.tile(mean, (3, 1)), atol=1e-6)
    assert (model.get_output_embeddings() is embedding) == tied and model.generation_config is generation_config
    assert len(model.weights) == count and not any(weight is old for weight in model.weights)
    assert {weight.shape[0] for weight in model.trainable_variables if "embeddings" in weight.path} == {34, 24}
    after = model(np.full_like(IDS, 33)).logits
    assert after.shape[-1] == 34
    np.testing.assert_allclose(model(IDS).logits[..., :31], before, atol=1e-5)
    np.testing.assert_allclose(model(IDS).logits[..., 33], before.mean(-1), atol=1e-5)
    model.save_pretrained(tmp_path / "m")
    assert same(model, tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m"))
    model.save(tmp_path / "m.keras")
    assert same(model, keras.saving.load_model(tmp_path / "m.keras"))
    assert model.resize_token_embeddings() is embedding and model.config.vocab_size == 34
    model.resize_token_embeddings(31)
    np.testing.assert_allclose(model(IDS).logits, before, atol=1e-5)
    with tf.GradientTape() as tape:
        loss = model(IDS, labels=IDS).loss
    grads = tape.gradient(loss, [weight.value for weight in model.trainable_variables])
    assert all(grad is not None for grad in grads)


def test_functions_work_after_resizing():
    model = random_model(tfm.TFGPT2LMHeadModel)
    ids = IDS[:, :-1]
    assert model.predict(IDS, verbose=0).logits.shape == tf.function(model, jit_compile=True)(IDS).logits.shape
    model.resize_token_embeddings(40)
    expected = model(ids + 30).logits
    np.testing.assert_allclose(tf.function(model, jit_compile=True)(ids + 30).logits, expected, atol=1e-5)
    np.testing.assert_allclose(model.predict(ids + 30, verbose=0).logits, expected, atol=1e-5)


def test_frozen_and_half_precision_embeddings_stay_so_when_resized():
    model = random_model(tfm.TFGPT2LMHeadModel, param_dtype="bfloat16")
    model.transformer.wte.trainable = False
    model.resize_token_embeddings(34)
    assert model.transformer.wte.embeddings.dtype == "bfloat16" and not model.transformer.wte.embeddings.trainable
    assert not any("wte" in weight.path for weight in model.trainable_variables)
    model.transformer.wte.trainable = True
    assert any("wte" in weight.path for weight in model.trainable_variables)


def test_pruned_heads_are_as_if_masked_and_survive_a_file(tmp_path):
    model = random_model(tfm.TFGPT2LMHeadModel, param_dtype="float64")
    mask = np.ones((3, 3))
    mask[0, 1] = mask[2, 0] = mask[2, 2] = 0
    masked, count = model(IDS, head_mask=mask).logits.numpy(), len(model.weights)
    model.prune_heads({0: [1], 2: [0]})
    model.prune_heads({2: [2, 0]})
    assert model.config.pruned_heads == {0: [1], 2: [0, 2]} and len(model.weights) == count
    np.testing.assert_allclose(model(IDS).logits, masked, rtol=0, atol=1e-9)
    np.testing.assert_allclose(tf.function(model, jit_compile=True)(IDS).logits, masked, rtol=0, atol=1e-9)
    np.testing.assert_allclose(model(IDS, model.init_cache(2, 9)).logits, masked, rtol=0, atol=1e-9)
    model.save_pretrained(tmp_path / "m")
    again = tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m", param_dtype="float64")
    assert same(model, again)
    arrays = read_weights(tmp_path / "m", again.config, "lm")
    expected = reference.outputs(again.config, arrays, "lm", {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(again(IDS).logits, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(again(IDS, head_mask=np.ones((3, 3))).logits, masked, rtol=0, atol=1e-9)
    again.set_weights(model.get_weights())
    assert same(model, again)
    model.save(tmp_path / "m.keras")
    assert same(model, keras.saving.load_model(tmp_path / "m.keras"))
    with pytest.raises(ConfigError, match="must leave each layer a head"):
        model.prune_heads({0: [0, 2]})
    assert model.config.pruned_heads == {0: [1], 2: [0, 2]}


OPTIONS = [
    {}, {"dtype": "mixed_bfloat16"}, {"dtype": "mixed_float16"}, {"param_dtype": "float64"},
    {"dtype": "float16", "param_dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options"), pairs(CLASSES, OPTIONS), ids=name_of)
def test_keras_own_file_keeps_every_bit(cls, options, tmp_path):
    model = random_model(cls, SMALL.replace(extra={"mine": 1}), **options)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert type(again) is cls and again.config == model.config and again.name == model.name
    assert (again.compute_dtype, again.variable_dtype) == (model.compute_dtype, model.variable_dtype)
    assert same(model, again)


@pytest.mark.parametrize("change", CHANGES)
def test_keras_own_file_keeps_every_setting(change, tmp_path):
    model = random_model(tfm.TFGPT2LMHeadModel, SMALL.replace(**CHANGES[change]))
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.config == model.config and same(model, again)


def test_keras_own_file_keeps_generation_settings(tmp_path):
    model = random_model(tfm.TFGPT2LMHeadModel)
    model.generation_config = model.generation_config.with_options({"num_beams": 3, "eos_token_id": [1, 2]})
    model.save(tmp_path / "m.keras")
    assert keras.saving.load_model(tmp_path / "m.keras").generation_config == model.generation_config


@pytest.mark.parametrize("cls", CLASSES, ids=name_of)
def test_weights_alone_are_saved_and_loaded(cls, tmp_path):
    model = random_model(cls)
    model.save_weights(tmp_path / "m.weights.h5")
    again = cls(SMALL)
    again.load_weights(tmp_path / "m.weights.h5")
    assert same(model, again)
    again.set_weights([weight * 0 for weight in model.get_weights()])
    assert not same(model, again)
    again.set_weights(model.get_weights())
    assert same(model, again)


def test_configurations_make_models_and_clones():
    model = random_model(tfm.TFGPT2LMHeadModel, dtype="mixed_bfloat16", name="mine")
    again = tfm.TFGPT2LMHeadModel.from_config(model.get_config())
    assert again.config == model.config and again.name == "mine" and again.dtype_policy.name == "mixed_bfloat16"
    assert json.dumps(model.get_config())
    for config in (SMALL, SMALL.to_dict()):
        assert tfm.TFGPT2LMHeadModel.from_config(config, dtype="float16").compute_dtype == "float16"
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model) and clone.config == model.config and clone.config is not model.config
    clone.set_weights(model.get_weights())
    assert same(model, clone)


def test_layers_are_the_stock_ones_that_lora_and_quantization_know():
    model = random_model(tfm.TFGPT2LMHeadModel)
    leaves = {type(layer) for layer in model._flatten_layers() if not list(layer._flatten_layers(include_self=False))}
    assert leaves == {
        keras.layers.Dense, keras.layers.Dropout, keras.layers.Embedding, keras.layers.LayerNormalization,
        keras.layers.ReversibleEmbedding,
    }  # fmt: skip


def test_every_variable_has_a_path_of_its_own():
    for cls in CLASSES:
        model = cls(SMALL.replace(add_cross_attention=True))
        paths = [variable.path for variable in model.variables if "seed" not in variable.path]
        assert len(set(paths)) == len(paths) == len(table(model.config, model.head))


def test_a_big_model_has_the_number_of_parameters_that_it_should():
    model = tfm.TFGPT2LMHeadModel(GPT2Config.from_archive("gpt2"))
    assert model.count_params() == 124_439_808


def test_a_summary_is_printed(capsys):
    random_model(tfm.TFGPT2LMHeadModel).summary()
    assert "transformer (TFGPT2Model)" in capsys.readouterr().out


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_sentence(name, tmp_path):
    folder = tmp_path / "m"
    random_model(tfm.TFGPT2LMHeadModel).save_pretrained(folder)
    damage, error, sentence = BROKEN[name]
    damage(folder)
    with pytest.raises(error, match=sentence) as found:
        tfm.TFGPT2LMHeadModel.from_pretrained(folder)
    assert "\n" not in str(found.value)


def test_wrong_arguments_are_one_sentence(tmp_path):
    random_model(tfm.TFGPT2LMHeadModel).save_pretrained(tmp_path / "m")
    with pytest.raises(TypeError, match="'n_layers'; did you mean 'n_layer'"):
        tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m", n_layers=2)
    with pytest.raises(InputError, match="param_dtype: expected float64, float32, float16 or bfloat16, found 'int4'"):
        tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m", param_dtype="int4")
    with pytest.raises(InputError, match="dtype: expected float64, float32, float16 or bfloat16, found 'mixed_int8'"):
        tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m", dtype="mixed_int8")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="max_shard_size"):
        random_model(tfm.TFGPT2LMHeadModel).save_pretrained(tmp_path / "m", max_shard_size="big")


def test_another_backend_of_keras_is_one_sentence():
    options = {**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = [sys.executable, "-c", "import gpt2_multi.tf"]
    done = subprocess.run(run, env=options, capture_output=True, text=True, check=False)
    if "No module named 'jax'" in done.stderr:
        pytest.skip("jax is not installed")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(
        "ImportError: gpt2_multi.tf needs Keras on TensorFlow, but Keras ru"
    )
