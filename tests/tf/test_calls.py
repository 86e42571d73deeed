"""The ways to call a TensorFlow model: arguments in every form, tf.function, XLA, and Keras' functional models."""

import re

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import tf as tfm
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.support import adapters, fixtures

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, num_labels=3, pad_token_id=0)
IDS = np.random.default_rng(5).integers(1, 31, (2, 7))
MASK = np.array([[1] * 7, [0] * 3 + [1] * 4])
CLASSES = [*adapters.classes(tfm).values()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls") / "m"
    fixtures.write_model(folder, SMALL, "lm")
    return tfm.TFGPT2LMHeadModel.from_pretrained(folder, param_dtype="float64")


@pytest.fixture(scope="module")
def expected(model):
    return model(input_ids=tf.constant(IDS), attention_mask=tf.constant(MASK)).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


FORMS = {
    "keywords": lambda m, i, a: m(input_ids=i, attention_mask=a),
    "in order": lambda m, i, a: m(i, None, a),
    "a name beside the ids": lambda m, i, a: m(i, attention_mask=a),
    "a dict": lambda m, i, a: m({"input_ids": i, "attention_mask": a}),
    "a dict and a name": lambda m, i, a: m({"input_ids": i}, attention_mask=a),
    "a dict with nothing": lambda m, i, a: m({"input_ids": i, "attention_mask": a, "position_ids": None}),
    "a list": lambda m, i, a: m([i, None, a]),
    "a list without a past": lambda m, i, a: m([i, a]),
    "a tuple": lambda m, i, a: m((i, None, a)),
    "a list and a name": lambda m, i, a: m([i], attention_mask=a),
}
KINDS = {
    "int64": lambda x: tf.constant(x, tf.int64),
    "int32": lambda x: tf.constant(x, tf.int32),
    "variable": lambda x: tf.Variable(x),
    "numpy int32": lambda x: x.astype(np.int32),
    "numpy int64": lambda x: x,
    "keras": lambda x: keras.ops.convert_to_tensor(x),
    "lists": lambda x: x.tolist(),
    "tuples": lambda x: tuple(map(tuple, x.tolist())),
    "rows": lambda x: list(x),
}


IN_A_LIST = {"a list", "a list without a past", "a tuple", "a list and a name"}
OTHER_CALLS = {"lists": IN_A_LIST, "tuples": IN_A_LIST, "rows": {*IN_A_LIST, "in order", "a name beside the ids"}}
CALLS = [(form, kind) for form in FORMS for kind in KINDS if form not in OTHER_CALLS.get(kind, ())]


@pytest.mark.parametrize(("form", "kind"), CALLS)
def test_every_form_of_every_kind_is_the_same_call(form, kind, model, expected):
    found = FORMS[form](model, KINDS[kind](IDS), KINDS[kind](MASK)).logits
    assert_close(found, expected)


@pytest.mark.parametrize("kind", ["tf", "np", None])
def test_what_the_tokenizer_returns_is_a_call(kind):
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    model = tfm.TFGPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1, n_head=1, vocab_size=len(tokenizer)))
    tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(["Hello, world", "a b c d e f g"], padding=True, return_tensors=kind)
    logits = model(encoded).logits
    assert logits.shape == (2, len(encoded["input_ids"][0]), len(tokenizer))
    assert np.array_equal(logits, model(**encoded).logits)


def test_a_list_may_have_no_past_and_a_past_may_be_stacked(model, expected):
    ids, mask = tf.constant(IDS), tf.constant(MASK)
    assert_close(model([ids, mask, ids]).logits, model(ids, attention_mask=mask, token_type_ids=ids).logits)
    past = model([ids[:, :5], mask[:, :5]]).past_key_values
    stacked = tuple(tf.stack(pair[:2]) for pair in past)
    for given in (past, stacked, [past[0], stacked[1]]):
        assert_close(model([ids[:, 5:], given, mask]).logits, expected[:, 5:])
    with pytest.raises(InputError, match=r"attention_mask: expected shape \(2, 7\)"):
        model([ids, tf.zeros((2, 3))])


