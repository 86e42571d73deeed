"""What metrics and weights see of a batch: the labels that the loss counts, in every mode, of every head."""

import math

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import BatchEncoding
from gpt2_multi import tf as tfm
from gpt2_multi.errors import InputError
from gpt2_multi.tf.fit.optimizers import AdamW
from tests.tf.fit.test_fit import CROSS_ENTROPY, FAST, HEADS, IDS, LABELLED, MODES, PAIRS, compiled, fit, new

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2
MASK = np.array([[1] * 12] * 3 + [[0] * 4 + [1] * 8] * 2 + [[1] * 8 + [0] * 4] * 2)
PARTLY = {"input_ids": IDS, "attention_mask": MASK, "labels": np.where(IDS % 5, IDS, -100)}


def hits(labels, logits):
    return tf.cast(tf.equal(labels, tf.argmax(logits, -1, labels.dtype)), tf.float32)


def rate(labels, logits):
    """One number for all labels."""
    return tf.reduce_mean(hits(labels, logits))


class Heedless(keras.metrics.Sum):
    """Counts labels, and heeds no weights."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(tf.ones_like(y_true))


def counted(labels, mask, shift=True):
    """Where labels (..., T) count, and what predicts them."""
    if not shift:
        return (labels != -100) & (mask != 0)
    return (labels[..., 1:] != -100) & (mask[..., 1:] != 0) & (mask[..., :-1] != 0)


@pytest.mark.parametrize("mode", MODES)
def test_metrics_see_what_the_loss_sees(mode):
    kinds = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3, name="top"), "crossentropy", "perplexity"]
    own = [hits, rate, Heedless(name="number")] if mode != "xla" else []
    model = compiled(mode=MODES[mode], metrics=[*kinds, *own])
    found = model.evaluate(PARTLY, batch_size=7, verbose=0, return_dict=True)
    logits, keep = model(IDS, attention_mask=MASK).logits.numpy()[:, :-1], counted(PARTLY["labels"], MASK)
    labels, logits = IDS[:, 1:][keep], logits[keep]
    right = np.mean(np.argmax(logits, -1) == labels)
    assert found["accuracy"] == pytest.approx(right)
    if own:
        assert 20 < found["number"] == keep.sum() < 77
        assert found["hits"] == found["accuracy"] and found["rate"] == pytest.approx(right)
    assert found["top"] == pytest.approx(np.mean(tf.math.in_top_k(labels, logits, 3)))
    assert found["crossentropy"] == pytest.approx(found["loss"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-5)


def test_xla_counts_no_metric_of_another():
    model = compiled(mode={"jit_compile": True}, metrics=[hits])
    with pytest.raises(InputError, match="metrics: hits sees the labels that count, and XLA asks how many they are"):
        model.evaluate(PARTLY, verbose=0)
    assert not compiled(mode={}, metrics=[hits]).jit_compile


def test_what_was_learnt_by_heart_has_an_accuracy_of_one():
    rows = np.tile(np.arange(1, 13), (7, 1))
    model = compiled(AdamW(1e-2), mode={}, metrics=["accuracy"])
    history = model.fit(rows, rows, epochs=30, verbose=0).history
    assert history["accuracy"][-1] == 1.0 == model.evaluate({"input_ids": rows, "labels": rows}, verbose=0)[1]


def test_perplexity_is_that_of_an_epoch_s_tokens_and_survives_a_file(tmp_path):
    model = compiled(metrics=["perplexity"], weighted_metrics=[tfm.Perplexity("other")])
    data = [{name: rows[part] for name, rows in PARTLY.items()} for part in (slice(0, 3), slice(3, 6), slice(6, 7))]
    data[1] = {name: rows[:, :9] for name, rows in data[1].items()}  # batches of other lengths
    found = model.evaluate(((batch,) for batch in data), steps=3, verbose=0, return_dict=True)
    numbers = [counted(batch["labels"], batch["attention_mask"]).sum() for batch in data]
    exact = math.exp(np.average([float(model(batch).loss) for batch in data], weights=numbers))
    assert found["perplexity"] == found["other"] == pytest.approx(exact, rel=1e-5)
    fit(model, PARTLY)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.evaluate(PARTLY, verbose=0, return_dict=True) == model.evaluate(PARTLY, verbose=0, return_dict=True)


def test_metrics_of_every_head_see_labels_where_its_loss_does():
    labels = np.where(IDS % 5, IDS % 3, -100)
    model = compiled(cls=tfm.TFGPT2ForTokenClassification, metrics=["accuracy"])
    found = model.evaluate({**PARTLY, "labels": labels}, verbose=0, return_dict=True)
    right = np.argmax(model(IDS, attention_mask=MASK).logits, -1) == labels
    assert found["accuracy"] == pytest.approx(right[counted(labels, MASK, shift=False)].mean())

    model = compiled(cls=tfm.TFGPT2ForSequenceClassification, metrics=["accuracy"])
    labels = np.array([0, 1, 2, -100, 1, -100, 0])
    right = np.argmax(model(IDS).logits, -1) == labels
    assert model.evaluate(IDS, labels, verbose=0)[1] == pytest.approx(right[labels >= 0].mean())

    model = compiled(cls=tfm.TFGPT2ForQuestionAnswering, metrics=[["accuracy"], ["perplexity"]])
    start, end = np.array([0, 1, 2, 3, 4, 12, 90]), np.array([-1, 2, 3, 4, 5, 6, 7])
    found = model.evaluate(IDS, [start, end], verbose=0, return_dict=True)
    assert set(found) == {"loss", "start_positions_accuracy", "end_positions_perplexity"}
    right = np.argmax(model(IDS).start_logits, -1) == start
    assert found["start_positions_accuracy"] == pytest.approx(right[:5].mean())

    model = compiled(cls=tfm.TFGPT2DoubleHeadsModel, metrics={"logits": "accuracy", "mc_logits": "accuracy"})
    y = {"labels": np.where(PAIRS % 5, PAIRS, -100), "mc_labels": np.arange(7) % 2}
    mask = np.stack([MASK, MASK[::-1]], 1)
    found = model.evaluate({"input_ids": PAIRS, "attention_mask": mask}, y, verbose=0, return_dict=True)
    output, keep = model(PAIRS, attention_mask=mask), counted(y["labels"], mask)
    right = np.argmax(output.logits, -1)[..., :-1] == PAIRS[..., 1:]
    assert found["labels_accuracy"] == pytest.approx(right[keep].mean())
    assert found["mc_labels_accuracy"] == pytest.approx(np.mean(np.argmax(output.mc_logits, -1) == y["mc_labels"]))
    by_logits, weight = {"logits": y["labels"], "mc_logits": y["mc_labels"]}, {"mc_labels": np.zeros(7)}
    one = model.evaluate({"input_ids": PAIRS, "attention_mask": mask}, by_logits, sample_weight=weight, verbose=0)
    assert one[0] == pytest.approx(float(model(PAIRS, attention_mask=mask, labels=y["labels"]).loss), rel=1e-5)


def test_metrics_of_labels_that_are_missing_are_named():
    model = compiled(cls=tfm.TFGPT2DoubleHeadsModel, metrics={"labels": "accuracy", "mc_labels": "accuracy"})
    with pytest.raises(InputError, match=r"metrics: expected labels, mc_labels, found mc_labels; give the labels too"):
        model.evaluate(PAIRS, {"mc_labels": np.arange(7) % 2}, verbose=0)


def test_weights_of_samples_with_a_compiled_loss():
    weight = np.zeros((7, 12))
    weight[2] = 1
    model = new()
    model.compile(loss=CROSS_ENTROPY(from_logits=True), weighted_metrics=["accuracy"], **FAST)
    logits = model(IDS[2:3]).logits
    expected = float(CROSS_ENTROPY(from_logits=True)(IDS[2:3], logits)) / 7
    for x, y in ((IDS, IDS), (LABELLED, None)):
        found = model.evaluate(x, y, sample_weight=weight, batch_size=7, verbose=0)
        assert found == pytest.approx([expected, np.mean(np.argmax(logits, -1) == IDS[2:3])], rel=1e-5)


def test_weights_of_rows_with_a_compiled_loss():
    weight, zero = np.arange(7) / 3, np.zeros(7)
    model = new()
    model.compile(loss=CROSS_ENTROPY(from_logits=True), weighted_metrics=["accuracy", "perplexity"], **FAST)
    wide = np.broadcast_to(weight[:, None], (7, 12))
    found, expected = (model.evaluate(IDS, IDS, sample_weight=x, verbose=0) for x in (weight, wide))
    assert found == pytest.approx(expected, rel=1e-5) and found[0] != model.evaluate(IDS, IDS, verbose=0)[0]
    model, y = new(tfm.TFGPT2DoubleHeadsModel), HEADS[tfm.TFGPT2DoubleHeadsModel][1]
    losses = [CROSS_ENTROPY(from_logits=True)] * 2
    model.compile(loss=losses, loss_weights=[2.0, 1.0], weighted_metrics=["accuracy", None], **FAST)
    output = model(PAIRS)
    words, choices = (float(losses[0](y[a], output[b])) for a, b in zip(y, ("logits", "mc_logits"), strict=True))
    for given, expected in ((np.ones(7), 2 * words + choices), ([zero, np.ones(7)], choices)):
        found = model.evaluate(PAIRS, y, sample_weight=given, batch_size=7, verbose=0, return_dict=True)
        assert found["loss"] == pytest.approx(expected, rel=1e-5) and "labels_accuracy" in found


def own_losses(model, labels=PARTLY["labels"]):
    """Each label's part of the model's own loss, (B, T), at the label, and how many count."""
    keep = counted(labels, MASK)
    each = CROSS_ENTROPY(from_logits=True, reduction=None)(
        np.where(keep, IDS[:, 1:], 0), model(IDS, attention_mask=MASK).logits[:, :-1]
    )
    return np.pad(np.where(keep, each, 0), [(0, 0), (1, 0)]), keep.sum()


@pytest.mark.parametrize(("shape", "mode"), [((7,), "eager"), ((7, 12), "graph")])
def test_weights_of_samples_with_the_model_s_own_loss(shape, mode):
    weight = np.random.default_rng(3).uniform(0, 2, shape)
    model = compiled(keras.optimizers.SGD(0.1), mode=MODES[mode], metrics=["accuracy"], weighted_metrics=["perplexity"])
    each, number = own_losses(model)
    wide = np.broadcast_to(weight.reshape(7, -1), (7, 12))
    loss = (each * wide).sum() / number
    perplexity = np.exp((each * wide).sum() / wide[:, 1:][counted(PARTLY["labels"], MASK)].sum())
    x = {name: PARTLY[name] for name in ("input_ids", "attention_mask")}
    expected = {"loss": loss, "perplexity": perplexity}
    expected["accuracy"] = model.evaluate(PARTLY, batch_size=7, verbose=0, return_dict=True)["accuracy"]
    rows = tf.data.Dataset.from_tensor_slices((x, PARTLY["labels"], weight)).batch(7)
    for data in ((BatchEncoding(PARTLY), None), (x, PARTLY["labels"]), (rows,)):
        given = {} if len(data) == 1 else {"sample_weight": weight, "batch_size": 7}
        assert model.evaluate(*data, **given, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-4)
    assert model.test_on_batch(PARTLY, sample_weight=weight, return_dict=True) == pytest.approx(expected, rel=1e-4)
    history = model.fit(PARTLY, sample_weight=weight, validation_data=(PARTLY, None, weight), batch_size=7, verbose=0)
    assert history.history["loss"] == pytest.approx([loss], rel=1e-4) and history.history["val_loss"][0] < loss
    assert model.predict(BatchEncoding(PARTLY), verbose=0).logits.shape == (7, 12, 50)


def test_weights_of_one_change_nothing():
    for cls, (x, y) in HEADS.items():
        model = compiled(cls=cls)
        found = model.evaluate(x, y, sample_weight=np.ones(7), batch_size=7, verbose=0)
        assert found == pytest.approx(model.evaluate(x, y, batch_size=7, verbose=0), rel=1e-5), cls
    y = HEADS[tfm.TFGPT2DoubleHeadsModel][1]
    model = compiled(cls=tfm.TFGPT2DoubleHeadsModel)
    weight = {"labels": np.zeros(7), "mc_labels": np.full(7, 2.0)}
    found = model.evaluate(PAIRS, y, sample_weight=weight, batch_size=7, verbose=0)
    assert found == pytest.approx(2 * float(model(PAIRS, **y).mc_loss), rel=1e-5)


def test_weights_of_rows_with_numbers_as_labels():
    weight, labels = np.arange(7) / 3, np.eye(7, 3, dtype=np.int64)
    accuracy = keras.metrics.BinaryAccuracy(threshold=0.0)
    model = new(tfm.TFGPT2ForSequenceClassification, problem_type="multi_label_classification")
    model.compile("adamw", weighted_metrics=[accuracy, "acc"], **FAST)
    found = model.evaluate(IDS, labels, sample_weight=weight, batch_size=7, verbose=0)
    assert found.pop() == found[1]
    right, logits = (np.asarray(model(IDS).logits) > 0) == labels, model(IDS).logits
    each = tf.nn.sigmoid_cross_entropy_with_logits(labels.astype(np.float32), logits).numpy()
    assert found == pytest.approx([(each * weight[:, None]).mean(), right.mean(-1) @ weight / weight.sum()], rel=1e-5)


@pytest.mark.parametrize("loss", [None, CROSS_ENTROPY(from_logits=True)])
def test_class_weights(loss):
    model = new(tfm.TFGPT2ForSequenceClassification)
    y = np.arange(7) % 3
    model.compile(keras.optimizers.SGD(0.0), loss=loss, **FAST)
    each = CROSS_ENTROPY(from_logits=True, reduction=None)(y, model(IDS).logits).numpy()
    options = {"class_weight": {0: 2.0, 1: 0.0}, "shuffle": False, "verbose": 0}
    expected = (each * np.array([2.0, 0.0, 1.0])[y]).sum() / 7
    found = [
        model.fit(IDS, y, batch_size=7, **options),
        model.fit({"input_ids": IDS, "labels": y}, batch_size=7, **options),
        model.fit(tf.data.Dataset.from_tensor_slices(({"input_ids": IDS}, y)).batch(7), **options),
        model.fit(tf.data.Dataset.from_tensor_slices({"input_ids": IDS, "labels": y}).batch(7), **options),
    ]
    assert [each.history["loss"] for each in found] == [[pytest.approx(expected, rel=1e-5)]] * 4


def test_class_weights_of_tokens():
    model = compiled(keras.optimizers.SGD(0.0))
    each, number = own_losses(model)
    weight = np.where(np.isin(IDS, [7, 9]), 3.0, 1.0)
    losses = fit(model, PARTLY, batch_size=7, class_weight={7: 3.0, 9: 3.0})
    assert losses == pytest.approx([(each * weight).sum() / number], rel=1e-4)


def test_the_loss_under_the_name_of_transformers():
    model = new()
    logits = model(IDS).logits
    loss = model.hf_compute_loss(IDS[:, 1:], logits[:, :-1])
    assert loss.shape == (1,) and float(loss[0]) == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-6)
    labels = np.arange(7) % 3
    for changes, own in (({}, labels), ({"num_labels": 1}, labels.astype(np.float32))):
        model = new(tfm.TFGPT2ForSequenceClassification, **changes)
        each = model.hf_compute_loss(own, model(IDS).logits)
        assert each.shape == (7,) and np.mean(each) == pytest.approx(float(model(IDS, labels=own).loss), rel=1e-6)
    model, positions = new(tfm.TFGPT2ForQuestionAnswering), {"start_position": labels, "end_position": labels + 1}
    output = model(IDS, start_positions=labels, end_positions=labels + 1)
    each = model.hf_compute_loss(positions, (output.start_logits, output.end_logits))
    assert each.shape == (7,) and np.mean(each) == pytest.approx(float(output.loss), rel=1e-6)
    model = new()
    model.compile("sgd", loss=model.hf_compute_loss, **FAST)
    found = model.evaluate(IDS[:, :-1], IDS[:, 1:], batch_size=7, verbose=0)
    assert found == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-6)
