"""What a call brings is compiled into TensorFlow's loop: once for the same functions, anew for others, and exported."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf import TFGPT2LMHeadModel
from gpt2_multi.tf.generation.decoders import KEPT
from tests.support import fixtures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2

SMALL = GPT2Config(vocab_size=30, n_positions=40, n_embd=8, n_layer=1, n_head=2, eos_token_id=None, bos_token_id=3)
IDS, MASK = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
GRAPH = {"max_new_tokens": 6, "jit_compile": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model."""
    where = tmp_path_factory.mktemp("small")
    fixtures.write_model(where, SMALL, "lm")
    return where


@pytest.fixture(scope="module")
def model(folder):
    """The same in TensorFlow."""
    return TFGPT2LMHeadModel.from_pretrained(folder, param_dtype="float64")


class Liking:
    """A processor that likes a token, and counts how often it is traced."""

    def __init__(self, token):
        self.token, self.traced = token, 0

    def __call__(self, ids, logits, length):
        self.traced += 1
        return logits + tf.one_hot(self.token, 30, 1e3, dtype=logits.dtype)


def test_the_same_function_is_traced_once_and_another_is_never_taken_for_it(model):
    likings, plain = [Liking(token) for token in range(4, 4 + KEPT + 1)], model.generate(IDS, **GRAPH).numpy()
    for length in (5, 3, 4):
        found = model.generate(IDS[:, :length], logits_processor=[likings[0]], **GRAPH).numpy()
        assert (found[:, length:] == 4).all() and likings[0].traced == 1
    decoders = model.__dict__["_decoders"]
    for liking in likings:
        assert (model.generate(IDS, logits_processor=[liking], **GRAPH).numpy()[:, 5:] == liking.token).all()
        assert sum(not one.is_plain for one in decoders.values()) <= KEPT
    assert np.array_equal(model.generate(IDS, **GRAPH), plain)
    counts = [one.decode.experimental_get_tracing_count() for one in decoders.values() if one.is_plain]
    assert counts == [1] and [liking.traced for liking in likings] == [1] * len(likings)


def test_xla_compiles_functions_of_the_caller_too(model):
    def allowed(prompt, ids, length):
        return tf.range(30) % 3 == (ids[length - 1] + prompt) % 3

    def over(ids, logits, length):
        return ids[:, length - 1] % 5 == 0

    given = {"prefix_allowed_tokens_fn": allowed, "stopping_criteria": over, "logits_processor": Liking(7)}
    found = model.generate(IDS, MASK, max_new_tokens=6, **given)
    assert np.array_equal(found, model.generate(IDS, MASK, **given, **GRAPH))


def test_python_code_is_reached_by_a_py_function(model):
    seen = []

    def noted(ids, length):
        seen.append(ids[:, : int(length)].numpy().tolist())
        return np.zeros(ids.shape[0], bool)

    def over(ids, logits, length):
        return tf.ensure_shape(tf.py_function(noted, [ids, length], tf.bool), (2,))

    found = model.generate(IDS, stopping_criteria=[over], **GRAPH)
    assert seen[-1] == found.numpy().tolist() and len(seen) == 6


def test_an_assistant_that_agrees_saves_steps_of_the_model(folder):
    model, steps = TFGPT2LMHeadModel.from_pretrained(folder, param_dtype="float64"), tf.Variable(0)
    twin, call = TFGPT2LMHeadModel.from_pretrained(folder, param_dtype="float64"), model.call

    def counted(*given, **named):
        steps.assign_add(1)
        return call(*given, **named)

    model.call, found = counted, {}
    for name, assistant in (("alone", None), ("helped", twin)):
        steps.assign(0)
        options = {"max_new_tokens": 13, "num_assistant_tokens": 3, "jit_compile": False, "do_sample": True, "seed": 2}
        found[name] = model.generate(IDS[:1], assistant_model=assistant, **options).numpy(), int(steps)
    assert np.array_equal(found["alone"][0], found["helped"][0])
    assert found["alone"][1] == 14 and found["helped"][1] <= 6  # the prompt, and 4 tokens in each step after it


