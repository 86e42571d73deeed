"""Flax models to and from files: the other frameworks and back, resizing, pruning, fresh heads, damage."""

import importlib
import warnings

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from gpt2_multi import flax
from gpt2_multi.errors import CheckpointError, ConfigError, InputError
from gpt2_multi.files.containers.safetensors import read_safetensors
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from tests.support import adapters, fixtures
from tests.support.cases import BROKEN
from tests.support.effort import pairs

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, num_labels=3, pad_token_id=0)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
CLASSES = [*adapters.classes(flax).values()]
LM, BASE = flax.FlaxGPT2LMHeadModel, flax.FlaxGPT2Model


def crossed(name, others):
    """Each class beside the first of the others, and each of them beside a class."""
    return pytest.mark.parametrize(("cls", name), pairs(CLASSES, others), ids=lambda x: getattr(x, "__name__", x))


def outputs(model, ids=IDS):
    ids = ids[None] if "DoubleHeads" in type(model).__name__ else ids
    out = model(ids)
    keys = ("last_hidden_state", "logits", "mc_logits", "start_logits", "end_logits")
    return [np.asarray(out[key], np.float64) for key in keys if key in out]


def same(left, right, bound=0.0):
    pairs = list(zip(outputs(left), outputs(right), strict=True))
    return bool(pairs) and all(np.abs(a - b).max() <= bound for a, b in pairs)


def equal(left, right):
    """Whether two trees are the same, bit for bit."""
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right))


def random_model(cls, config=SMALL, seed=0, **options):
    """A model of this class with every parameter random; NumPy draws, which compiles nothing."""
    model = cls(config.replace(), _do_init=False, **options)  # a copy: some tests change it
    rng = np.random.default_rng(seed)
    model.params = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.normal(0, 0.3, x.shape), x.dtype), model.params_shape_tree
    )
    return model


def bytes_of(folder):
    return (folder / "model.safetensors").read_bytes()


@crossed("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_what_is_saved_is_loaded_bit_for_bit(cls, dtype, tmp_path):
    model = random_model(cls, param_dtype=dtype)
    model.save_pretrained(tmp_path / "m")
    again = cls.from_pretrained(tmp_path / "m", param_dtype="auto")
    assert equal(model.params, again.params) and again.config.dtype == dtype
    assert again.config.architectures == [cls.__name__.removeprefix("Flax")]
    before = bytes_of(tmp_path / "m")
    again.save_pretrained(tmp_path / "m")  # over the file that its parameters were read from
    assert bytes_of(tmp_path / "m") == before
    scanned = cls.from_pretrained(tmp_path / "m", param_dtype="auto", scan_layers=True)
    scanned.save_pretrained(tmp_path / "scanned")
    assert bytes_of(tmp_path / "scanned") == before


def test_trees_of_several_dtypes_are_saved_as_they_are(tmp_path):
    model = random_model(LM)
    mask = jax.tree.map(lambda x: x.ndim > 1, model.params)
    mixed = model.to_bf16(mask=mask)
    model.save_pretrained(tmp_path / "m", params=mixed)
    kinds = {str(array.dtype) for array in read_safetensors(tmp_path / "m" / "model.safetensors").values()}
    assert kinds == {"bfloat16", "float32"}
    again = LM.from_pretrained(tmp_path / "m", param_dtype="float32")
    assert equal(model.to_fp32(mixed), again.params)


CHANGES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "cross-attention": {"add_cross_attention": True},
    "inner": {"n_inner": 20, "activation_function": "relu"},
}


