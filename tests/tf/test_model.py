"""GPT-2 in TensorFlow beyond parity: masks, caches, dtypes, switches of the configuration, gradients, bad input."""

import math

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi.errors import InputError
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import KERAS, TRANSFORMERS
from gpt2_multi.model.weights import table
from gpt2_multi.tf import KVCache, TFGPT2LMHeadModel, TFGPT2Model
from tests.support import fixtures
from tests.support.cases import CHANGES

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=3, n_head=3, eos_token_id=None, bos_token_id=None)
IDS = np.random.default_rng(5).integers(0, 31, (3, 9))
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
OFF = dict.fromkeys(DROPOUTS, 0.0)


@pytest.fixture
def make(tmp_path):
    """A function that writes a randomised model of a configuration and loads it in float64."""

    def load(config=SMALL, cls=TFGPT2LMHeadModel, **options):
        arrays = fixtures.write_model(tmp_path / "m", config, cls.head)
        return cls.from_pretrained(tmp_path / "m", **{"param_dtype": "float64", **options}), arrays

    return load


def logits(model, ids=IDS, **inputs):
    return model(tf.constant(ids), **{key: tf.constant(value) for key, value in inputs.items()}).logits.numpy()


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_is_honoured(change, make):
    config = SMALL.replace(**{change.split("=")[0]: CHANGES[change]})
    model, arrays = make(config)
    expected = reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_upcasting_works_in_float32_whatever_the_dtype(dtype, make, monkeypatch):
    config = SMALL.replace(reorder_and_upcast_attn=True)
    model, arrays = make(config, param_dtype=dtype)
    seen = []
    softmax = tf.nn.softmax
    monkeypatch.setattr(tf.nn, "softmax", lambda x: seen.append(x.dtype.name) or softmax(x))
    found = model(tf.constant(IDS)).logits
    assert set(seen) == {"float32"} and found.dtype.name == dtype
    expected = reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"]
    assert np.abs(found.numpy().astype(np.float64) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("field", DROPOUTS)
def test_each_dropout_acts_in_training_alone(field, make):
    model, _ = make(SMALL.replace(**OFF | {field: 0.5}))
    still = logits(model)
    assert np.array_equal(still, logits(model))
    first, second = (model(tf.constant(IDS), training=True).logits.numpy() for _ in range(2))
    assert np.abs(first - still).max() > 1e-3 and not np.array_equal(first, second)


def test_cross_attention_needs_its_setting_and_counts(make):
    config = SMALL.replace(add_cross_attention=True)
    model, arrays = make(config)
    inputs = {"input_ids": IDS, "encoder_hidden_states": np.random.default_rng(0).normal(size=(3, 5, 12))}
    expected = reference.outputs(config, arrays, "lm", inputs)["logits"]
    found = logits(model, encoder_hidden_states=inputs["encoder_hidden_states"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert np.abs(found - logits(model)).max() > 1e-3


def test_rank_4_masks_mean_what_rank_2_masks_mean(make):
    model, _ = make()
    for hidden in (slice(6, 9), slice(0, 3), slice(3, 6)):  # right, left, and in the middle
        mask = np.ones((3, 9), int)
        mask[1, hidden] = 0
        four = np.tile(mask[:, None, None], (1, 1, 9, 1))
        positions = np.maximum(np.cumsum(mask, -1) - 1, 0)  # a mask of rank 4 says nothing about them
        flat = logits(model, attention_mask=mask)
        for each in (four, four.astype(bool), four[:, :, :1], np.where(four, 0.0, -np.inf), np.where(four, 0.0, -1e9)):
            found = logits(model, attention_mask=each, position_ids=positions)
            np.testing.assert_allclose(found[mask != 0], flat[mask != 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.float32, np.float64, bool])
def test_every_kind_of_rank_2_mask_means_the_same(kind, make):
    model, arrays = make()
    mask = np.ones((3, 9), int)
    mask[1, :4], mask[2, 5:] = 0, 0
    expected = reference.outputs(SMALL, arrays, "lm", {"input_ids": IDS, "attention_mask": mask})["logits"]
    found = logits(model, attention_mask=mask.astype(kind))
    np.testing.assert_allclose(found[mask != 0], expected[mask != 0], rtol=0, atol=1e-9)


def test_square_masks_hide_keys_and_stay_causal(make):
    model, _ = make()
    square = (np.random.default_rng(1).random((3, 3, 9, 9)) > 0.3) | np.eye(9, dtype=bool)
    as_bias = np.where(square, 0.0, -1e4)
    np.testing.assert_allclose(
        logits(model, attention_mask=square), logits(model, attention_mask=as_bias), rtol=0, atol=1e-9
    )
    one, other = (logits(model, np.where(np.arange(9) < 8, IDS, last), attention_mask=square) for last in (0, 1))
    np.testing.assert_allclose(one[:, :8], other[:, :8], rtol=0, atol=1e-9)
    hidden = square.copy()
    hidden[..., 2:, 1] = False
    one, other = (logits(model, np.where(np.arange(9) != 1, IDS, i), attention_mask=hidden) for i in (0, 1))
    np.testing.assert_allclose(one[:, 2:], other[:, 2:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_what_it_gives_alone(side, make):
    model, _ = make()
    for length in range(1, 9):
        ids, mask = np.full((2, 9), 7), np.zeros((2, 9), int)
        where = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[0], mask[0] = IDS[0], 1
        ids[1, where], mask[1, where] = IDS[1, :length], 1
        alone = logits(model, IDS[1:2, :length])
        np.testing.assert_allclose(logits(model, ids, attention_mask=mask)[1, where], alone[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("rank", [2, 4])
def test_a_row_that_is_all_padding_is_finite(dtype, rank, make):
    model, _ = make(**{"dtype" if "mixed" in dtype else "param_dtype": dtype, "attn_pdrop": 0.0})
    mask = np.ones((3, 9), int)
    mask[0], mask[1, :8] = 0, 0
    mask = mask if rank == 2 else np.where(mask, 0.0, -np.inf)[:, None, None].astype(np.float32)
    out = model(tf.constant(IDS), attention_mask=tf.constant(mask)).logits
    assert np.isfinite(out.numpy().astype(np.float64)).all()


@pytest.mark.parametrize("kind", ["grown", "preallocated", "tuples", "lists", "stacked"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_passed_back_by_hand_gives_the_same_logits(kind, padded, make):
    model, _ = make()
    mask = np.ones((3, 9), int)
    mask[1, :2] = 0 if padded else 1
    whole = logits(model, attention_mask=mask)
    past = model.init_cache(3, 9) if kind == "preallocated" else None
    change = {"tuples": tuple, "lists": lambda past: [list(pair) for pair in past], "stacked": stacked}
    pieces = []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        out = model(IDS[:, start:end], past_key_values=past, attention_mask=mask[:, :end], use_cache=True)
        past = change.get(kind, lambda past: past)(out.past_key_values)
        pieces.append(out.logits.numpy())
    np.testing.assert_allclose(np.concatenate(pieces, 1)[mask != 0], whole[mask != 0], rtol=0, atol=1e-9)


def stacked(past):
    """A cache as the TensorFlow models of transformers returned it: (2, B, H, S, D) per layer."""
    return tuple(tf.stack(pair) for pair in past)


def test_rank_4_masks_work_with_every_cache(make):
    model, _ = make()
    square = np.tile(np.random.default_rng(1).random((3, 1, 1, 9)) > 0.3, (1, 1, 9, 1))
    whole = logits(model, attention_mask=square)
    for past in (None, model.init_cache(3, 12)):
        first = model(IDS[:, :5], past, attention_mask=square[:, :, :5, :5], use_cache=True)
        second = model(IDS[:, 5:], first.past_key_values, attention_mask=square[:, :, 5:])
        np.testing.assert_allclose(second.logits.numpy(), whole[:, 5:], rtol=0, atol=1e-9)


def test_a_cache_never_changes_and_can_branch(make):
    model, _ = make()
    for new in (None, model.init_cache(3, 9)):
        past = model(IDS[:, :4], new).past_key_values
        one, two = (model(IDS[:, 4:6], past) for _ in range(2))
        assert past.get_seq_length() == 4 and one.past_key_values.get_seq_length() == 6
        assert np.array_equal(one.logits, two.logits) and len(past) == 3 and past[0][0].shape == (3, 3, 4, 4)


def test_a_preallocated_cache_is_reused_after_reset_and_refuses_too_much(make):
    model, _ = make()
    first = model(IDS[:, :6], model.init_cache(3, 6))
    cache = first.past_key_values
    with pytest.raises(InputError, match="6 cached and 1 new tokens are more than the cache's max_length 6"):
        model(IDS[:, 6:7], cache)
    cache = cache.reset()
    assert isinstance(cache, KVCache) and cache.length == 0 and cache.capacity == 6
    assert np.array_equal(model(IDS[:, :6], cache).logits, first.logits)
    with pytest.raises(InputError, match="25 tokens are more than n_positions 24"):
        model.init_cache(1, 25)


@pytest.mark.parametrize("kind", ["grown", "preallocated"])
def test_cross_attention_is_cached_too(kind, make):
    model, _ = make(SMALL.replace(add_cross_attention=True))
    states, mask = np.random.default_rng(0).normal(size=(3, 5, 12)), [[1] * 5, [1] * 3 + [0] * 2, [1] * 5]
    options = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    whole = logits(model, **options)
    past = model(IDS[:, :8], model.init_cache(3, 9) if kind == "preallocated" else None, **options).past_key_values
    last = model(IDS[:, 8:], past, **options)
    np.testing.assert_allclose(last.logits[:, 0], whole[:, 8], rtol=0, atol=1e-9)
    assert len(past.cross) == 3 and all(
        new is old for new, old in zip(last.past_key_values.cross[2], past.cross[2], strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)]
)
@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "float16"])
def test_computing_and_storing_in_two_dtypes(dtype, stored, bound, make):
    model, arrays = make(dtype=dtype, param_dtype=stored)
    assert {v.dtype for v in model.trainable_variables} == {stored}
    with tf.GradientTape() as tape:
        out = model(tf.constant(IDS), output_hidden_states=True)
        total = tf.reduce_sum(tf.cast(out.logits, tf.float64))
    assert model.compute_dtype == out.logits.dtype.name == out.hidden_states[1].dtype.name == dtype
    kept = {name: tf.cast(array, stored).numpy().astype(np.float64) for name, array in arrays.items()}
    expected = reference.outputs(SMALL, kept, "lm", {"input_ids": IDS})["logits"]
    assert np.abs(out.logits.numpy().astype(np.float64) - expected).max() <= bound * np.abs(expected).max()
    grads = tape.gradient(total, [v.value for v in model.trainable_variables])
    assert all(grad is not None and grad.dtype.name == stored for grad in grads)


@pytest.fixture
def global_policy():
    """A function that sets Keras' global policy until the test ends."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def test_policies_of_keras_are_dtypes_too(global_policy):
    model = TFGPT2LMHeadModel(SMALL, dtype="mixed_float16")
    assert model.dtype_policy.name == "mixed_float16" == model.transformer.h[0].mlp.c_fc.dtype_policy.name
    assert (model.compute_dtype, model.variable_dtype) == ("float16", "float32")
    assert TFGPT2LMHeadModel(SMALL, dtype=keras.DTypePolicy("mixed_bfloat16")).compute_dtype == "bfloat16"
    assert TFGPT2LMHeadModel(SMALL, dtype=tf.bfloat16).variable_dtype == "float32"
    for name, compute, stored in (("mixed_bfloat16", "bfloat16", "float32"), ("float64", "float64", "float64")):
        global_policy(name)
        model = TFGPT2LMHeadModel(SMALL)
        assert {v.dtype for v in model.trainable_variables} == {stored} and model(IDS).logits.dtype.name == compute


def test_gradients_equal_the_recorded():
    recorded = fixtures.reference("lm")
    model = TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype="float64")
    weights = table(model.config, "lm")
    with tf.GradientTape() as tape:
        loss = model(recorded["in.input_ids"], labels=recorded["in.labels"]).loss
    grads = tape.gradient(loss, [model.parameter(weight).value for weight in weights])
    for weight, grad in zip(weights, grads, strict=True):
        expected = recorded[f"grad.{TRANSFORMERS.spell(weight)}"]
        found = KERAS.layout(weight, tf.convert_to_tensor(grad).numpy())
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), weight.name
    assert len(weights) == sum(key.startswith("grad.") for key in recorded) > 30


@pytest.mark.parametrize("jit", [False, True])
def test_twenty_steps_of_adamw_give_the_recorded_losses(jit):
    recorded = fixtures.reference("lm")
    model = TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), **OFF)
    if jit:
        model.gradient_checkpointing_enable()
    optimizer = keras.optimizers.AdamW(1e-3, beta_1=0.9, beta_2=0.95, epsilon=1e-8, weight_decay=0.1)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit)
    def step(ids, labels):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=labels, training=True).loss
        optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]), model.trainable_variables)
        return loss

    losses = [float(step(recorded["in.input_ids"], recorded["in.labels"])) for _ in range(20)]
    np.testing.assert_allclose(losses, recorded["train.losses"], rtol=1e-4)


def test_gradient_checkpointing_multiplies_again_with_the_same_noise(make):
    """Every gradient is what it is without, those of states and by way of probabilities too, eagerly and in a graph."""
    model, _ = make(SMALL.replace(n_layer=2, add_cross_attention=True, **dict.fromkeys(DROPOUTS, 0.3)))
    states = tf.constant(np.random.default_rng(0).normal(size=(3, 4, 12)))
    noises = [layer.seed_generator for layer in model._flatten_layers() if hasattr(layer, "seed_generator")]

    def gradients():
        for noise in noises:
            noise.state.assign(tf.constant([7, 3], noise.state.dtype))
        with tf.GradientTape() as tape:
            tape.watch(states)
            given = dict(labels=tf.constant(IDS), encoder_hidden_states=states, output_attentions=True)
            output = model(tf.constant(IDS), training=True, **given)
            seen = sum(tf.reduce_sum(x[..., 0]) for x in (*output.attentions, *output.cross_attentions))
            loss = output.loss + seen
        return [loss, *tape.gradient(loss, [states, *model.trainable_variables])]

    def traced():
        function = tf.function(gradients).get_concrete_function()
        nodes = function.graph.as_graph_def().node
        return function(), sum(node.op in ("MatMul", "BatchMatMulV2", "Einsum") for node in nodes)

    expected, plain = traced()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and len(noises) == 11
    graph, every = traced()
    for found in (graph, gradients()):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
    model.gradient_checkpointing_enable(every_n_layers=2)
    assert plain < traced()[1] < every
    with pytest.warns(UserWarning, match="use_cache is off: blocks recomputed by checkpointing cannot cache"):
        assert model(tf.constant(IDS), training=True, use_cache=True).past_key_values is None
    with pytest.raises(InputError, match="past_key_values: cannot be used while gradient checkpointing trains"):
        model(tf.constant(IDS), model.init_cache(3, 12), training=True)
    assert model(tf.constant(IDS)).past_key_values is not None
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and model(tf.constant(IDS), model.init_cache(3, 12), training=True)
    with pytest.raises(InputError, match="every_n_layers: expected"):
        model.gradient_checkpointing_enable(0)


def test_initialisation_has_the_stds_of_the_table():
    keras.utils.set_random_seed(0)
    config = GPT2Config(vocab_size=2000, n_positions=512, n_embd=128, n_layer=4, n_head=4, initializer_range=0.05)
    model = TFGPT2Model(config)
    for weight in table(config, "base"):
        value = model.parameter(weight).numpy()
        if weight.kind in ("bias", "shift", "scale"):
            assert (value == (weight.kind == "scale")).all()
        else:
            expected = 0.05 / math.sqrt(8) if "c_proj" in weight.name else 0.05
            assert value.std() == pytest.approx(expected, rel=0.03), weight.name
    seen = {tuple(model.parameter(weight).numpy().flat[:4]) for weight in table(config, "base") if weight.std}
    assert len(seen) == 18  # no two layers start alike


def test_tuples_flags_and_positions_of_outputs(make):
    model, _ = make(SMALL.replace(output_hidden_states=True, use_cache=False))
    out = model(IDS)
    assert out.keys() == ["logits", "hidden_states"] and out[0] is out["logits"] is out.logits
    assert len(model(IDS, return_dict=False, output_attentions=True, use_cache=True)) == 4
    with pytest.raises(KeyError, match="has no 'loss' here"):
        out["loss"]


def test_settings_of_the_outputs_are_honoured(make):
    model, _ = make(SMALL.replace(output_attentions=True, return_dict=False))
    found, past, attentions = model(IDS)
    assert found.shape == (3, 9, 31) and len(past) == len(attentions) == 3 and attentions[0].shape == (3, 3, 9, 9)
    assert model(IDS, output_attentions=False, return_dict=True).keys() == ["logits", "past_key_values"]
    assert len(model(IDS, training=True)) == 2  # nobody continues a text in training


def test_no_text_is_longer_than_n_positions(make):
    model, _ = make(SMALL.replace(n_positions=9))
    past = model(IDS).past_key_values
    with pytest.raises(InputError, match="10 tokens are more than n_positions 9"):
        model(IDS[:, :1], past)


def test_logits_to_keep(make):
    model, _ = make()
    np.testing.assert_allclose(model(IDS, logits_to_keep=2).logits, logits(model)[:, -2:], rtol=0, atol=1e-12)


def test_no_rows_give_no_rows(make):
    model, _ = make()
    assert model(tf.zeros((0, 5), tf.int64)).logits.shape == (0, 5, 31)


def test_int32_ids_work(make):
    model, _ = make()
    assert np.array_equal(logits(model, IDS.astype(np.int32)), logits(model))


BAD = {
    "too large an id": ((IDS + 25,), {}, r"input_ids: the id \d+ is outside the vocabulary \(0 to 30\)"),
    "a negative id": ((IDS - 31,), {}, r"input_ids: the id -\d+ is outside"),
    "too long": ((np.zeros((1, 25), int),), {}, "25 tokens are more than n_positions 24"),
    "types outside": ((IDS,), {"token_type_ids": IDS + 31}, "token_type_ids: the id"),
    "positions outside": ((IDS,), {"position_ids": IDS * 0 + 24}, "25 tokens are more than n_positions 24"),
    "negative positions": ((IDS,), {"position_ids": IDS * 0 - 1}, "position_ids: -1 is negative"),
    "neither": ((), {}, "expected one of input_ids and inputs_embeds, found neither"),
    "both": ((IDS,), {"inputs_embeds": np.zeros((3, 9, 12))}, "found both"),
    "one dimension": ((IDS[0],), {}, r"input_ids: expected shape \(any, any\), found \(9,\)"),
    "wide embeddings": ((), {"inputs_embeds": np.zeros((3, 9, 13))}, r"expected shape \(any, any, 12\)"),
    "a short mask": ((IDS,), {"attention_mask": np.ones((3, 8), int)}, r"attention_mask: expected shape \(3, 9\)"),
    "a wrong rank-4 mask": ((IDS,), {"attention_mask": np.ones((3, 2, 9, 9), bool)}, "attention_mask: expected"),
    "an unasked encoder": ((IDS,), {"encoder_hidden_states": np.zeros((3, 4, 12))}, "has no cross-attention"),
    "a strange head_mask": ((IDS,), {"head_mask": np.ones((1, 1, 3))}, r"head_mask: expected shape \(3, 3\) or \(3,\)"),
    "a narrow head_mask": ((IDS,), {"head_mask": np.ones((3, 2))}, r"head_mask: expected shape \(3, 3\) or \(3,\)"),
    "labels of another shape": ((IDS,), {"labels": IDS[:, :5]}, r"labels: expected shape \(3, 9\)"),
    "strange types": ((IDS,), {"token_type_ids": IDS[:, :4]}, r"token_type_ids: expected shape \(3, 9\)"),
    "strange positions": ((IDS,), {"position_ids": IDS[:2] * 0}, r"position_ids: expected shape \(3, 9\)"),
    "floats for ids": ((IDS.astype(float),), {}, "input_ids: expected integers, found"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, make):
    ids, inputs, sentence = BAD[name]
    model, _ = make()
    with pytest.raises(InputError, match=sentence) as error:
        model(*map(tf.constant, ids), **{key: tf.constant(value) for key, value in inputs.items()})
    assert "\n" not in str(error.value)  # Keras would put a page around it


def test_bad_options_are_one_sentence():
    with pytest.raises(InputError, match="dtype: expected float64, float32, float16 or bfloat16, found 'int8'"):
        TFGPT2Model(SMALL, dtype="int8")
    with pytest.raises(InputError, match="param_dtype: expected float64, float32, float16 or bfloat16, found 'mixed"):
        TFGPT2Model(SMALL, param_dtype="mixed_float16")


def test_models_say_how_many_parameters_they_have_and_where_they_come_from():
    model = TFGPT2LMHeadModel.from_pretrained("demo")
    assert model.num_parameters() == model.count_params() == model.num_parameters(only_trainable=True)
    model.trainable = False
    assert model.num_parameters(only_trainable=True) == 0
    assert (model.name_or_path, model.base_model_prefix, model.can_generate()) == ("demo", "transformer", True)
