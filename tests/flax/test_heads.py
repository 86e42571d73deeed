"""The heads in Flax beyond parity: padding and pooling, losses, kinds of summary and of problems."""

from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
flax_linen = pytest.importorskip("flax.linen")

from gpt2_multi import flax
from gpt2_multi.errors import InputError
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from tests.support import adapters, fixtures
from tests.support.cases import PROBLEMS

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, num_labels=3)
RNG = np.random.default_rng(5)
IDS = RNG.integers(2, 31, (3, 9))
MASK = np.array([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])
OFF = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
CLASSES = adapters.classes(flax)


@pytest.fixture
def load(tmp_path):
    """A function that gives a randomised model of a head in float64, and its weights."""

    def run(head, config=SMALL, **options):
        arrays = fixtures.write_model(tmp_path / "m", config, head)
        return CLASSES[head].from_pretrained(tmp_path / "m", **{"param_dtype": "float64", **options}), arrays

    return run


@pytest.fixture
def both(load):
    """A function that gives the output of a head in float64, and the oracle's."""

    def run(head, inputs, config=SMALL, **options):
        model, arrays = load(head, config, **options)
        return model(**inputs), reference.outputs(config, arrays, head, inputs)

    return run


def assert_same(found, expected, keys):
    for key in keys:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-9, err_msg=key)


def test_padding_counts_neither_as_label_nor_as_predictor(load):
    model, arrays = load("lm")
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    found = model(**inputs)
    assert_same(found, reference.outputs(SMALL, arrays, "lm", inputs), ["loss"])
    labels = np.where(MASK == 0, -100, IDS)
    labels[2, 3] = -100  # the first real token: what predicts it is padding
    assert float(model(**inputs | {"labels": labels}).loss) == float(found.loss)


def test_the_loss_of_a_batch_is_that_of_its_rows_alone(load):
    model, _ = load("lm")
    rows = [IDS[0], IDS[1, :5], IDS[2, 3:]]
    losses = [float(model(r[None], labels=r[None]).loss) for r in rows]
    together = model(IDS, attention_mask=MASK, labels=IDS).loss
    assert float(together) == pytest.approx(np.average(losses, weights=[len(r) - 1 for r in rows]), abs=1e-9)


def test_no_counted_label_is_a_loss_of_zero(load):
    for head in ("lm", "token_classification"):
        model, _ = load(head)

        def loss(params, model=model):
            return model(IDS, params=params, labels=np.full_like(IDS, -100)).loss

        value, grads = jax.value_and_grad(loss)(model.params)
        assert float(value) == 0 and all((grad == 0).all() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_are_computed_in_float32_at_least(dtype, load):
    ids = np.random.default_rng(0).integers(0, 31, (64, 24))
    exact = float(load("lm")[0](ids, labels=ids).loss)
    model, _ = load("lm", param_dtype=dtype)
    loss = model(ids, labels=ids).loss
    assert loss.dtype == "float32" and abs(float(loss) - exact) < 0.02 * exact


@pytest.fixture
def chunked(load, monkeypatch):
    """A function that gives a module whose loss has chunks of two tokens, its parameters, and labels."""
    monkeypatch.setattr("gpt2_multi.flax.training.losses.CHUNK", (2 * 3 * 31 * 8,) * 2)
    labels = np.where(RNG.random(IDS.shape) < 0.3, -100, IDS)

    def run(**settings):
        model, _ = load("lm", SMALL.replace(**OFF, **settings))
        return model, labels

    return run


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_chunks_is_that_of_all_logits(tied, chunked):
    model, labels = chunked(tie_word_embeddings=tied)

    def loss(params, skip, labels=labels, mask=None, ids=IDS):
        return 3 * model(ids, attention_mask=mask, labels=labels, params=params, skip_logits=skip).loss

    @partial(jax.jit, static_argnums=0)
    def derivatives(skip, *given):
        def one(params):
            return jax.value_and_grad(loss)(params, skip, *given)

        return one(model.params), jax.jvp(one, (model.params,), (model.params,))[1]

    for given in ((labels, np.ones_like(MASK)), (labels, MASK), (np.full_like(IDS, -100), MASK)):
        found, expected = derivatives(None, *given), derivatives(False, *given)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), found, expected)
    assert loss(model.params, True, labels[:0], None, IDS[:0]) == 0
    each = jax.vmap(lambda ids, labels: loss(model.params, True, labels[None], None, ids[None]))(IDS[:1], labels[:1])
    np.testing.assert_allclose(each[0], loss(model.params, False, labels[:1], None, IDS[:1]), rtol=0, atol=1e-12)


