"""Training with Keras: compile, fit, evaluate and predict, on every kind of data, head, policy and callback."""

import csv
import functools
import math

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import tf as tfm
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf import heads
from gpt2_multi.tf.fit.optimizers import AdamW, CosineSchedule
from gpt2_multi.tf.training import cosine_schedule
from tests.support.effort import THOROUGH

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2
SMALL = GPT2Config(
    vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=4, num_labels=3, pad_token_id=0,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, summary_first_dropout=0.0, initializer_range=0.2,
    extra={"classifier_dropout": 0.0},
)  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 50, (7, 12)).astype(np.int32)
PAIRS = np.stack([IDS, IDS[::-1]], 1)
LABELLED = {"input_ids": IDS, "labels": IDS}
MODES = {"graph": {"jit_compile": False}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}
FAST = {"run_eagerly": True}  # the models here are faster than their tracing
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy


def new(cls=tfm.TFGPT2LMHeadModel, dtype=None, **changes):
    """A model without dropout, the same one each time."""
    keras.utils.set_random_seed(0)
    return cls(SMALL.replace(**changes), dtype=dtype)


def compiled(optimizer="adamw", cls=tfm.TFGPT2LMHeadModel, mode=FAST, **options):
    """`new`, compiled without a loss."""
    model = new(cls)
    model.compile(optimizer, **mode, **options)
    return model


def fit(model, *data, epochs=1, batch_size=3, **options):
    """The losses of some epochs in the data's own order."""
    history = model.fit(*data, epochs=epochs, batch_size=batch_size, shuffle=False, verbose=0, **options)
    return history.history["loss"]


def dataset(*parts):
    """A tf.data.Dataset in batches of 3, 3 and 1."""
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(3)


@functools.cache
def trained_by_a_loop():
    """A model after three updates of 3, 3 and 1 rows, and the loss of their epoch: Keras' mean, weighted by rows."""
    model, optimizer, losses = new(), keras.optimizers.SGD(0.1), []
    for batch in np.split(IDS, [3, 6]):
        with tf.GradientTape() as tape:
            loss = model(batch, labels=batch, training=True).loss
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        losses.append(float(loss))
    return model, np.average(losses, weights=[3, 3, 1])


# Data and modes


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_as_a_loop_does(mode):
    model = compiled(keras.optimizers.SGD(0.1), mode=MODES[mode])
    expected, loss = trained_by_a_loop()
    assert fit(model, LABELLED) == pytest.approx([loss], rel=1e-6)
    np.testing.assert_allclose(model.predict(IDS, verbose=0).logits, expected(IDS).logits, atol=1e-5)


def test_logits_that_nobody_reads_are_never_there_as_a_whole(monkeypatch):
    calls, lm_logits = [], heads.lm_logits
    monkeypatch.setattr(heads, "lm_logits", lambda *given: calls.append(1) or lm_logits(*given))
    monkeypatch.setattr("gpt2_multi.tf.training.CHUNK", (5 * 50 * 4,) * 2)

    class Penalised(tfm.TFGPT2LMHeadModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return super().compute_loss(x, y, y_pred, sample_weight, training) + 0 * tf.reduce_mean(y_pred["logits"])

    expected = pytest.approx([float(new()(IDS, labels=IDS).loss)], rel=1e-6)
    for mode in ("graph", "eager"):
        calls.clear()
        model = compiled(mode=MODES[mode])
        assert fit(model, LABELLED, batch_size=7) == expected
        model.evaluate(IDS, IDS, verbose=0)
        assert not calls
    for cls, options in ((tfm.TFGPT2LMHeadModel, {"metrics": ["accuracy"]}), (Penalised, {})):
        calls.clear()
        assert fit(compiled(cls=cls, **options), LABELLED, batch_size=7) == expected and calls


def test_the_first_loss_is_the_model_s_own():
    model = compiled(mode=MODES["xla"])
    own = float(model(IDS, labels=IDS).loss)
    assert fit(model, LABELLED, batch_size=7) == pytest.approx([own], rel=1e-6)


def data_of(kind):
    pairs = {
        "mapping": (LABELLED, None),
        "y": (IDS, IDS),
        "mapping and y": ({"input_ids": IDS}, IDS),
        "y by name": (IDS, {"labels": IDS}),
        "tensors": (tf.constant(IDS), tf.constant(IDS)),
        "long": (IDS.astype(np.int64), IDS.astype(np.int64)),
        "mask": ({**LABELLED, "attention_mask": np.ones_like(IDS)}, None),
        "dataset of mappings": (dataset(LABELLED), None),
        "dataset of pairs": (dataset(IDS, IDS), None),
        "dataset of a mapping and y": (dataset({"input_ids": IDS}, IDS), None),
    }
    return pairs[kind]


KINDS = [
    "mapping", "y", "mapping and y", "y by name", "tensors", "long", "mask",
    "dataset of mappings", "dataset of pairs", "dataset of a mapping and y",
]  # fmt: skip


# How Keras hands on what it is given is one question, and what it traces another: one of each shape is traced.
TRACED = KINDS if THOROUGH else ["mapping and y", "y by name", "dataset of pairs"]


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "eager") for kind in KINDS), *((kind, "graph") for kind in TRACED)]
)
def test_labels_in_the_inputs_or_as_y_are_the_same(kind, mode):
    x, y = data_of(kind)
    model = compiled(keras.optimizers.SGD(0.1), mode=MODES[mode])
    size = None if isinstance(x, tf.data.Dataset) else 3
    again, loss = trained_by_a_loop()
    assert fit(model, x, y, batch_size=size) == pytest.approx([loss], rel=1e-6)
    loss = model.evaluate(x, y, batch_size=size, verbose=0)
    assert loss == pytest.approx(float(again(IDS, labels=IDS).loss), rel=1e-5)
    assert model.predict(x, batch_size=size, verbose=0).logits.shape == (7, 12, 50)