def test_names_of_2019(model):
    logits, past = model(IDS[:, :5], past=None)
    loss, more, _ = model({"input_ids": IDS[:, 5:], "past": past}, lm_labels=IDS[:, 5:])
    now = model(IDS[:, 5:], past, labels=IDS[:, 5:])
    assert_close(more, now.logits)
    assert_close(loss, now.loss)
    assert list(now) == ["loss", "logits", "past_key_values"] and logits.shape == (2, 5, 31)
    with pytest.raises(TypeError, match="past is past_key_values under its old name; give one of the two"):
        model(IDS, past=past, past_key_values=past)


def test_lists_of_one_token_and_of_none(model):
    assert model([[5]]).logits.shape == (1, 1, 31)
    assert model([[]]).logits.shape == (1, 0, 31) and model([[], []]).logits.shape == (2, 0, 31)
    with pytest.raises(InputError, match=r"input_ids: expected shape \(any, any\), found \(0,\)"):
        model([])


BAD = {
    "ragged": (lambda m: m([[1, 2], [3]]), InputError, "input_ids: expected rows of numbers, all of one length; pad"),
    "a ragged mask": (lambda m: m(IDS, attention_mask=[[1], [1, 1]]), InputError, "attention_mask: expected rows of"),
    "words": (lambda m: m([["a", "b"]]), InputError, "input_ids: expected rows of numbers"),
    "a text": (lambda m: m("Hello"), InputError, "input_ids: expected a tensor, found str; the tokenizer makes one"),
    "nothing in a list": (lambda m: m([[1, None]]), InputError, "input_ids: expected rows of numbers"),
    "a number": (lambda m: m(5), InputError, "input_ids: expected a tensor, found int"),
    "labels of another kind": (lambda m: m(IDS, labels="x"), InputError, "labels: expected a tensor, found str"),
    "a huge id": (lambda m: m([[2**40]]), InputError, r"input_ids: the id 1099511627776 is outside the vocabulary"),
    "floats": (lambda m: m([[1.0, 2.0]]), InputError, "input_ids: expected integers, found float64"),
    "booleans": (lambda m: m(IDS > 3), InputError, "input_ids: expected integers, found bool"),
    "strings": (lambda m: m(tf.constant([["a"]])), InputError, "input_ids: expected integers, found string"),
    "a ragged tensor": (
        lambda m: m(tf.ragged.constant([[1], [2, 3]])),
        InputError,
        "input_ids: expected a tensor, found R",
    ),
    "a sparse tensor": (lambda m: m(tf.sparse.from_dense(IDS)), InputError, "input_ids: expected a tensor, found S"),
    "an unknown name": (
        lambda m: m(IDS, attention_maks=MASK),
        TypeError,
        r"TFGPT2LMHeadModel\(\) has no argument 'attention_maks'; did you mean 'attention_mask'\?",
    ),
    "an unknown key": (lambda m: m({"input_ids": IDS, "token_types": IDS}), TypeError, "did you mean 'token_type_ids'"),
    "twice": (lambda m: m(IDS, input_ids=IDS), TypeError, r"TFGPT2LMHeadModel\(\): input_ids is given twice"),
    "twice in a dict": (lambda m: m({"input_ids": IDS}, input_ids=IDS), TypeError, "input_ids is given twice"),
    "twice in a list": (lambda m: m([IDS, None, MASK], None, MASK), TypeError, "attention_mask is given twice"),
    "too many": (lambda m: m(*[None] * 18), TypeError, r"GPT2LMHeadModel\(\): expected at most 17 arguments"),
    "too many in a list": (lambda m: m([IDS] * 18), TypeError, "expected at most 17 arguments in order, found 18"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_one_sentence(name, model):
    call, kind, sentence = BAD[name]
    with pytest.raises(kind, match=sentence) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_a_bad_call_under_a_function_is_the_same_sentence(model):
    for jit in (None, True):
        run = tf.function(lambda ids, mask: model(ids, attention_mask=mask).logits, jit_compile=jit)
        with pytest.raises(InputError, match=r"^attention_mask: expected shape \(2, 7\).* a column for every token$"):
            run(IDS, MASK[:, :3])


def test_a_function_returns_the_output(model, expected):
    out = tf.function(model)(IDS, attention_mask=MASK, labels=IDS)
    eager = model(IDS, attention_mask=MASK, labels=IDS)
    assert type(out) is type(eager) and out.keys() == eager.keys() == ["loss", "logits", "past_key_values"]
    assert_close(out.logits, expected)
    assert_close(out.loss, eager.loss)
    assert isinstance(out.past_key_values, tfm.KVCache)
    assert_close(out.past_key_values[1][1], eager.past_key_values[1][1])


def test_a_cache_goes_into_a_function_and_out_of_it(model):
    step = tf.function(model)
    for past in (None, model.init_cache(2, 9)):
        whole = model(IDS).logits[:, 5:]
        past = step(IDS[:, :5], past).past_key_values
        assert_close(step(IDS[:, 5:], past).logits, whole)
        assert model(IDS[:, 5:], past).past_key_values.length == 7


@pytest.mark.parametrize("jit", [False, True])
def test_functions_of_any_shape(jit, model, expected):
    spec = tf.TensorSpec((None, None), tf.int32)

    @tf.function(input_signature=[spec, spec], jit_compile=jit)
    def run(ids, mask):
        out = model(ids, attention_mask=mask, labels=ids)
        return out.logits, out.loss, out.past_key_values

    logits, loss, _ = run(IDS.astype(np.int32), MASK.astype(np.int32))
    assert_close(logits, expected)
    assert_close(loss, model(IDS, attention_mask=MASK, labels=IDS).loss)
    logits, _, past = run(IDS[:1, :4].astype(np.int32), np.ones((1, 4), np.int32))
    assert_close(logits, model(IDS[:1, :4]).logits)
    assert len(past) == 2 and run.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_traced_with_unknown_shapes(cls):
    model = cls(SMALL, param_dtype="float64")
    ids = IDS[None] if cls.head == "double_heads" else IDS
    mask = MASK[None] if cls.head == "double_heads" else MASK
    spec = tf.TensorSpec([None] * ids.ndim, tf.int64)
    run = tf.function(lambda ids, mask: model(ids, attention_mask=mask), input_signature=[spec, spec])
    found, eager = run(ids, mask), model(ids, attention_mask=mask)
    for key in eager:
        if key != "past_key_values":
            assert_close(found[key], eager[key])


def test_one_compiled_function_serves_every_step(model):
    @tf.function(jit_compile=True)
    def step(ids, past):
        out = model(ids, past)
        return out.logits, out.past_key_values

    past, pieces = model.init_cache(2, 7), []
    for i in range(7):
        logits, past = step(tf.constant(IDS[:, i : i + 1]), past)
        pieces.append(logits)
    assert_close(tf.concat(pieces, 1), model(IDS).logits)
    assert step.experimental_get_tracing_count() == 1


def test_gradients_flow_through_a_compiled_function(model):
    variables = [variable.value for variable in model.trainable_variables]

    def gradients():
        with tf.GradientTape() as tape:
            loss = model(IDS, labels=IDS, training=False).loss
        return tape.gradient(loss, variables)

    for eager, compiled in zip(gradients(), tf.function(gradients, jit_compile=True)(), strict=True):
        assert_close(tf.convert_to_tensor(compiled), tf.convert_to_tensor(eager))


@pytest.mark.parametrize("kind", ["ids", "dict", "list", "keywords"])
def test_functional_models_of_keras(kind, model, expected):
    ids = keras.Input((None,), dtype="int64", name="input_ids")
    mask = keras.Input((None,), dtype="int64", name="attention_mask")
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "ids":
        whole = keras.Model(ids, model(ids).logits)
        assert_close(whole(IDS), model(IDS).logits)
        assert_close(whole.predict(IDS, verbose=0), model(IDS).logits)
        return
    out = {"dict": lambda: model(inputs), "list": lambda: model([ids, None, mask]), "keywords": lambda: model(**inputs)}
    whole = keras.Model(inputs, out[kind]().logits)
    assert_close(whole({"input_ids": IDS, "attention_mask": MASK}), expected)
    assert_close(whole.predict({"input_ids": IDS, "attention_mask": MASK}, verbose=0), expected)
    assert whole.output.shape == (None, None, 31)


def test_a_functional_model_trains_with_dropout():
    model = tfm.TFGPT2Model(SMALL.replace(resid_pdrop=0.5))
    ids = keras.Input((None,), dtype="int32")
    whole = keras.Model(ids, model(ids).last_hidden_state)
    assert np.array_equal(whole(IDS), whole(IDS)) and not np.array_equal(whole(IDS, training=True), whole(IDS))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of TensorFlow, with NumPy 2
def test_a_functional_model_with_a_head_of_its_own_is_saved(tmp_path):
    ids = keras.Input((None,), dtype="int32", name="input_ids")
    hidden = tfm.TFGPT2Model(SMALL, name="gpt2")(ids).last_hidden_state
    whole = keras.Model(ids, keras.layers.Dense(4)(hidden[:, -1]))
    whole.save(tmp_path / "m.keras")
    assert np.array_equal(keras.saving.load_model(tmp_path / "m.keras")(IDS), whole(IDS))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_summary_of_a_new_model_has_layers_shapes_and_counts(cls):
    model, printed = cls(SMALL.replace(tie_word_embeddings=False)), []
    model.summary(expand_nested=True, print_fn=printed.append)
    table = [[cell.strip(" \u2514") for cell in re.split("[|\u2502]", line)] for line in printed[0].splitlines()]
    rows = {cells[1].split(" (")[0]: cells[2:4] for cells in table if len(cells) == 5}
    assert rows["h_1"] == ["(None, None, 12)", f"{model.body().h[1].count_params():,}"]
    assert {"wte", "wpe", "drop", "h_0", "ln_f"} < set(rows) and f"Total params: {model.count_params():,}" in printed[0]
    assert "?" not in printed[0] and "unbuilt" not in printed[0]
    ids = IDS[None] if cls.head == "double_heads" else IDS
    logits = model(ids, attention_mask=tf.ones_like(ids))[model.logit_names[0]]
    assert len(model.output_shape) == len(logits.shape)
    assert all(said in (None, size) for said, size in zip(model.output_shape, logits.shape, strict=True))
    for layer in model.layers:
        if layer.name in ("lm_head", "score", "classifier"):
            assert rows[layer.name][0] == str(model.output_shape)


def test_keras_draws_a_model_or_says_what_that_takes(model, tmp_path):
    try:
        keras.utils.plot_model(model, tmp_path / "model.png")
    except ImportError as error:
        assert "pydot" in str(error) or "graphviz" in str(error)
    else:
        assert (tmp_path / "model.png").exists()


def test_outputs_by_name_position_and_unpacking(model):
    out = model(IDS, labels=IDS, output_hidden_states=True)
    assert out["logits"] is out.logits is out[1] and list(out) == out.keys()
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    assert loss.shape == () and logits.shape == (2, 7, 31)
    assert len(out.hidden_states) == 3 and out.attentions is None


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_return_dict_is_a_tuple_in_every_class(cls):
    model = cls(SMALL.replace(use_cache=False))
    ids = IDS[None] if cls.head == "double_heads" else IDS
    out, parts = model(ids), model(ids, return_dict=False)
    assert isinstance(parts, tuple) and len(parts) == len(out)
    assert all(np.array_equal(part, value) for part, value in zip(parts, out.values(), strict=True))


def test_floats_keep_their_digits_whatever_the_model_computes_in():
    model = tfm.TFGPT2ForSequenceClassification(SMALL.replace(num_labels=1), dtype="mixed_bfloat16")
    labels = np.array([1000.25, 1000.25])
    logits = model(IDS, attention_mask=MASK).logits.numpy().astype(np.float64)
    loss = model(IDS, attention_mask=MASK, labels=labels).loss
    assert float(loss) == pytest.approx(((logits[:, 0] - labels) ** 2).mean(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_embeddings_of_any_dtype(dtype, model):
    embeds = model.transformer.wte(IDS).numpy()
    found = model(inputs_embeds=embeds.astype(dtype)).logits
    assert np.abs(found - model(IDS).logits).max() < {"float16": 0.1, "float64": 1e-9}[dtype]
    assert found.dtype == tf.float64 and model(inputs_embeds=embeds.tolist()).logits.shape == (2, 7, 31)
