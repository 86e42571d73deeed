"""What hostile or merely odd use found once, so that it stays mended."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_multi.errors import ConfigError, InputError
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.generation.rules import choose, process
from gpt2_multi.flax.parameters.sharding import FSDP, make_mesh, shard_batch, shard_params
from gpt2_multi.flax.training import create_train_state, lm_loss
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.model.config import GPT2Config

SMALL = GPT2Config(
    vocab_size=40, n_positions=24, n_embd=12, n_layer=1, n_head=3, eos_token_id=None, initializer_range=0.4,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def make(**options):
    return FlaxGPT2LMHeadModel(SMALL.replace(), **options)


@pytest.fixture(scope="module")
def model():
    return make()


def sentence(error):
    assert "\n" not in str(error.value)


def give_away(tree):
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(tree)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": [[2**40]]}, "input_ids: (found an integer that no id can be|the id 1099511627776 is outside)"),
        ({"input_ids": [[2**70]]}, "input_ids: (found an integer that no id can be|the id 1099511627776 is outside)"),
        ({"position_ids": 1}, r"position_ids: expected shape \(2, 7\), found \(\)"),
        ({"past_key_values": {}}, "past_key_values: expected a cache of 1 layers from init_cache.*, found dict"),
        ({"past_key_values": ()}, "past_key_values: expected a cache of 1 layers from init_cache.*, found tuple"),
        ({"train": True, "dropout_rng": 0}, r"dropout_rng: expected one key, such as jax\.random\.key\(0\), found int"),
        (
            {"train": True, "dropout_rng": jnp.ones(2, "float32")},
            r"dropout_rng: expected one key, .*, found float32\[2\]",
        ),
        ({"dropout_rng": {"dropout": 1}}, "dropout_rng: expected one key, .*, found dict"),
        ({"output_attentions": np.array([1, 2])}, "output_attentions: expected True or False, found ndarray"),
        ({"params": 5}, "params: expected a nested dict, found int"),
        ({"params": {"transformer": {0: 1}}}, "params: transformer/.* has shape none, it is missing, expected"),
        ({"params": {"params": {}}}, "params: transformer/h/0/attn/c_attn/bias has shape none, it is missing"),
    ],
)
def test_odd_inputs_are_one_sentence(model, inputs, words):
    with pytest.raises(InputError, match=words) as error:
        model(**{"input_ids": IDS, **inputs})
    sentence(error)


def test_several_keys_and_traced_flags_are_one_sentence(model):
    with pytest.raises(InputError, match=r"dropout_rng: expected one key, .*, found key<fry>\[3\]"):
        model(IDS, train=True, dropout_rng=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(InputError, match=r"train: expected True or False, found .*Tracer; it cannot be traced"):
        jax.jit(lambda train: model(IDS, train=train).logits)(True)
    with pytest.raises(InputError, match=r"params: .* has shape none, it is a str, expected"):
        model(IDS, params=jax.tree.map(lambda _: "x", model.params))
    assert model(IDS, train=jnp.array(False)).logits.shape == (2, 7, 40)


@pytest.mark.parametrize(("batch", "length"), [(-1, 5), (2, -1), ("a", 5), (2, 5.5), (2.0, 5), (2, None), (True, 5)])
def test_the_sizes_of_a_cache_are_whole_numbers(model, batch, length):
    with pytest.raises(InputError, match=r"(batch_size|max_length): expected a whole number from 0, found") as error:
        model.init_cache(batch, length)
    sentence(error)


def test_caches_can_be_compared(model):
    cache = model.init_cache(2, 5)
    assert (
        cache == cache and cache != model.init_cache(2, 5) and model.init_cache(np.int64(2), np.int64(5)).capacity == 5
    )


def test_what_was_given_away_is_named():
    model = make()
    cache = model.init_cache(2, 9)
    give_away(cache)
    with pytest.raises(InputError, match="past_key_values: the memory was given away"):
        model(IDS, past_key_values=cache)
    create_train_state(model, optax.sgd(0.1), model.params)
    for use in (
        lambda: model(IDS),
        lambda: model.generate(IDS, max_new_tokens=2),
        model.to_bf16,
        lambda: model.save_pretrained("x"),
    ):
        with pytest.raises(InputError, match=r"params: the memory was given away, .*; go on with what that returned"):
            use()
    assert not Path("x").exists()


def test_copies_are_their_own_models(model):
    expected, text = model(IDS).logits, model.generate(IDS, max_new_tokens=2)
    other, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert np.array_equal(again(IDS).logits, expected) and np.array_equal(again.generate(IDS, max_new_tokens=2), text)
    other.config.layer_norm_epsilon = 1.0
    assert np.abs(other(IDS).logits - expected).max() > 1e-3 and np.array_equal(model(IDS).logits, expected)


def test_a_changed_configuration_acts_on_the_next_generation():
    model = make()
    before = model.generate(IDS, max_new_tokens=5)
    model.config.layer_norm_epsilon = 10.0
    fresh = FlaxGPT2LMHeadModel(model.config)
    fresh.params = model.params
    after = model.generate(IDS, max_new_tokens=5)
    assert np.array_equal(after, fresh.generate(IDS, max_new_tokens=5)) and not np.array_equal(after, before)
    assert model.decoders is model.decoders


def test_generation_checks_parameters_and_says_what_cannot_be_traced(model):
    with pytest.raises(InputError, match=r"params: .* take model.params"):
        model.generate(IDS, params={"params": model.params}, max_new_tokens=2)
    with pytest.raises(InputError, match="stream_tokens: cannot give one token after the other while it is traced"):
        jax.jit(lambda ids: list(model.stream_tokens(ids, max_new_tokens=2)))(IDS)


def test_huge_options_mean_what_they_say(model):
    huge = {name: 2**40 for name in ("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens", "eos_token_id")}
    options = Options.of(GenerationConfig(**huge), np.zeros((1, 40), np.int32), [0])
    assert options.top_k == options.min_length == options.ends[0] == options.fill == 2**31 - 1
    same = model.generate(IDS, max_new_tokens=2, do_sample=True, top_k=0)
    assert np.array_equal(model.generate(IDS, max_new_tokens=2, do_sample=True, **huge), same)


def test_rules_work_without_jit():
    logits, keep = jax.random.normal(jax.random.key(0), (2, 40)), jnp.ones((2, 7), bool)
    config = GenerationConfig(do_sample=True, top_k=3, top_p=0.9, no_repeat_ngram_size=2)
    options = Options.of(config, np.zeros((1, 40), np.int32), [0, 1])

    def chosen(logits, ids, keep, options):
        return choose(process(logits, ids, keep, 7, 0, options), 0, options)

    expected = jax.jit(chosen)(logits, jnp.asarray(IDS), keep, options)
    with jax.disable_jit():
        assert np.array_equal(chosen(logits, jnp.asarray(IDS), keep, options), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
def test_labels_without_a_sign_are_all_counted(dtype):
    logits, labels = jax.random.normal(jax.random.key(0), (1, 4, 200)), np.array([[0, 156, 3, 156]])
    assert float(lm_loss(logits, jnp.asarray(labels.astype(dtype)))) == float(lm_loss(logits, jnp.asarray(labels)))


def test_casting_takes_frozen_trees_and_refuses_others(model):
    mask = unflatten_dict({path: path[-1] == "kernel" for path in flatten_dict(model.params)})
    for params, chosen in ((model.params, freeze(mask)), (freeze(model.params), mask)):
        for path, leaf in flatten_dict(model.to_bf16(params, chosen)).items():
            assert leaf.dtype == (jnp.bfloat16 if path[-1] == "kernel" else jnp.float32)
    for bad, words in (
        ({"transformer": True}, "a tree of booleans like the param"),
        (True, "a nested dict of booleans"),
    ):
        with pytest.raises(InputError, match=f"mask: expected {words}") as error:
            model.to_bf16(mask=bad)
        sentence(error)


def test_a_size_that_cannot_be_leaves_the_model_as_it_was(monkeypatch):
    model = make()
    with pytest.raises(ConfigError, match="vocab_size must be at least 1"):
        model.resize_token_embeddings(0)
    monkeypatch.setattr(jnp, "concatenate", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        model.resize_token_embeddings(60)
    monkeypatch.undo()
    assert model.config.vocab_size == 40 and model(IDS).logits.shape == (2, 7, 40)


@pytest.mark.parametrize(
    ("mesh", "rules", "words"),
    [
        ("data=1", FSDP, r"mesh: expected a jax\.sharding\.Mesh, found str; sharding\.make_mesh makes one"),
        (None, [("embed", "fsdp")], "rules: expected a dict such as sharding.FSDP, found list"),
        (None, "fsdp", "rules: expected a dict such as sharding.FSDP, found str"),
        (
            None,
            {"embed": ("data", "fsdp")},
            "rules: 'embed' is to be cut over the mesh axis '.*', expected one of data",
        ),
    ],
)
def test_wrong_meshes_and_rules_are_one_sentence(model, mesh, rules, words):
    with pytest.raises(InputError, match=words) as error:
        shard_params(model.params, SMALL, mesh or make_mesh("data=1", jax.devices()[:1]), rules)
    sentence(error)


def test_a_rule_may_say_that_an_axis_is_whole(model):
    placed = shard_params(model.params, SMALL, make_mesh("", jax.devices()[:1]), {"embed": None, "mlp": "tensor"})
    assert placed["transformer"]["wte"]["embedding"].sharding.spec == jax.P(None, None)
    with pytest.raises(InputError, match=r"labels: expected shape \(any,\), found \(\)"):
        shard_batch({"input_ids": IDS, "attention_mask": None, "labels": 3}, make_mesh("", jax.devices()[:1]))