def test_padding_and_ignored_labels_do_not_count():
    mask = np.array([[1] * 12] * 3 + [[0] * 4 + [1] * 8] * 2 + [[1] * 8 + [0] * 4] * 2)
    labels = np.where(IDS % 5, IDS, -100)
    model = compiled()
    own = float(model(IDS, attention_mask=mask, labels=labels).loss)
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    assert model.evaluate(inputs, batch_size=7, verbose=0) == pytest.approx(own, rel=1e-6)
    assert own != pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-3)


def test_validation_data_and_several_steps_at_once():
    data = dataset(LABELLED)
    model = compiled(mode={"steps_per_execution": 2})
    history = model.fit(data.repeat(), epochs=2, steps_per_epoch=4, validation_data=data, shuffle=False, verbose=0)
    assert history.history["loss"][1] < history.history["loss"][0]
    assert history.history["val_loss"][-1] == pytest.approx(model.evaluate(data, verbose=0), rel=1e-6)


def test_single_batches():
    model = compiled()
    own = float(model(IDS, labels=IDS).loss)
    assert float(model.test_on_batch(LABELLED)) == pytest.approx(own, rel=1e-6)
    assert model.train_on_batch(IDS, IDS, return_dict=True)["loss"] == pytest.approx(own, rel=1e-6)
    assert model.train_on_batch(LABELLED) < own
    np.testing.assert_array_equal(model.predict_on_batch(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("mode", MODES)
def test_predictions_of_batches_are_joined(mode):
    model = new(output_hidden_states=True, output_attentions=True)
    model.compile(**MODES[mode])
    found, expected = model.predict(LABELLED, batch_size=3, verbose=0), model(IDS, use_cache=False)
    assert type(found) is type(expected) and found.keys() == expected.keys() and found.loss is None
    assert isinstance(found.logits, np.ndarray)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(found.attentions[0], expected.attentions[0], atol=1e-5)
    assert [x.shape for x in found.hidden_states] == [(7, 12, 16)] * 2


# Losses and metrics of compile


def test_a_compiled_loss_sees_labels_and_logits_only():
    seen = []

    def loss(labels, logits):
        seen.append((labels.shape, logits.shape))
        return CROSS_ENTROPY(from_logits=True)(labels, logits)

    model = new()
    model.compile(keras.optimizers.SGD(0.1), loss=loss, metrics=["accuracy"], **FAST)
    logits = model(IDS).logits
    history = model.fit(IDS, IDS, batch_size=7, verbose=0).history
    assert seen == [((7, 12), (7, 12, 50))]
    assert history["loss"] == pytest.approx([float(CROSS_ENTROPY(from_logits=True)(IDS, logits))], rel=1e-6)
    assert history["accuracy"] == pytest.approx([np.mean(np.argmax(logits, -1) == IDS)])


LISTS = {
    "list": {"loss": [CROSS_ENTROPY(from_logits=True), None]},
    "as long as the outputs": {"loss": [CROSS_ENTROPY(from_logits=True), *[None] * 12]},
    "mapping": {"loss": {"logits": CROSS_ENTROPY(from_logits=True)}},
    "label": {"loss": {"labels": CROSS_ENTROPY(from_logits=True), "past_key_values": None}},
    "name": {"loss": "sparse_categorical_crossentropy"},
    "weights": {"loss": [CROSS_ENTROPY(from_logits=True), None], "loss_weights": [1.0, 0.0]},
}


@functools.cache
def trained_by_one_loss():
    """What a model evaluates to, and its logits, after an epoch of a loss that nobody put into a list."""
    model = new()
    model.compile("sgd", CROSS_ENTROPY(from_logits=True), metrics=["accuracy"], **FAST)
    fit(model, IDS, IDS)
    return model.evaluate(IDS, IDS, verbose=0), model.predict(IDS, verbose=0).logits


@pytest.mark.parametrize("case", LISTS)
def test_losses_as_for_several_outputs(case):
    model = new(use_cache=case != "list", return_dict=case != "mapping", output_hidden_states=True)
    model.compile("sgd", metrics={"logits": "accuracy"}, **FAST, **LISTS[case])
    fit(model, IDS, IDS)
    evaluated, logits = trained_by_one_loss()
    assert model.evaluate(LABELLED, verbose=0) == evaluated
    np.testing.assert_array_equal(model.predict(IDS, verbose=0).logits, logits)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"loss": [None, "mse"]},
            "loss: expected an entry for each of labels, found 2; give a mapping",
        ),
        ({"loss": CROSS_ENTROPY()}, "loss: sparse_categorical_crossentropy expects probabilities, but the"),
        (
            {"metrics": [keras.losses.sparse_categorical_crossentropy]},
            "metrics: sparse_categorical_crossentropy exp",
        ),
        ({"metrics": [keras.metrics.AUC()]}, "metrics: auc expects probabilities, but the model gives logits; say"),
        (
            {"loss_weights": [2.0]},
            "loss_weights: weigh compiled losses; compile a loss for each",
        ),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        new().compile("sgd", **options)
    with pytest.raises(TypeError, match="loss of TFGPT2LMHeadModel has no output 'logit'; did you mean"):
        new().compile("sgd", loss={"logit": "mse"})
    with pytest.raises(InputError, match="metrics: expected an entry for each of labels, mc_labels, found 1"):
        new(tfm.TFGPT2DoubleHeadsModel).compile("sgd", metrics="accuracy")


