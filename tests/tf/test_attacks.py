"""What hostile or merely odd use found once, so that it stays mended."""

import copy
import pickle

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import tf as tfm
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.model.config import GPT2Config
from tests.support import adapters

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2

SMALL = GPT2Config(
    vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, eos_token_id=None, initializer_range=0.4
)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
CLASSES = [*adapters.classes(tfm).values()]


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    return tfm.TFGPT2LMHeadModel(SMALL.replace())


def stock_layers(model):
    kinds = (keras.layers.Dense, keras.layers.Embedding)
    return [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]


@pytest.mark.parametrize("change", ["vocab_size", "n_positions", "n_inner"])
def test_a_configuration_changed_alone_cannot_overwrite_a_model(model, change, tmp_path):
    model.save_pretrained(tmp_path / "m")
    setattr(model.config, change, 60)
    with pytest.raises(CheckpointError, match="but the configuration makes it"):
        model.save_pretrained(tmp_path / "m")
    tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m")


def test_models_that_share_a_configuration_prune_the_same_heads(model):
    other = tfm.TFGPT2LMHeadModel(model.config)
    other.set_weights(model.get_weights())
    model.prune_heads({0: [0]})
    other.prune_heads({0: [0]})
    assert np.array_equal(model(IDS).logits, other(IDS).logits)


def test_pruning_keeps_frozen_variables_frozen_and_resizing_the_sizes_of_layers(model):
    model.trainable = False
    model.prune_heads({1: [2]})
    model.resize_token_embeddings(60)
    assert not model.trainable_variables and model.transformer.wte.input_dim == 60
    model.trainable = True
    assert len(model.trainable_variables) == len(tfm.TFGPT2LMHeadModel(SMALL).trainable_variables)
    untied = tfm.TFGPT2LMHeadModel(SMALL.replace(tie_word_embeddings=False))
    untied.resize_token_embeddings(60)
    assert untied.lm_head.units == 60 and untied(IDS).logits.shape[-1] == 60


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_are_computed_in_float32_at_least(model, dtype, tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, (64, 32))
    exact = float(model(ids, labels=ids).loss)
    model.save_pretrained(tmp_path / "m")
    loss = tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m", param_dtype=dtype)(ids, labels=ids).loss
    assert loss.dtype == tf.float32 and abs(float(loss) - exact) < 0.02 * exact


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_gradients_under_padding_are_finite(dtype):
    model = tfm.TFGPT2LMHeadModel(SMALL.replace(), **{"dtype" if "mixed" in dtype else "param_dtype": dtype})
    mask = np.ones_like(IDS)
    mask[0, :6], mask[1] = 0, 0
    with tf.GradientTape() as tape:
        loss = model(IDS, attention_mask=mask, labels=IDS, training=True).loss
    grads = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert all(np.isfinite(tf.convert_to_tensor(grad).numpy().astype(float)).all() for grad in grads)


def past_of(model, change):
    past = model(IDS).past_key_values
    return {
        "layers": tuple(past)[:1],
        "nothing": (),
        "rows": model.init_cache(4, 20),
        "objects": [None, None],
        "no sequence": object(),
        "an array": np.zeros((2, 2, 2, 4, 7, 4)),
        "another dtype": tfm.TFGPT2LMHeadModel(SMALL, param_dtype="bfloat16")(IDS).past_key_values,
    }[change]


@pytest.mark.parametrize("change", ["layers", "nothing", "rows", "objects", "no sequence", "an array", "another dtype"])
def test_a_past_that_does_not_fit_is_one_sentence(model, change):
    with pytest.raises(InputError, match=r"past_key_values: (expected what a call returned|made for)") as error:
        model(IDS, past_key_values=past_of(model, change))
    assert "\n" not in str(error.value)