def test_a_compiled_loss_never_has_all_logits_of_a_head_that_is_ours(chunked):
    model, labels = chunked()

    def step(params):
        return jax.value_and_grad(lambda params: model(IDS, labels=labels, params=params).loss)(params)

    def has_all(text):
        return any(f"f64[{shape},31]" in text for shape in ("3,9", "27", "9,3"))

    assert not has_all(jax.jit(step).lower(model.params).compile().as_text())
    with flax_linen.intercept_methods(lambda call, args, kwargs, context: call(*args, **kwargs)):
        assert has_all(jax.jit(lambda params: step(params)).lower(model.params).compile().as_text())
    assert np.isclose(jax.jit(step)(model.params)[0], model(IDS, labels=labels).loss, rtol=0, atol=1e-12)
    for tied in (True, False):  # not even before `jit` leaves out what nobody reads
        model, labels = chunked(tie_word_embeddings=tied)
        skipping = jax.make_jaxpr(partial(model, labels=labels, skip_logits=True))(jax.numpy.asarray(IDS))
        assert "f64[3,2,31]" in str(skipping) and not has_all(str(skipping))
    found, whole = model(IDS, labels=labels), model(IDS, labels=labels, skip_logits=True)
    assert found.logits.shape == (3, 9, 31) and whole.logits is None and np.isclose(found.loss, whole.loss)
    with pytest.raises(InputError, match="skip_logits: expected labels"):
        model(IDS, skip_logits=True)


def test_a_loss_is_that_of_the_head_as_it_is_now(chunked, monkeypatch):
    model, labels = chunked()
    before, attend = model(IDS, labels=labels, skip_logits=True).loss, flax_linen.Embed.attend
    monkeypatch.setattr(flax_linen.Embed, "attend", lambda self, x: -attend(self, x))
    found, whole = (model(IDS, labels=labels, skip_logits=skip).loss for skip in (True, False))
    assert np.isclose(found, whole, rtol=0, atol=1e-12) and not np.isclose(found, before)


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


def test_without_a_mask_the_pad_token_finds_the_end(load):
    ids = IDS.copy()
    ids[1, 5:] = 0
    model, arrays = load("sequence_classification")
    with pytest.raises(InputError, match=r"cannot tell where each of 3 rows ends: give attention_mask, or set"):
        model(ids)
    model.config.pad_token_id = 0
    expected = reference.outputs(model.config, arrays, "sequence_classification", {"input_ids": ids})
    assert_same(model(ids), expected, ["logits"])


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


def test_summaries_without_a_projection(load):
    for change in ({"summary_use_proj": False}, {"summary_proj_to_labels": False}):
        model, _ = load("double_heads", SMALL.replace(**change))
        assert model(IDS[None]).mc_logits.shape == (1, 3, 12)


def test_summary_dropout_acts_in_training_alone(load):
    model, _ = load("double_heads", SMALL.replace(summary_first_dropout=0.5, **OFF))
    still = model(IDS[None]).mc_logits
    first, second = (model(IDS[None], train=True, dropout_rng=jax.random.key(i)).mc_logits for i in (0, 1))
    assert not np.array_equal(first, second) and not np.array_equal(first, still)
    assert np.array_equal(model(IDS[None]).mc_logits, still)