def test_a_compiled_loss_on_shifted_labels_equals_the_model_s_own():
    labels = np.concatenate([IDS[:, 1:], np.full((7, 1), -100)], 1)
    model = new()
    model.compile(loss=CROSS_ENTROPY(from_logits=True, ignore_class=-100, reduction="sum"), **FAST)
    found = model.evaluate({"input_ids": IDS, "labels": labels}, batch_size=7, verbose=0) / (7 * 11)
    assert found == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-6)


def test_compiling_again_forgets_the_loss_and_the_metrics():
    model = new()
    model.compile(loss=CROSS_ENTROPY(from_logits=True), metrics=["accuracy"], **FAST)
    model.evaluate(IDS, IDS, verbose=0)
    model.compile(**FAST)
    found = model.evaluate(IDS, IDS, verbose=0, batch_size=7, return_dict=True)
    assert found == {"loss": pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-6)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cls", "data", "options", "sentence"),
    [
        (tfm.TFGPT2LMHeadModel, (IDS,), {}, "TFGPT2LMHeadModel: fit and evaluate need labels, in x={'input_ids'"),
        (tfm.TFGPT2Model, (IDS,), {}, "TFGPT2Model: the bare model has no loss of its own; compile one"),
        (tfm.TFGPT2ForQuestionAnswering, (IDS, np.ones(7, int)), {}, "need start_positions and end_positions"),
        (tfm.TFGPT2LMHeadModel, (IDS, IDS), {"sample_weight": np.ones((7, 5))}, r"sample_weight: expected shape \("),
        (
            tfm.TFGPT2LMHeadModel,
            (IDS,),
            {"sample_weight": np.ones(7)},
            "weight: expected labels to weigh, found a nda",
        ),
        (tfm.TFGPT2LMHeadModel, (IDS, IDS.astype(float)), {}, "labels: expected integers, found float"),
        (tfm.TFGPT2LMHeadModel, (IDS, IDS[:, 1:]), {}, r"labels: expected shape \(\w+, 12\), found \(\w+, 11\)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(cls, data, options, sentence, mode):
    with pytest.raises(InputError, match=sentence) as caught:
        fit(compiled(cls=cls, mode=MODES[mode]), *data, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (({"input_ids": IDS, "label": IDS},), r"has no argument 'label'; did you mean 'labels'\?"),
        ((IDS, {"label": IDS}), r"y of TFGPT2LMHeadModel has no argument 'label'; did you mean 'labels'\?"),
    ],
)
def test_misspelt_labels_are_named(data, sentence):
    with pytest.raises(TypeError, match=sentence):
        fit(compiled(), *data)


def test_a_tuple_where_the_configuration_asks_for_one():
    model = new(return_dict=False, output_attentions=True)
    model.compile(metrics=["accuracy"], **FAST)
    assert model.evaluate(IDS, IDS, verbose=0)[0] == pytest.approx(float(model(IDS, labels=IDS)[0]), rel=1e-6)


# Heads

HEADS = {
    tfm.TFGPT2LMHeadModel: (IDS, IDS),
    tfm.TFGPT2DoubleHeadsModel: (PAIRS, {"labels": PAIRS, "mc_labels": np.arange(7) % 2}),
    tfm.TFGPT2ForSequenceClassification: (IDS, np.arange(7) % 3),
    tfm.TFGPT2ForTokenClassification: (IDS, IDS % 3),
    tfm.TFGPT2ForQuestionAnswering: (IDS, {"start_positions": np.arange(7), "end_positions": np.arange(7) + 2}),
}


# Labels in a mapping, and one array of them, are traced.
TRACED_HEADS = HEADS if THOROUGH else [tfm.TFGPT2DoubleHeadsModel, tfm.TFGPT2ForSequenceClassification]


@pytest.mark.parametrize(
    ("cls", "mode"), [*((cls, "eager") for cls in HEADS), *((cls, "graph") for cls in TRACED_HEADS)]
)
def test_every_head_trains_all_that_it_has(cls, mode):
    x, y = HEADS[cls]
    model = compiled(keras.optimizers.AdamW(3e-3), cls, MODES[mode])
    before = [variable.numpy() for variable in model.trainable_variables]
    labels = y if isinstance(y, dict) else {"labels": y}
    output = model(x, **labels)
    own = float(output.loss) + (float(output.mc_loss) if cls is tfm.TFGPT2DoubleHeadsModel else 0)
    losses = fit(model, x, y, batch_size=7, epochs=4)
    assert losses[0] == pytest.approx(own, rel=1e-5) and losses[-1] < losses[0]
    assert fit(compiled(keras.optimizers.AdamW(3e-3), cls), {"input_ids": x, **labels}, batch_size=7) == pytest.approx(
        losses[:1], rel=1e-6
    )
    for variable, old in zip(model.trainable_variables, before, strict=True):
        assert np.abs(variable - old).max() > 0, variable.path


def test_choices_alone_train_without_labels_of_words():
    model = compiled(cls=tfm.TFGPT2DoubleHeadsModel, metrics={"mc_labels": "accuracy"})
    y = {"mc_labels": np.arange(7) % 2}
    found = model.evaluate(PAIRS, y, verbose=0, return_dict=True)
    output = model(PAIRS, **y)
    right = np.mean(np.argmax(output.mc_logits, -1) == y["mc_labels"])
    assert found == {"loss": pytest.approx(float(output.mc_loss)), "accuracy": pytest.approx(right)}


def test_losses_and_metrics_by_the_names_of_labels():
    x, y = HEADS[tfm.TFGPT2DoubleHeadsModel]
    model = new(tfm.TFGPT2DoubleHeadsModel)
    losses = {name: CROSS_ENTROPY(from_logits=True) for name in y}
    model.compile(loss=losses, metrics={"mc_labels": ["accuracy"]}, **FAST)
    found = model.evaluate(x, y, batch_size=7, verbose=0, return_dict=True)
    output = model(x)
    words, choices = (
        float(losses["labels"](y[name], output[logits]))
        for name, logits in (("labels", "logits"), ("mc_labels", "mc_logits"))
    )
    assert found["loss"] == pytest.approx(words + choices, rel=1e-5)
    assert found["mc_labels_loss"] == pytest.approx(choices, rel=1e-5) and "mc_labels_accuracy" in found
    model.compile(loss=[None, losses["labels"], None], **FAST)
    assert model.evaluate(x, y, batch_size=7, verbose=0) == pytest.approx(choices, rel=1e-5)


def test_labels_in_a_list_are_in_the_order_of_their_names():
    x, y = HEADS[tfm.TFGPT2ForQuestionAnswering]
    model = compiled(cls=tfm.TFGPT2ForQuestionAnswering)
    by_name, in_order = (model.evaluate(x, labels, verbose=0) for labels in (y, list(y.values())))
    assert by_name == in_order != model.evaluate(x, list(y.values())[::-1], verbose=0)


@pytest.mark.parametrize(
    ("labels", "changes"),
    [(np.linspace(-1, 1, 7), {"num_labels": 1}), (np.eye(7, 3, dtype=np.float32), {})],
)
def test_numbers_as_labels(labels, changes):
    model = new(tfm.TFGPT2ForSequenceClassification, **changes)
    model.compile(keras.optimizers.AdamW(3e-3))
    own = float(model(IDS, labels=labels).loss)
    losses = fit(model, IDS, labels, batch_size=7, epochs=4)
    assert losses[0] == pytest.approx(own, rel=1e-5) and losses[-1] < losses[0]


def test_the_bare_model_trains_with_a_compiled_loss():
    model = new(tfm.TFGPT2Model)
    model.compile(keras.optimizers.AdamW(3e-3), loss={"last_hidden_state": "mse"}, metrics=["mae"])
    losses = fit(model, IDS, np.zeros((7, 12, 16), np.float32), epochs=3)
    assert losses[-1] < losses[0]


def test_a_functional_model_around_it_trains():
    ids = keras.Input((None,), dtype="int32")
    inner = new()
    model = keras.Model(ids, keras.layers.Dense(2)(inner(ids).logits[:, -1]))
    model.compile(keras.optimizers.AdamW(3e-3), loss=CROSS_ENTROPY(from_logits=True))
    before = inner.transformer.wpe.embeddings.numpy()
    losses = fit(model, IDS, np.arange(7) % 2, epochs=3)
    assert losses[-1] < losses[0] and np.abs(inner.transformer.wpe.embeddings - before).max() > 0


# Optimizers


def test_a_tiny_batch_is_learnt_by_heart():
    model = compiled(AdamW(1e-2), mode={})
    assert fit(model, LABELLED, batch_size=7, epochs=60)[-1] < 0.1
    found = model(IDS[:, :-1]).logits
    assert np.mean(np.argmax(found, -1) == IDS[:, 1:]) > 0.97


def test_gradients_are_accumulated():
    halves, whole = new(), new()
    halves.compile(keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=2))
    whole.compile(keras.optimizers.AdamW(1e-2))
    fit(halves, IDS[:4], IDS[:4], batch_size=2, epochs=3)
    fit(whole, IDS[:4], IDS[:4], batch_size=4, epochs=3)
    for one, other in zip(halves.trainable_variables, whole.trainable_variables, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert np.abs(whole(IDS).logits - new()(IDS).logits).max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_train_alike_however_often_a_row_is_looked_up(tied):
    """A mask of ones gives each row of a batch positions of its own, whose gradients are slices of the same rows."""
    model, masked = (new(tie_word_embeddings=tied) for _ in range(2))
    for each, mask in ((model, None), (masked, np.ones_like(IDS))):
        each.compile(keras.optimizers.Adam(1e-2, epsilon=1e-3), **FAST)
        fit(each, {**LABELLED, **({} if mask is None else {"attention_mask": mask})}, batch_size=7)
    for one, other in zip(model.trainable_variables, masked.trainable_variables, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with tf.GradientTape() as tape:
        loss = model(IDS, labels=IDS).loss
    assert all(tf.is_tensor(gradient) for gradient in tape.gradient(loss, model.trainable_variables))


def test_biases_and_layer_norms_do_not_decay():
    plain, decayed = compiled(AdamW(1e-2, weight_decay=0.0)), compiled(AdamW(1e-2, weight_decay=0.5))
    for model in (plain, decayed):
        for variable in model.trainable_variables:
            variable.assign_add(tf.ones_like(variable))  # or biases would be zero, which decays to itself
    first = [variable.numpy() for variable in plain.trainable_variables]
    for model in (plain, decayed):
        fit(model, LABELLED, batch_size=7)
    names = {}
    for one, other, old in zip(plain.trainable_variables, decayed.trainable_variables, first, strict=True):
        decay = 1e-2 * 0.5 * old if len(one.shape) >= 2 else 0.0
        np.testing.assert_allclose(other, one - decay, rtol=0, atol=1e-6 if len(one.shape) >= 2 else 0)
        names[one.name] = len(one.shape) >= 2
    assert names == {"kernel": True, "embeddings": True, "bias": False, "gamma": False, "beta": False}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_updates_as_the_paper_says(amsgrad):
    """To the last digits of float64, with epsilon added to the square root of v without its bias."""
    rng = np.random.default_rng(0)
    x, m, v, most = rng.normal(size=(3, 4)), np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4))
    variable = keras.Variable(x, dtype="float64", name="kernel")
    rate, epsilon = tf.constant(0.1, tf.float64), 1e-3
    optimizer = AdamW(lambda: rate, weight_decay=0.1, epsilon=epsilon, beta_2=0.95, amsgrad=amsgrad)
    optimizer.build([variable])
    for step in range(1, 5):
        gradient = rng.normal(size=(3, 4)) * 0.01
        optimizer.apply([tf.constant(gradient)], [variable])
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        most = np.maximum(most, v) if amsgrad else v
        x = x - 0.1 * 0.1 * x - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(most / (1 - 0.95**step)) + epsilon)
        np.testing.assert_allclose(variable.numpy(), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("steps", "warmup", "least"), [(20, 5, 0.1), (20, 0, 0.0), (5, 5, 0.1), (1, 0, 0.3), (7, 9, 0)]
)
def test_the_schedule_is_pytorch_s(steps, warmup, least):
    pytest.importorskip("torch")
    from gpt2_multi.pt import training

    schedule = CosineSchedule(3e-4, steps, warmup, least)
    for step in range(steps + 5):
        expected = training.cosine_schedule(step, steps, warmup, least)
        assert float(cosine_schedule(step, steps, warmup, least)) == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert float(schedule(step)) == pytest.approx(3e-4 * expected, rel=1e-6, abs=1e-10)
    assert CosineSchedule.from_config(schedule.get_config()).get_config() == schedule.get_config()