@crossed("change", [*CHANGES])
def test_transformers_reads_what_we_write_and_back(cls, change, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = getattr(transformers, cls.__name__.removeprefix("Flax"))
    model = random_model(cls, SMALL.replace(**CHANGES[change]))
    model.save_pretrained(tmp_path / "ours", max_shard_size=5000 if change == "plain" else "5GB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about their own code
        other, report = theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        ids = torch.tensor(IDS[None] if cls.head == "double_heads" else IDS)
        with torch.no_grad():
            found = other.eval()(ids)[0].numpy()
        assert np.abs(found - outputs(model)[0]).max() < 1e-4
        other.save_pretrained(tmp_path / "theirs")
    assert equal(cls.from_pretrained(tmp_path / "theirs").params, model.params)


@crossed("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("package", "prefix"), [("pt", ""), ("tf", "TF")])
def test_the_other_packages_read_what_we_write_and_back(cls, package, prefix, dtype, tmp_path):
    pytest.importorskip({"pt": "torch", "tf": "tensorflow"}[package])
    theirs = getattr(importlib.import_module(f"gpt2_multi.{package}"), cls.__name__.replace("Flax", prefix, 1))
    config = SMALL.replace(add_cross_attention=True, tie_word_embeddings=cls is LM)
    model = random_model(cls, config, param_dtype=dtype)
    model.save_pretrained(tmp_path / "ours")
    theirs.from_pretrained(tmp_path / "ours", param_dtype="auto").save_pretrained(tmp_path / "theirs")
    assert equal(cls.from_pretrained(tmp_path / "theirs", param_dtype="auto").params, model.params)
    scanned = cls.from_pretrained(tmp_path / "theirs", param_dtype="auto", scan_layers=True)
    scanned.save_pretrained(tmp_path / "scanned")
    assert bytes_of(tmp_path / "scanned") == bytes_of(tmp_path / "ours")


@pytest.mark.parametrize("name", ["float16_safetensors", "bfloat16_safetensors", "sharded_safetensors"])
def test_half_precision_and_sharded_folders_load(name):
    folder = fixtures.shared("fixtures", "lm_formats", name)
    kind = name.split("_")[0].replace("sharded", "float32")
    recorded = fixtures.reference("lm")
    for scanned in (False, True):
        model = LM.from_pretrained(folder, param_dtype="auto", scan_layers=scanned)
        assert model.dtype == kind
        found = np.asarray(model(recorded["in.input_ids"]).logits, np.float64)
        bound = {"float16": 1e-2, "bfloat16": 5e-2}.get(kind, 1e-5)
        assert np.abs(found - recorded["plain.logits"]).max() <= bound * np.abs(recorded["plain.logits"]).max()


@pytest.mark.parametrize("name", fixtures.MODELS)
def test_every_fixture_is_read_and_written_bit_for_bit(name, tmp_path):
    cls = adapters.classes(flax)[fixtures.head(name)]
    for scanned in (False, True):
        model, params = cls.from_pretrained(fixtures.folder(name), scan_layers=scanned, _do_init=False)
        model.save_pretrained(tmp_path / "m", params=params)
        found = fixtures.weights(name, np.float32)
        model.config.save_pretrained(tmp_path / "m")
        again = read_safetensors(tmp_path / "m" / "model.safetensors")
        again = {key.removeprefix("transformer."): value for key, value in again.items()}
        assert found.keys() == again.keys() and all(np.array_equal(found[key], again[key]) for key in found)


def test_a_bare_checkpoint_loads_into_a_head_and_the_head_starts_anew(tmp_path):
    random_model(BASE).save_pretrained(tmp_path / "m")
    load = flax.FlaxGPT2ForSequenceClassification.from_pretrained
    with pytest.warns(UserWarning, match=r"has no score\.weight: initialised anew; train the model"):
        model = load(tmp_path / "m", num_labels=50)
    kernel = model.params["score"]["kernel"]
    assert kernel.shape == (12, 50) and 0.01 < float(kernel.std()) < 0.03
    with pytest.warns(UserWarning):
        same_seed, other = (load(tmp_path / "m", num_labels=50, seed=seed).params["score"] for seed in (0, 1))
    assert np.array_equal(same_seed["kernel"], kernel) and not np.array_equal(other["kernel"], kernel)
    lm = LM.from_pretrained(tmp_path / "m")
    assert equal(lm.params["transformer"], BASE.from_pretrained(tmp_path / "m").params)


def test_a_language_model_loads_into_the_bare_model(tmp_path):
    model = random_model(LM, SMALL.replace(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "m")
    assert equal(BASE.from_pretrained(tmp_path / "m").params, model.params["transformer"])


def test_generation_settings_and_the_tokenizer_stay_with_the_model(tmp_path):
    model = random_model(LM)
    model.generation_config = model.generation_config.with_options({"top_k": 7, "do_sample": True})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "vocab.json").write_text("{}")
    model.save_pretrained(tmp_path / "m")
    again = LM.from_pretrained(tmp_path / "m")
    assert again.generation_config == model.generation_config and (tmp_path / "m" / "vocab.json").exists()


@pytest.mark.parametrize(("tied", "scanned"), pairs([True, False], [False, True]))
def test_new_embeddings_are_the_mean_of_the_old_ones(tied, scanned, tmp_path):
    model = random_model(LM, SMALL.replace(tie_word_embeddings=tied), scan_layers=scanned)
    old, before = model.params, np.asarray(model(IDS).logits)
    params = model.resize_token_embeddings(34)
    assert model.params is params and model.config.vocab_size == 34
    embedding = params["transformer"]["wte"]["embedding"]
    mean = np.asarray(old["transformer"]["wte"]["embedding"]).mean(0)
    np.testing.assert_allclose(embedding[31:], np.tile(mean, (3, 1)), rtol=0, atol=1e-6)
    after = np.asarray(model(IDS).logits)
    assert after.shape[-1] == 34 and ("lm_head" in params) != tied
    np.testing.assert_allclose(after[..., :31], before, rtol=0, atol=1e-5)
    np.testing.assert_allclose(after[..., 33], before.mean(-1), rtol=0, atol=1e-5)
    assert model(np.full((1, 3), 33)).logits.shape == (1, 3, 34)
    assert model.generate(np.full((1, 3), 33), max_new_tokens=2, eos_token_id=None).shape == (1, 5)
    model.save_pretrained(tmp_path / "m")
    assert equal(LM.from_pretrained(tmp_path / "m", scan_layers=scanned).params, params)
    assert equal(model.resize_token_embeddings(31), old) and model.resize_token_embeddings() is model.params
    with pytest.raises(ConfigError, match="vocab_size"):
        model.resize_token_embeddings(0)
    assert model.config.vocab_size == 31


def test_embeddings_of_given_parameters_are_resized():
    model, other = random_model(LM), LM(SMALL.replace(), _do_init=False, param_dtype="float32")
    params = other.resize_token_embeddings(40, model.params)
    assert params["transformer"]["wte"]["embedding"].shape == (40, 12) and other.config.vocab_size == 40
    assert other(IDS + 30, params=params).logits.shape == (2, 8, 40)
    with pytest.raises(InputError, match="params: this model was made with _do_init=False"):
        other.resize_token_embeddings(41)
    with pytest.raises(
        InputError, match=r"params: transformer/wte/embedding has shape \(31, 12\), expected \(40, 12\)"
    ):
        other.resize_token_embeddings(41, model.params)
    assert other.config.vocab_size == 40


def test_pruned_heads_are_as_if_masked_and_survive_a_file(tmp_path):
    config = SMALL.replace(pruned_heads={0: [1], 1: [0, 2]})
    arrays = fixtures.write_model(tmp_path / "m", config, "lm")
    model = LM.from_pretrained(tmp_path / "m", param_dtype="float64")
    expected = reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(model(IDS).logits, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(model(IDS, head_mask=np.ones((2, 3))).logits, expected, rtol=0, atol=1e-9)
    cache = model(IDS[:, :5], past_key_values=model.init_cache(2, 8)).past_key_values
    np.testing.assert_allclose(model(IDS[:, 5:], past_key_values=cache).logits, expected[:, 5:], rtol=0, atol=1e-9)
    assert model.generate(IDS, max_new_tokens=3, eos_token_id=None).shape == (2, 11)
    model.save_pretrained(tmp_path / "n")
    assert equal(LM.from_pretrained(tmp_path / "n", param_dtype="float64").params, model.params)
    with pytest.raises(ConfigError, match="scan_layers: layers with pruned heads differ in size"):
        LM.from_pretrained(tmp_path / "n", scan_layers=True)


def test_heads_are_pruned_as_in_the_other_frameworks(tmp_path):
    model = random_model(LM, param_dtype="float64")
    mask = np.ones((2, 3))
    mask[0, 1] = mask[1, [0, 2]] = 0
    whole, first = model(IDS, head_mask=mask).logits, model.params
    bare = LM(SMALL.replace(), param_dtype="float64", _do_init=False)
    model.prune_heads({0: [1], 1: [0]})
    model.prune_heads({1: [2, 0]})
    assert model.config.pruned_heads == {0: [1], 1: [0, 2]}
    np.testing.assert_allclose(model(IDS).logits, whole, rtol=0, atol=1e-9)
    model.save_pretrained(tmp_path / "m")
    assert equal(LM.from_pretrained(tmp_path / "m", param_dtype="float64").params, model.params)
    assert equal(bare.prune_heads({0: [1], 1: [0, 2]}, first), model.params) and bare.config.pruned_heads
    with pytest.raises(ConfigError, match="pruned_heads must leave each layer a head"):
        model.prune_heads({0: [0, 2]})
    with pytest.raises(ConfigError, match="scan_layers: layers with pruned heads differ in size"):
        random_model(LM, scan_layers=True).prune_heads({0: [1]})
    assert model.config.pruned_heads == {0: [1], 1: [0, 2]}


def test_models_that_share_a_configuration_change_alone(tmp_path):
    config = SMALL.replace()
    one, other = (LM(config, param_dtype="float64") for _ in range(2))
    expected = other(IDS).logits
    one.resize_token_embeddings(40)
    one.prune_heads({0: [1]})
    assert np.array_equal(other(IDS).logits, expected) and one(IDS).logits.shape[-1] == 40
    other.prune_heads({0: [2]})
    for model, vocab_size, heads in ((one, 40, {0: [1]}), (other, 31, {0: [2]})):
        assert model.module.config is model.config
        model.save_pretrained(tmp_path / "m")
        again = LM.from_pretrained(tmp_path / "m", param_dtype="float64")
        assert (again.config.vocab_size, again.config.pruned_heads) == (vocab_size, heads)
        assert equal(again.params, model.params)


def test_a_model_that_was_pruned_in_torch_loads(tmp_path):
    pytest.importorskip("torch")
    from gpt2_multi import pt

    random_model(LM, param_dtype="float64").save_pretrained(tmp_path / "whole")
    pruned = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "whole", param_dtype="float64")
    pruned.prune_heads({0: [1]})
    pruned.save_pretrained(tmp_path / "pruned")
    mask = np.ones((2, 3))
    mask[0, 1] = 0
    whole, again = (LM.from_pretrained(tmp_path / name, param_dtype="float64") for name in ("whole", "pruned"))
    np.testing.assert_allclose(again(IDS).logits, whole(IDS, head_mask=mask).logits, rtol=0, atol=1e-9)


def test_the_tree_of_shapes_costs_no_memory():
    model = LM(GPT2Config.from_archive("gpt2-xl"), _do_init=False, scan_layers=True)
    shapes = jax.tree.leaves(model.params_shape_tree)
    assert sum(shape.size for shape in shapes) == 1_557_611_200 and len(shapes) == 16


@pytest.mark.parametrize("change", ["vocab_size", "n_positions", "n_inner"])
def test_a_configuration_changed_alone_cannot_overwrite_a_model(change, tmp_path):
    model = random_model(LM)
    model.save_pretrained(tmp_path / "m")
    setattr(model.config, change, 60)
    with pytest.raises(InputError, match=r"params: transformer/.* has shape .*, expected"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"params: transformer/.* has shape .*, expected"):
        model(IDS)
    LM.from_pretrained(tmp_path / "m")


def test_frozen_trees_are_trees(tmp_path):
    from flax.core import freeze

    model = random_model(LM)
    before = outputs(model)
    model.params = freeze(model.params)
    assert np.array_equal(outputs(model), before)
    model.save_pretrained(tmp_path / "m")
    assert same(LM.from_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_sentence(name, tmp_path):
    folder = tmp_path / "m"
    random_model(LM).save_pretrained(folder)
    damage, error, sentence = BROKEN[name]
    damage(folder)
    with pytest.raises(error, match=sentence):
        LM.from_pretrained(folder)


def test_wrong_arguments_are_one_sentence(tmp_path):
    random_model(LM).save_pretrained(tmp_path / "m")
    with pytest.raises(TypeError, match="'n_layers'; did you mean 'n_layer'"):
        LM.from_pretrained(tmp_path / "m", n_layers=2)
    with pytest.raises(InputError, match="param_dtype: expected float64, float32, float16 or bfloat16, found 'int4'"):
        LM.from_pretrained(tmp_path / "m", param_dtype="int4")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        LM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="max_shard_size"):
        random_model(LM).save_pretrained(tmp_path / "m", max_shard_size="big")
    with pytest.raises(InputError, match="remat: expected None or one of"):
        LM.from_pretrained(tmp_path / "m", remat="dot")