def test_the_token_classifier_s_dropout_comes_from_the_file(load):
    shares = {}
    for given in (None, 0.7):
        config = SMALL.replace(**OFF, extra={} if given is None else {"classifier_dropout": given})
        model, _ = load("token_classification", config)
        key = jax.random.key(0)
        shares[given] = np.abs(model(IDS, train=True, dropout_rng=key).logits - model(IDS).logits).mean()
    assert 0 < shares[None] < shares[0.7]


def test_answers_beyond_the_text_do_not_count(both):
    inputs = {"input_ids": IDS, "start_positions": np.array([1, 99, 3]), "end_positions": np.array([9, 2, -1])}
    assert_same(*both("question_answering", inputs), ["start_logits", "end_logits", "loss"])


def test_double_heads_ask_for_choices(load):
    model, arrays = load("double_heads")
    with pytest.raises(InputError, match=r"expected 3 dimensions \(batch, choices, length\), found shape \(3, 9\)"):
        model(IDS)
    with pytest.raises(InputError, match=r"mc_token_ids: expected shape \(1, 3\)"):
        model(IDS[None], mc_token_ids=[1, 2, 3])
    with pytest.raises(InputError, match=r"mc_token_ids: the index 9 is outside the text \(0 to 8\)"):
        model(IDS[None], mc_token_ids=[[1, 2, 9]])
    with pytest.raises(InputError, match=r"mc_token_ids: expected integers"):
        model(IDS[None], mc_token_ids=[[1.0, 2, 8]])
    with pytest.raises(InputError, match=r"labels: 3 is not a class \(0 to 2, or -100\)"):
        model(IDS[None], mc_labels=[3])
    given = {"input_ids": IDS[None], "mc_token_ids": np.array([[1, 2, 8]])}
    expected = reference.outputs(SMALL, arrays, "double_heads", given)
    assert_same(model(**given), expected, ["mc_logits"])
    embeds = {"inputs_embeds": arrays["wte.weight"][IDS[None]], "mc_token_ids": given["mc_token_ids"]}
    assert_same(model(**embeds), expected, ["mc_logits"])


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("head", ["double_heads", "sequence_classification", "token_classification"])
def test_heads_with_scanned_layers_and_in_pieces(head, scanned, load):
    model, _ = load(head, scan_layers=scanned, remat="dots_saveable")
    ids, mask = (IDS[None], MASK[None]) if head == "double_heads" else (IDS, MASK)
    whole = model(ids, attention_mask=mask)
    plain, _ = load(head)
    np.testing.assert_allclose(plain(ids, attention_mask=mask).logits, whole.logits, rtol=0, atol=1e-9)
    if head == "sequence_classification":
        cache = model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=model.init_cache(3, 9)).past_key_values
        last = model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
        np.testing.assert_allclose(last.logits, whole.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("head", "inputs", "sentence"),
    [
        ("token_classification", {"labels": IDS[:, :4] % 3}, r"labels: expected shape \(3, 9\)"),
        ("token_classification", {"labels": IDS + 5}, r"labels: \d+ is not a class \(0 to 2, or -100\)"),
        ("token_classification", {"labels": IDS * 0.5}, r"labels: expected integers, found float64"),
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
        ("question_answering", {"start_positions": [1, 2], "end_positions": [1, 2]}, r"expected shape \(3,\)"),
    ],
)
def test_bad_labels_are_one_sentence(load, head, inputs, sentence):
    model, _ = load(head)
    with pytest.raises(InputError, match=sentence):
        model(IDS, **inputs)


@pytest.mark.parametrize(("head", "shape"), [("sequence_classification", (2, 0)), ("double_heads", (2, 2, 0))])
def test_a_text_without_a_token_has_no_last_one(head, shape, load):
    model, _ = load(head)
    with pytest.raises(InputError, match="a text has no token to look at; give at least one"):
        model(np.zeros(shape, int), attention_mask=np.zeros(shape))