def test_the_optimizer_follows_the_schedule():
    model = compiled(AdamW(CosineSchedule(1e-2, 6, 2)))
    rates = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: rates.append(float(model.optimizer.learning_rate))
    )
    fit(model, LABELLED, epochs=2, callbacks=[note])
    assert rates == pytest.approx([1e-2 * float(cosine_schedule(step, 6, 2)) for step in range(6)], rel=1e-6)


# Callbacks and files


def test_callbacks(tmp_path):
    model = compiled(AdamW(1e-2), mode={})
    callbacks = [
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.weights.h5", monitor="val_loss", save_best_only=True, save_weights_only=True
        ),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TerminateOnNaN(),
    ]
    held = np.random.default_rng(1).integers(1, 50, (7, 12))  # nothing of it can be learnt
    fit(model, LABELLED, epochs=50, validation_data=({"input_ids": held, "labels": held},), callbacks=callbacks)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    val = [float(row["val_loss"]) for row in rows]
    assert 3 <= len(rows) < 50 and min(val) == val[-3]
    again = new()
    again.load_weights(tmp_path / "best.weights.h5")
    best = keras.saving.load_model(tmp_path / "best.keras")
    for other in (again, best):
        np.testing.assert_array_equal(other(IDS).logits, model(IDS).logits)
    assert best.evaluate(held, held, verbose=0) == pytest.approx(min(val), rel=1e-5)


