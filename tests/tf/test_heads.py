"""The heads in TensorFlow beyond parity: padding and pooling, losses, kinds of summary and of problems."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import tf as tfm
from gpt2_multi.errors import InputError
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf import heads
from tests.support import fixtures
from tests.support.cases import PROBLEMS

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, num_labels=3)
RNG = np.random.default_rng(5)
IDS = RNG.integers(2, 31, (3, 9))
MASK = np.array([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])
CLASSES = {
    "lm": tfm.TFGPT2LMHeadModel,
    "double_heads": tfm.TFGPT2DoubleHeadsModel,
    "sequence_classification": tfm.TFGPT2ForSequenceClassification,
    "token_classification": tfm.TFGPT2ForTokenClassification,
    "question_answering": tfm.TFGPT2ForQuestionAnswering,
}


@pytest.fixture
def both(tmp_path):
    """A function that gives the output of a head in float64, and the oracle's."""

    def run(head, inputs, config=SMALL):
        arrays = fixtures.write_model(tmp_path / "m", config, head)
        model = CLASSES[head].from_pretrained(tmp_path / "m", param_dtype="float64")
        return model(inputs), reference.outputs(config, arrays, head, inputs)

    return run


def assert_same(found, expected, keys):
    for key in keys:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-9, err_msg=key)


def test_padding_counts_neither_as_label_nor_as_predictor(both):
    labels = IDS.copy()
    found, expected = both("lm", {"input_ids": IDS, "attention_mask": MASK, "labels": labels})
    assert_same(found, expected, ["loss"])
    labels[MASK == 0] = -100
    labels[2, 3] = -100  # the first real token: what predicts it is padding
    assert float(both("lm", {"input_ids": IDS, "attention_mask": MASK, "labels": labels})[0].loss) == float(found.loss)


def test_the_loss_of_a_batch_is_that_of_its_rows_alone(both):
    rows = [IDS[0], IDS[1, :5], IDS[2, 3:]]
    losses = [float(both("lm", {"input_ids": r[None], "labels": r[None]})[0].loss) for r in rows]
    counts = [len(r) - 1 for r in rows]
    together = both("lm", {"input_ids": IDS, "attention_mask": MASK, "labels": IDS})[0].loss
    assert float(together) == pytest.approx(np.average(losses, weights=counts), abs=1e-9)


def test_no_counted_label_is_a_loss_of_zero(both):
    assert float(both("lm", {"input_ids": IDS, "labels": np.full_like(IDS, -100)})[0].loss) == 0


@pytest.fixture
def chunked(monkeypatch):
    """A function that gives a model whose loss has chunks of 7 rows, with its inputs, of which some labels are -100."""
    monkeypatch.setattr("gpt2_multi.tf.training.CHUNK", (7 * 31 * 8,) * 2)
    labels = np.where(RNG.random(IDS.shape) < 0.3, -100, IDS)

    def run(head="lm", tied=True):
        keras.utils.set_random_seed(0)
        off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0)
        model = CLASSES[head](SMALL.replace(tie_word_embeddings=tied, **off), param_dtype="float64")
        given = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
        return model, {name: x[None] if head == "double_heads" else x for name, x in given.items()}

    return run


def derivatives(model, inputs, **options):
    """The loss, and its gradients, times 3; None where there is none."""
    with tf.GradientTape() as tape:
        loss = 3 * model(inputs, **options).loss
    return [loss, *tape.gradient(loss, [variable.value for variable in model.trainable_variables])]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            one, other = map(tf.convert_to_tensor, (one, other))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("head", "tied"), [("lm", True), ("lm", False), ("double_heads", True)])
def test_a_loss_in_chunks_is_that_of_all_logits(head, tied, chunked):
    model, inputs = chunked(head, tied)
    for change in ({}, {"attention_mask": np.ones_like(inputs["input_ids"])}, {"labels": inputs["labels"] * 0 - 100}):
        given = inputs | change
        expected = derivatives(model, given, skip_logits=False)
        for training in (True, False):  # whose gradients are made beside the loss, or when they are asked for
            assert_close(derivatives(model, given, skip_logits=True, training=training), expected)


def test_a_compiled_loss_never_has_all_logits_of_a_head_that_is_ours(chunked):
    model, inputs = chunked()

    def step(inputs):
        return [x for x in derivatives(model, inputs, training=True) if x is not None]

    inputs = {name: tf.constant(x) for name, x in inputs.items()}
    text = tf.function(step, jit_compile=True).experimental_get_compiler_ir(inputs)(stage="optimized_hlo")
    assert not any(f"f64[{shape},31]" in text for shape in ("3,9", "27"))
    model.transformer.wte.trainable = False  # then the head's gradient is not made beside the loss
    expected = derivatives(model, inputs, skip_logits=False)
    sizes = [{name: tf.TensorSpec((None, None), tf.int64) for name in inputs}]
    found = tf.function(step, input_signature=sizes)(inputs)
    assert_close(found, [x for x in expected if x is not None])