def test_what_a_call_brings_is_traced_into_another_function(model):
    ids, mask, types = map(tf.constant, (IDS, MASK, IDS[:, ::-1].copy()))
    embeds, negative = tf.gather(model.transformer.wte.embeddings, IDS[::-1]), tf.constant([[7, 8], [9, 0]])
    liking = Liking(5)

    def calls(ids, mask, types, embeds, negative):
        yield model.generate(ids, mask, token_type_ids=types, logits_processor=[liking], **GRAPH)
        yield model.generate(None, mask, inputs_embeds=embeds, **GRAPH)
        yield model.generate(ids, mask, guidance_scale=1.6, negative_prompt_ids=negative, num_beams=2, **GRAPH)

    traced = tf.function(lambda *given: list(calls(*given)), autograph=False)
    given = ids, mask, types, embeds, negative
    for found, expected in zip(traced(*given), calls(*given), strict=True):
        assert np.array_equal(found, expected)
    open_ended = tf.function(
        lambda ids: model.generate(ids, guidance_scale=1.6, **GRAPH),
        input_signature=[tf.TensorSpec((None, None), tf.int64)],
        autograph=False,
    )
    assert np.array_equal(open_ended(ids), model.generate(ids, guidance_scale=1.6, **GRAPH))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_time": 1.0}, "max_time: cannot be traced into another function"),
        ({"past_key_values": "cache"}, "past_key_values: cannot be traced into another function"),
        ({"assistant_model": "model"}, "assistant_model: cannot be traced into another function"),
    ],
)
def test_what_cannot_be_traced_is_named(model, given, sentence):
    values = {"cache": model(IDS).past_key_values, "model": model}
    given = {name: values.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(InputError, match=sentence):
        tf.function(lambda ids: model.generate(ids, **given, **GRAPH), autograph=False)(tf.constant(IDS))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prefix_allowed_tokens_fn": lambda *_: [1, 2]}, r"prefix_allowed_tokens_fn: expected booleans \(30,\)"),
        ({"logits_processor": lambda ids, x, n: x[:, :3]}, r"logits_processor: expected shape \(2, 30\)"),
        (
            {"sliding_window": True, "output_attentions": True, "return_dict_in_generate": True},
            "sliding_window: cannot be used with output_hidden_states",
        ),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(model, given, sentence):
    with pytest.raises(InputError, match=sentence):
        model.generate(IDS, **given, **GRAPH)
    assert tf.compat.v1.get_variable_scope().caching_device is None  # or models could not be trained by recomputing


def test_a_cache_of_other_rows_is_refused(model):
    past = model(IDS[:, :3]).past_key_values
    with pytest.raises(InputError, match="past_key_values: made for 2 rows in float64, but the input has 1 rows"):
        model.generate(IDS[:1], past_key_values=past, **GRAPH)
    for empty in (model.init_cache(2, 20), past):
        found = model.generate(IDS, past_key_values=empty, **GRAPH)
        assert np.array_equal(found, model.generate(IDS, **GRAPH))


def test_a_saved_model_is_guided_and_has_no_clock(model, tmp_path):
    options = {"guidance_scale": 1.6, "do_sample": True, "typical_p": 0.5, "max_new_tokens": 6, "seed": 3}
    model.export_saved_model(tmp_path / "saved", **options)
    ids, mask = tf.constant(IDS, tf.int32), tf.constant(MASK, tf.int32)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    found = loaded.generate(ids, mask)["ids"]
    assert np.array_equal(found[:, 5:], model.generate(IDS, MASK, jit_compile=False, **options)[:, 5:])
    with pytest.raises(InputError, match="max_time: cannot be traced into another function"):
        model.export_saved_model(tmp_path / "timed", max_time=1.0, max_new_tokens=4)