def test_training_stops_at_nan():
    model = compiled(keras.optimizers.SGD(float("nan")))
    losses = fit(model, LABELLED, epochs=5, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert len(losses) < 5 and math.isnan(losses[-1])


@pytest.mark.parametrize("optimizer", ["adamw", "own", "accumulating"])
def test_training_resumes_from_a_file_as_if_never_interrupted(optimizer, tmp_path):
    made = {
        "adamw": lambda: "adamw",
        "own": lambda: AdamW(CosineSchedule(1e-2, 12, 3), global_clipnorm=1.0),
        "accumulating": lambda: keras.optimizers.AdamW(gradient_accumulation_steps=2, use_ema=True),
    }
    model = compiled(made[optimizer](), mode=MODES["graph" if optimizer == "adamw" else "eager"], metrics=["accuracy"])
    fit(model, LABELLED, epochs=2)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert type(again) is tfm.TFGPT2LMHeadModel
    assert fit(again, LABELLED, epochs=2) == fit(model, LABELLED, epochs=2)
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    assert float(again.optimizer.iterations) == float(model.optimizer.iterations)


@pytest.mark.parametrize("cls", HEADS)
def test_what_was_trained_survives_a_folder(cls, tmp_path):
    model = compiled(cls=cls)
    fit(model, *HEADS[cls])
    model.save_pretrained(tmp_path / "m")
    again, first = cls.from_pretrained(tmp_path / "m"), new(cls)
    x = HEADS[cls][0]
    for name in cls.logit_names:
        np.testing.assert_array_equal(again(x)[name], model(x)[name])
        assert np.abs(again(x)[name] - first(x)[name]).max() > 0


def test_frozen_layers_stay():
    model = new(tfm.TFGPT2ForSequenceClassification)
    model.transformer.trainable = False
    model.compile(keras.optimizers.AdamW(1e-2), **FAST)
    assert [variable.path for variable in model.trainable_variables] == [model.score.kernel.path]
    body, losses = model.transformer.get_weights(), fit(model, IDS, np.arange(7) % 3, epochs=3)
    assert losses[-1] < losses[0]
    assert all(np.array_equal(a, b) for a, b in zip(body, model.transformer.get_weights(), strict=True))


def test_a_frozen_block_and_a_frozen_embedding_stay():
    model = new()
    model.transformer.h[0].trainable = model.transformer.wte.trainable = False
    model.compile(keras.optimizers.AdamW(1e-2), **FAST)
    frozen = [*model.transformer.h[0].get_weights(), *model.transformer.wte.get_weights()]
    losses = fit(model, LABELLED, epochs=3)
    still = [*model.transformer.h[0].get_weights(), *model.transformer.wte.get_weights()]
    assert losses[-1] < losses[0] and all(np.array_equal(a, b) for a, b in zip(frozen, still, strict=True))


# Policies


@pytest.fixture
def global_policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_policies(policy, everywhere, global_policy):
    weights, exact = new().get_weights(), float(new()(IDS, labels=IDS).loss)
    if everywhere:
        global_policy(policy)
    model = new(dtype=None if everywhere else policy)
    model.set_weights(weights)
    model.compile(AdamW(1e-2), run_eagerly=everywhere)  # where it comes from is nothing to a graph
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    losses = fit(model, LABELLED, batch_size=7, epochs=4)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1
    assert losses[0] == pytest.approx(exact, rel=0.01)
    assert model.predict(IDS, verbose=0).logits.dtype == policy.removeprefix("mixed_")
    assert model.transformer.wte.embeddings.dtype == ("float64" if everywhere and policy == "float64" else "float32")


def test_an_optimizer_that_could_learn_nothing_is_refused():
    model = tfm.TFGPT2LMHeadModel(SMALL, param_dtype="bfloat16")
    with pytest.raises(InputError, match=r'beta_2 0.999 is 1 in bfloat16.*dtype="mixed_bfloat16"'):
        model.compile("adamw")
    model.compile(AdamW(1e-2, beta_2=0.95))
    losses = fit(model, LABELLED, batch_size=7, epochs=4)
    assert losses[-1] < losses[0] - 0.1


def test_float16_s_gradients_are_scaled():
    model = new(dtype="mixed_float16")
    model.compile(AdamW(1e-2))
    first = float(model.optimizer.scale_loss(1.0))
    assert first > 1000 and np.isfinite(fit(model, LABELLED, epochs=3)).all()


def test_steps_on_dropout_are_repeatable():
    def losses():
        model = new(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
        model.compile(AdamW(1e-3), **FAST)
        return fit(model, LABELLED, epochs=2)

    assert losses() == losses() != fit(compiled(AdamW(1e-3)), LABELLED, epochs=2)