def test_logits_beside_a_loss_in_chunks(chunked):
    model, inputs = chunked()
    whole = model(inputs)
    found = tf.function(lambda inputs: model(inputs, training=True, use_cache=False))(inputs)
    assert_close([found.loss, found.logits], [whole.loss, whole.logits])
    assert model(inputs, skip_logits=True).logits is None
    empty = {name: x[:0] for name, x in inputs.items()}
    assert model(empty, skip_logits=True).loss == 0
    with pytest.raises(InputError, match="skip_logits: expected labels"):
        model(IDS, skip_logits=True)
    with tf.GradientTape(persistent=True) as tape:
        loss = model(inputs, skip_logits=True, training=True).loss
        first = tape.gradient(loss, model.transformer.ln_f.gamma.value)
    np.testing.assert_array_equal(tape.gradient(loss, model.transformer.ln_f.gamma.value), first)
    with pytest.raises(InputError, match="loss: it was computed in chunks, which have no second derivative"):
        tape.gradient(first, model.transformer.ln_f.gamma.value)

    class Capped(tfm.TFGPT2LMHeadModel):
        def logits(self, hidden):
            return super().logits(hidden) * 0

    assert np.isclose(Capped(SMALL)(inputs, skip_logits=True).loss, np.log(31))
    head = keras.layers.Dense(31, use_bias=False, activation="relu", dtype="float64")
    head.build((None, 12))
    model.set_output_embeddings(head)
    assert_close([model(inputs, skip_logits=True).loss], [model(inputs).loss])


def test_token_labels_under_padding_do_not_count(both):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS % 3}
    assert_same(*both("token_classification", inputs), ["loss"])


@pytest.mark.parametrize("pad", [None, 0])
def test_sequences_are_pooled_at_the_last_token_that_the_mask_keeps(both, pad):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": np.array([0, 2, 1])}
    found, expected = both("sequence_classification", inputs, SMALL.replace(pad_token_id=pad))
    assert_same(found, expected, ["logits", "loss"])
    alone, _ = both("sequence_classification", {"input_ids": IDS[1:2, :5]})
    np.testing.assert_allclose(found.logits[1:2], alone.logits, rtol=0, atol=1e-9)


def test_without_a_mask_the_pad_token_finds_the_end(both):
    ids = IDS.copy()
    ids[1, 5:] = 0
    config = SMALL.replace(pad_token_id=0)
    found, expected = both("sequence_classification", {"input_ids": ids}, config)
    assert_same(found, expected, ["logits"])
    with pytest.raises(InputError, match=r"cannot tell where each of 3 rows ends: give attention_mask, or set"):
        both("sequence_classification", {"input_ids": ids})


@pytest.mark.parametrize(("problem", "number", "labels"), PROBLEMS)
def test_kinds_of_problems(both, problem, number, labels):
    config = SMALL.replace(problem_type=problem, num_labels=number)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    assert_same(*both("sequence_classification", inputs, config), ["logits", "loss"])


@pytest.mark.parametrize("kind", ["cls_index", "last", "first", "mean"])
@pytest.mark.parametrize("padded", [False, True])
def test_kinds_of_summary(both, kind, padded):
    config = SMALL.replace(summary_type=kind, summary_activation="tanh")
    inputs = {"input_ids": IDS.reshape(1, 3, 9), "mc_labels": np.array([2]), "labels": IDS.reshape(1, 3, 9)}
    if padded:
        inputs["attention_mask"] = MASK.reshape(1, 3, 9)
    assert_same(*both("double_heads", inputs, config), ["logits", "mc_logits", "loss", "mc_loss"])


def test_summaries_without_a_projection(tmp_path):
    for change in ({"summary_use_proj": False}, {"summary_proj_to_labels": False}):
        config = SMALL.replace(**change)
        fixtures.write_model(tmp_path / "m", config, "double_heads")
        model = tfm.TFGPT2DoubleHeadsModel.from_pretrained(tmp_path / "m")
        assert model(IDS[None]).mc_logits.shape == (1, 3, 12)


def test_summary_dropout_acts_in_training_alone():
    keras.utils.set_random_seed(0)
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = tfm.TFGPT2DoubleHeadsModel(SMALL.replace(summary_first_dropout=0.5, **off))
    ids = IDS[None]
    first, second = (model(ids, training=True).mc_logits for _ in range(2))
    assert not np.array_equal(first, second) and np.array_equal(model(ids).mc_logits, model(ids).mc_logits)