def test_caches_slice_like_sequences(model):
    past = model(IDS).past_key_values
    assert len(past[0:1]) == 1 and np.array_equal(past[:][1][0], past[1][0])


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"inputs_embeds": np.zeros((1, 16))}, r"inputs_embeds: expected shape \(any, any, 16\), found \(1, 16\)"),
        ({"inputs_embeds": np.zeros((1, 2, 16), int)}, "inputs_embeds: expected floats"),
        ({"input_ids": IDS.astype(bool)}, "input_ids: expected integers, found bool"),
        ({"input_ids": IDS.astype(np.uint16)}, "input_ids: expected integers, found uint16"),
        ({"input_ids": IDS, "position_ids": IDS.astype(float)}, "position_ids: expected integers"),
        ({"input_ids": IDS, "token_type_ids": IDS.astype(bool)}, "token_type_ids: expected integers"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep: expected a whole number from 0, found -1"),
        ({"input_ids": IDS, "logits_to_keep": np.array([1])}, "logits_to_keep: expected a whole number from 0, found"),
        ({"input_ids": IDS, "head_mask": np.ones((2, 2, 3, 7, 7))}, r"head_mask: expected shape \(2, 4\)"),
        ({"input_ids": IDS, "labels": IDS.astype(float)}, "labels: expected integers"),
        ({"input_ids": IDS, "attention_mask": np.ones((2, 7, 7))}, r"attention_mask: expected shape \(2, 7\)"),
        ({"input_ids": IDS, "attention_mask": np.array(1)}, r"attention_mask: expected shape \(2, 7\)"),
        ({"input_ids": IDS, "position_ids": np.array(1)}, r"position_ids: expected shape \(2, 7\)"),
        ({"input_ids": np.array(5)}, r"input_ids: expected shape \(any, any\), found \(\)"),
    ],
)
def test_odd_inputs_are_one_sentence(model, inputs, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        model(**inputs)
    assert "\n" not in str(error.value)


def test_every_rank_of_head_mask_means_the_same(model):
    rows = np.array([[1.0, 0, 1, 1], [1, 1, 0, 1]])
    full = np.tile(rows[:, None, :, None, None], (1, 2, 1, 7, 7))
    expected = model(IDS, head_mask=rows).logits
    np.testing.assert_allclose(model(IDS, head_mask=full).logits, expected, atol=1e-6)
    np.testing.assert_allclose(
        model(IDS, head_mask=rows[0]).logits, model(IDS, head_mask=rows[[0, 0]]).logits, atol=1e-6
    )
    model.prune_heads({0: [1]})
    np.testing.assert_allclose(model(IDS, head_mask=full).logits, expected, atol=1e-5)
    half = tfm.TFGPT2LMHeadModel(SMALL, param_dtype="bfloat16")
    assert half(IDS, head_mask=full).logits.dtype == tf.bfloat16


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_new", "swish"])
def test_models_are_pickled_and_copied(activation):
    model = tfm.TFGPT2LMHeadModel(SMALL.replace(activation_function=activation, use_cache=False, return_dict=False))
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert np.array_equal(again(IDS)[0], model(IDS)[0]) and again.config == model.config
        again.transformer.wte.embeddings.assign(model.transformer.wte.embeddings * 0)
    assert np.abs(model.transformer.wte.embeddings.numpy()).max() > 0


def test_lora_is_merged_into_files_and_refuses_other_shapes(model, tmp_path):
    before = model(IDS).logits.numpy()
    for layer in stock_layers(model):
        layer.enable_lora(2)
    np.testing.assert_allclose(model(IDS).logits, before, atol=1e-5)
    for variable in model.trainable_variables:
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.1))
    adapted = model(IDS).logits.numpy()
    assert np.abs(adapted - before).max() > 1e-2
    model.save_pretrained(tmp_path / "m")
    np.testing.assert_allclose(tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m")(IDS).logits, adapted, atol=1e-4)
    model.save(tmp_path / "m.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "m.keras")(IDS).logits, adapted, atol=1e-4)
    with pytest.raises(CheckpointError, match="a model with LoRA cannot be resized; save_pretrained merges"):
        model.resize_token_embeddings(60)
    with pytest.raises(CheckpointError, match="a model with LoRA cannot be pruned"):
        model.prune_heads({0: [1]})
    assert model.config.vocab_size == 50 and not model.config.pruned_heads


def test_a_quantized_model_refuses_what_it_cannot(model, tmp_path):
    model.quantize("int8", filters=lambda layer: isinstance(layer, (keras.layers.Dense, keras.layers.Embedding)))
    for use in (
        lambda: model.save_pretrained(tmp_path / "m"),
        lambda: model.resize_token_embeddings(60),
        lambda: model.prune_heads({0: [1]}),
    ):
        with pytest.raises(CheckpointError, match="a quantized model cannot be"):
            use()
    assert not (tmp_path / "m").exists()


def test_a_subclass_may_change_the_call_and_add_layers():
    class Scored(tfm.TFGPT2LMHeadModel):
        def __init__(self, config, **options):
            super().__init__(config, **options)
            self.score = keras.layers.Dense(2)

        def call(self, input_ids=None, **inputs):
            return self.score(super().call(input_ids, **inputs).logits)

    model = Scored(SMALL)
    assert model(IDS).shape == (2, 7, 2) and model({"input_ids": IDS, "attention_mask": IDS * 0 + 1}).shape == (2, 7, 2)
    assert model(IDS, training=True).shape == (2, 7, 2)
    with pytest.raises(TypeError, match=r"Scored\(\) has no argument 'atention_mask'; did you mean 'attention_mask'"):
        model(IDS, atention_mask=IDS)


EMPTY = np.zeros((0, 5), int)
NO_ROWS = {
    "base": {},
    "lm": {"labels": EMPTY},
    "double_heads": {"labels": np.zeros((0, 2, 5), int), "mc_labels": EMPTY[:, 0]},
    "sequence_classification": {"labels": EMPTY[:, 0]},
    "token_classification": {"labels": EMPTY},
    "question_answering": {"start_positions": EMPTY[:, 0], "end_positions": EMPTY[:, 0]},
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_rows_and_no_tokens(cls):
    model = cls(SMALL)
    out = model(np.zeros((0, 2, 5), int) if cls.head == "double_heads" else EMPTY, **NO_ROWS[cls.head])
    assert all(len(out[name]) == 0 for name in ("last_hidden_state", "logits", "start_logits") if name in out)
    assert cls.head == "base" or float(out.loss) == 0
    ids = np.zeros((1, 2, 0) if cls.head == "double_heads" else (1, 0), int)
    if cls.head in ("double_heads", "sequence_classification"):
        with pytest.raises(InputError, match="input_ids: a text has no token to look at"):
            model(ids)
    else:
        assert model(ids)[0].shape[:2] == (1, 0)


def test_models_work_in_pipelines_and_without_graphs(model):
    expected = model(IDS).logits
    batches = tf.data.Dataset.from_tensor_slices(IDS).batch(2).map(lambda ids: model(ids).logits)
    np.testing.assert_allclose(next(iter(batches)), expected, atol=1e-5)
    tf.config.run_functions_eagerly(True)
    try:
        np.testing.assert_allclose(tf.function(model)(IDS).logits, expected, atol=1e-5)
    finally:
        tf.config.run_functions_eagerly(False)


def test_a_call_changes_nothing_that_it_was_given(model):
    inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": None}
    kept = dict(inputs)
    model(inputs)
    assert inputs == kept and (IDS == kept["input_ids"]).all()


def test_the_same_seed_gives_the_same_model():
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        models.append(tfm.TFGPT2LMHeadModel(SMALL))
    assert np.array_equal(models[0](IDS).logits, models[1](IDS).logits)