def test_answers_beyond_the_text_do_not_count(both):
    inputs = {"input_ids": IDS, "start_positions": np.array([1, 99, 3]), "end_positions": np.array([9, 2, -1])}
    assert_same(*both("question_answering", inputs), ["start_logits", "end_logits", "loss"])


def test_choices_as_rows_keep_all_that_is_known_of_their_shape():
    """A loop in a graph ends where a cache of one row becomes one of unknown rows."""
    traced = tf.function(heads.rows).get_concrete_function(tf.TensorSpec((2, 3, None, 4)))
    assert traced.structured_outputs.shape.as_list() == [6, None, 4]
    assert heads.rows(tf.zeros((0, 2, 3))).shape == (0, 3) and heads.rows(None) is None


def test_double_heads_ask_for_choices():
    model = tfm.TFGPT2DoubleHeadsModel(SMALL)
    with pytest.raises(InputError, match=r"expected 3 dimensions \(batch, choices, length\), found shape \(3, 9\)"):
        model(IDS)
    with pytest.raises(InputError, match=r"mc_token_ids: expected shape \(1, 3\)"):
        model(IDS[None], mc_token_ids=[1, 2, 3])
    with pytest.raises(InputError, match=r"mc_token_ids: the index 9 is outside the text \(0 to 8\)"):
        model(IDS[None], mc_token_ids=[[1, 2, 9]])
    with pytest.raises(InputError, match="mc_token_ids: expected integers, found float64"):
        model(IDS[None], mc_token_ids=[[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("head", "inputs", "sentence"),
    [
        ("token_classification", {"labels": IDS[:, :4]}, r"labels: expected shape \(3, 9\)"),
        ("token_classification", {"labels": IDS + 5}, r"labels: \d+ is not a class \(0 to 2, or -100\)"),
        ("lm", {"labels": IDS + 31}, r"labels: \d+ is not a class \(0 to 30, or -100\)"),
        (
            "sequence_classification",
            {"labels": np.array([0, 1, 3]), "attention_mask": MASK},
            "labels: 3 is not a class",
        ),
        (
            "sequence_classification",
            {"labels": np.array([0, 1]), "attention_mask": MASK},
            r"labels: expected shape \(3,\)",
        ),
    ],
)
def test_bad_labels_are_one_sentence(both, head, inputs, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        both(head, {"input_ids": IDS} | inputs)
    assert "\n" not in str(error.value)


LABELS = {
    "lm": {"labels": IDS},
    "double_heads": {"labels": IDS[None], "mc_labels": np.array([2])},
    "sequence_classification": {"labels": np.array([0, 2, 1])},
    "token_classification": {"labels": IDS % 3},
    "question_answering": {"start_positions": np.array([1, 2, 3]), "end_positions": np.array([4, 5, 8])},
}


@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_losses_are_computed_in_float32_at_least(head, dtype):
    ids, mask = (IDS[None], MASK[None]) if head == "double_heads" else (IDS, MASK)
    inputs = {"input_ids": ids, "attention_mask": mask, **LABELS[head]}
    options = {"dtype": dtype} if "mixed" in dtype else {"param_dtype": dtype}
    model = CLASSES[head](SMALL, **options)
    with tf.GradientTape() as tape:
        out = model(inputs, training=True)
        total = out.loss + (out.mc_loss if head == "double_heads" else 0)
    assert out.loss.dtype == tf.float32 and np.isfinite(out.loss) and out.loss > 0
    grads = tape.gradient(total, [v.value for v in model.trainable_variables])
    assert all(np.isfinite(tf.convert_to_tensor(grad).numpy().astype(float)).all() for grad in grads)


@pytest.mark.parametrize("head", CLASSES)
def test_nothing_counted_is_a_loss_of_zero_in_every_head(head):
    ids = IDS[None] if head == "double_heads" else IDS
    labels = {name: np.full_like(value, -100) for name, value in LABELS[head].items()}
    out = CLASSES[head](SMALL.replace(pad_token_id=0))(ids, **labels)
    assert float(out.loss) == 0 and float(getattr(out, "mc_loss", 0)) == 0


@pytest.mark.parametrize("head", CLASSES)
def test_labels_of_int32_and_under_a_function_give_the_same_loss(head):
    ids, mask = (IDS[None], MASK[None]) if head == "double_heads" else (IDS, MASK)
    model, inputs = CLASSES[head](SMALL), {"input_ids": ids, "attention_mask": mask, **LABELS[head]}
    expected = float(model(inputs).loss)
    narrow = {name: value.astype(np.int32) for name, value in inputs.items()}
    assert float(model(narrow).loss) == expected
    for jit in (False, True):
        assert float(tf.function(model, jit_compile=jit)(**inputs).loss) == pytest.approx(expected, rel=1e-5)


def test_the_double_heads_score_the_last_token_by_default(both):
    found, expected = both("double_heads", {"input_ids": IDS[None], "attention_mask": MASK[None]})
    given, _ = both(
        "double_heads",
        {"input_ids": IDS[None], "attention_mask": MASK[None], "mc_token_ids": np.array([[8, 4, 8]])},
    )
    assert_same(found, expected, ["mc_logits"])
    np.testing.assert_allclose(found.mc_logits, given.mc_logits, rtol=0, atol=1e-9)


def test_a_batch_of_unknown_size_needs_a_way_to_find_the_end():
    spec = tf.TensorSpec((None, None), tf.int64)
    with pytest.raises(InputError, match="cannot tell where each of 2 rows ends"):
        tf.function(tfm.TFGPT2ForSequenceClassification(SMALL), input_signature=[spec])(IDS)
    model = tfm.TFGPT2ForSequenceClassification(SMALL.replace(pad_token_id=0))
    np.testing.assert_allclose(tf.function(model, input_signature=[spec])(IDS).logits, model(IDS).logits, atol=1e-6)


def test_the_token_classifier_s_dropout_comes_from_the_file():
    config = GPT2Config.from_dict(SMALL.to_dict() | {"classifier_dropout": 0.7})
    assert tfm.TFGPT2ForTokenClassification(config).dropout.rate == 0.7
    assert tfm.TFGPT2ForTokenClassification(SMALL).dropout.rate == 0.1


def test_embeddings_and_heads_are_replaced(tmp_path):
    model, other = (tfm.TFGPT2LMHeadModel(SMALL.replace()) for _ in range(2))
    values = RNG.normal(size=(40, 12)).astype(np.float32)
    number, before = len(model.weights), model(IDS).logits
    model.set_input_embeddings(values)
    assert model.config.vocab_size == 40 == model(IDS).logits.shape[-1] and len(model.weights) == number
    np.testing.assert_array_equal(model.get_input_embeddings().embeddings, values)
    assert model.weights[0] is model.transformer.wte.embeddings
    model.save_pretrained(tmp_path / "m")
    again = tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m")
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    other.set_output_embeddings(model.get_input_embeddings())  # two models with one embedding, tied in both
    assert other.get_output_embeddings() is other.transformer.wte is model.transformer.wte
    plain = keras.layers.Embedding(31, 12)
    plain.build()
    model.set_input_embeddings(plain)
    assert model.config.vocab_size == 31 and model(IDS).logits.shape == before.shape


def test_a_head_of_its_own_unties_and_ties_again(tmp_path):
    model = tfm.TFGPT2LMHeadModel(SMALL.replace())
    tied, number = model(IDS).logits, len(model.weights)
    head = keras.layers.Dense(31, use_bias=False, name="lm_head")
    head.build((None, 12))
    model.set_output_embeddings(head)
    assert not model.config.tie_word_embeddings and model.get_output_embeddings() is head
    found = model(IDS).logits
    assert np.abs(found - tied).max() > 1e-3
    model.save_pretrained(tmp_path / "m")
    np.testing.assert_array_equal(tfm.TFGPT2LMHeadModel.from_pretrained(tmp_path / "m")(IDS).logits, found)
    model.compile("sgd", run_eagerly=True)
    old = head.kernel.numpy()
    model.fit(IDS, IDS, verbose=0)
    assert np.abs(head.kernel - old).max() > 0
    model.set_output_embeddings(model.get_input_embeddings())
    assert model.config.tie_word_embeddings and len(model.weights) == number
    assert not np.array_equal(model(IDS).logits, found)


def test_what_is_no_embedding_or_head_is_one_sentence():
    model = tfm.TFGPT2LMHeadModel(SMALL.replace())
    with pytest.raises(InputError, match=r"embedding: expected shape \(any, 12\), found \(31, 13\)"):
        model.set_input_embeddings(np.zeros((31, 13), np.float32))
    head = keras.layers.Dense(31)
    head.build((None, 12))
    with pytest.raises(InputError, match="head: expected a layer without bias that computes in float32, found float32"):
        model.set_output_embeddings(head)
    with pytest.raises(InputError, match="set_output_embeddings: TFGPT2ForTokenClassification has no language-model"):
        tfm.TFGPT2ForTokenClassification(SMALL.replace()).set_output_embeddings(head)
