"""Generation in TensorFlow: recorded tokens, the specification's rules, padding, counts of traces, bad input."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import keras

from gpt2_multi.errors import InputError
from gpt2_multi.generation import rules as spec
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf import TFGPT2DoubleHeadsModel, TFGPT2LMHeadModel
from gpt2_multi.tf.generation import cpu_kernels, rules
from gpt2_multi.tf.generation.decoders import Decoders
from gpt2_multi.tf.generation.tracing import counted
from tests.support import fixtures
from tests.support.cases import SAMPLING
from tests.support.effort import THOROUGH

RECORDED = {key: tf.constant(value) for key, value in fixtures.reference("lm").items()}
SAMPLES = fixtures.read_safetensors(fixtures.DATA / "lm" / "sampling.safetensors")
END = int(RECORDED["gen.eos"][0])


def equal(found, expected):
    return np.array_equal(found.numpy(), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "options"),
    [("greedy", {}), ("greedy_eos", {}), ("min_new_12_eos", {"min_new_tokens": 12})],
)
def test_greedy_tokens_equal_the_recorded(model, name, options, jit):
    end = END if name != "greedy" else None
    options = options | {"max_new_tokens": 20, "eos_token_id": end, "jit_compile": jit}
    found = model.generate(RECORDED["gen.input_ids"], RECORDED["in.mask_left"], **options)
    assert equal(found, RECORDED[f"gen.{name}"])


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("greedy", {}), ("repetition_1.3", {"repetition_penalty": 1.3}), ("no_repeat_2", {"no_repeat_ngram_size": 2})],
)
def test_a_row_alone_equals_the_recorded_and_the_row_in_a_batch(model, name, options, row, jit):
    recorded = RECORDED[f"gen_alone.{name}.{row}"]
    options = options | {"max_new_tokens": 20, "eos_token_id": None, "jit_compile": jit}
    assert equal(model.generate(recorded[:, :-20], **options), recorded)
    batch = model.generate(RECORDED["gen.input_ids"], RECORDED["in.mask_left"], **options)
    assert equal(batch[row, -20:], recorded[0, -20:])


@pytest.mark.parametrize("seed", [0, 12345678901])
@pytest.mark.parametrize("case", SAMPLING)
def test_samples_equal_the_recorded(model, case, seed, jit):
    options = {"top_k": 0, "do_sample": True, "seed": seed, **SAMPLING[case], "jit_compile": jit}
    found = model.generate(
        SAMPLES["input_ids"], SAMPLES["attention_mask"], max_new_tokens=20, eos_token_id=None, **options
    )
    assert equal(found, SAMPLES[f"{case}.seed_{seed}"])


def test_eager_equals_graph_and_xla_on_a_ragged_batch(model, eager):
    for case in ("plain", "all"):
        options = {"top_k": 0, "do_sample": True, **SAMPLING[case], "max_new_tokens": 5, "eos_token_id": None}
        found = model.generate(SAMPLES["input_ids"], SAMPLES["attention_mask"], **options)
        assert equal(found, SAMPLES[f"{case}.seed_0"][:, :22])
    found = model.generate(RECORDED["gen.input_ids"], RECORDED["in.mask_left"], max_new_tokens=5, eos_token_id=END)
    assert equal(found, RECORDED["gen.greedy_eos"][:, :22])


def test_generation_traced_into_another_function_gives_the_same(exact):
    ids, mask = RECORDED["gen.input_ids"], RECORDED["in.mask_left"]

    @tf.function
    def outer(ids, mask):
        return exact.generate(ids, mask, max_new_tokens=20, eos_token_id=None)

    assert equal(outer(ids, mask), RECORDED["gen.greedy"])


def test_another_prompt_of_the_bucket_and_other_options_trace_nothing():
    fresh = TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"))
    rng = np.random.default_rng(0)
    calls = [
        {"max_new_tokens": 16},
        {"max_new_tokens": 3},
        {"max_new_tokens": 12, "do_sample": True, "seed": 2**64 - 1},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.4, "do_sample": True, "max_new_tokens": 9},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_length": 20, "max_length": 30},
        {"eos_token_id": 5, "pad_token_id": 7, "min_new_tokens": 2, "max_new_tokens": 8},
    ]
    for number, options in enumerate(calls):
        fresh.generate(rng.integers(0, 500, (2, 17 + number)), **options)
    ways = [Decoders.of(fresh, jit) for jit in (True, False)]
    counts = [part.experimental_get_tracing_count() for way in ways for part in (way.prefill, way.decode)]
    assert counts == [1, 1, 0, 0]
    fresh.generate(rng.integers(0, 500, (2, 33)), max_new_tokens=16)
    assert ways[0].prefill.experimental_get_tracing_count() == ways[0].decode.experimental_get_tracing_count() == 2


if THOROUGH:  # tests/tf/test_heads.py asks the same of the shapes alone

    def test_a_graph_with_a_head_for_choices_serves_another_bucket_after_the_first():
        model = TFGPT2DoubleHeadsModel(GPT2Config(vocab_size=9, n_positions=64, n_embd=8, n_layer=1, n_head=2))
        for length in (3, 20):
            ids = np.arange(length)[None] % 9
            found = model.generate(ids, max_new_tokens=2, eos_token_id=None, jit_compile=False).numpy()
            for place in (length, length + 1):
                logits = model(found[:, None, :place]).logits.numpy()[0, 0, -1]
                assert found[0, place] == logits.argmax()


def test_a_flat_cache_gives_what_others_give(exact):
    ids, room = RECORDED["gen.input_ids"], exact.init_cache(len(RECORDED["gen.input_ids"]), 9)
    cache = exact(ids[:, :3], past_key_values=room).past_key_values
    for new in (ids[:, 3:4], ids[:, 3:6]):
        found, expected = (exact(new, past_key_values=past) for past in (cache.flat(), cache))
        assert found.past_key_values.is_flat
        assert np.allclose(found.logits, expected.logits, rtol=0, atol=1e-12)
        pairs = zip(found.past_key_values.of_rows(len(ids)), expected.past_key_values, strict=True)
        assert all(np.allclose(x, y, rtol=0, atol=1e-12) for layers in pairs for x, y in zip(*layers, strict=True))


@pytest.mark.parametrize("width", [12, 7])
def test_parts_of_a_kernel_make_its_product(width, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "threads", lambda: 4)
    layer = keras.layers.Dense(5, activation="tanh", bias_initializer="normal", dtype="float64")
    multiplied, split = [], cpu_kernels.multiply
    monkeypatch.setattr(cpu_kernels, "multiply", lambda *given: multiplied.append(0) or split(*given))
    for rows in (1, 2):
        x = tf.random.normal((rows, 1, width), dtype=tf.float64)
        expected = layer(x)
        with cpu_kernels.multiplied_in_parts(layer):
            assert np.allclose(layer(x), expected, rtol=0, atol=1e-14)
        assert np.array_equal(layer(x), expected)
    assert len(multiplied) == 2
    layer.dtype_policy, x = "bfloat16", tf.cast(x[:1], tf.bfloat16)
    with cpu_kernels.multiplied_in_parts(layer, layer):  # of a narrow sum each part would be rounded
        assert np.array_equal(cpu_kernels.multiply(layer, x), layer(x))


def test_layers_that_do_more_than_keras_dense_ones_are_no_plain_ones(monkeypatch):
    made = keras.layers.Dense(4)
    made.build((None, 8))
    assert cpu_kernels.is_plain(made)
    own, quantized = keras.layers.Dense(4), keras.layers.Dense(4, dtype="int8_from_float32")
    own.call = lambda x: x
    others = [own, quantized, type("Own", (keras.layers.Dense,), {})(4), keras.layers.Dropout(0.1)]
    assert not any(map(cpu_kernels.is_plain, others))
    monkeypatch.setattr(keras.layers.Dense, "call", lambda self, x: x)
    assert not cpu_kernels.is_plain(made)


def test_padding_may_stand_on_either_side_and_in_the_middle(exact):
    ids = RECORDED["gen.input_ids"].numpy()[:1, -6:]
    options = {"max_new_tokens": 8, "eos_token_id": None, "jit_compile": False}
    alone = exact.generate(ids, **options)[:, 6:]
    for where in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [0, 2, 3, 5, 6, 8]):
        padded, mask = np.full((1, 9), 11), np.zeros((1, 9), int)
        padded[0, where], mask[0, where] = ids[0], 1
        assert equal(exact.generate(padded, mask, **options)[:, 9:], alone)


def test_sequences_of_one_prompt_are_the_rows_of_the_seed(exact):
    ids = RECORDED["gen.input_ids"][:2]
    options = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None, "jit_compile": False}
    many = exact.generate(ids, num_return_sequences=3, seed=5, **options)
    for row in range(6):
        alone = exact.generate(ids[row // 3][None], seed=5 + row, **options)
        assert equal(many[row], alone[0])
    assert len({tuple(row.tolist()) for row in many.numpy()[:3]}) == 3


def test_streamed_columns_are_what_generate_appends(model, jit):
    options = {"max_new_tokens": 5, "eos_token_id": None, "jit_compile": jit}
    ids = RECORDED["gen.input_ids"]
    columns = list(model.stream_tokens(ids, RECORDED["in.mask_left"], **options))
    assert equal(tf.stack(columns, 1), model.generate(ids, RECORDED["in.mask_left"], **options)[:, -5:])


def test_finished_rows_are_filled_and_the_loop_ends_with_the_last(exact):
    ids = RECORDED["gen.input_ids"]
    options = {"max_new_tokens": 40, "jit_compile": False}
    ends = {"eos_token_id": [END, 502], "pad_token_id": 9}
    found = exact.generate(ids, RECORDED["in.mask_left"], **ends, **options).numpy()
    for row in found[:, 17:]:
        ends = (row == END).nonzero()[0]
        assert not len(ends) or (row[ends[0] + 1 :] == 9).all()
    greedy = exact.generate(ids[:1], eos_token_id=None, **options)
    stop = int(greedy[0, 19])
    assert exact.generate(ids[:1], eos_token_id=stop, **options).shape[1] <= 20
    assert len(list(exact.stream_tokens(ids[:1], eos_token_id=stop, **options))) <= 3


def test_defaults_come_from_the_model_and_options_win(usual):
    assert usual.generation_config.eos_token_id == 0 and usual.generation_config.pad_token_id == 1
    ids = RECORDED["gen.input_ids"]
    assert usual.generate(ids, eos_token_id=None).shape[1] == 37
    assert usual.generate(ids, max_new_tokens=0).shape[1] == 17
    own = GenerationConfig(max_new_tokens=3)
    assert usual.generate(ids, generation_config=own).shape[1] == 20
    assert usual.generate(ids, generation_config=own, max_new_tokens=2).shape[1] == 19


@pytest.mark.parametrize("kind", [np.int32, np.int64, list])
def test_ids_of_any_kind_give_ids_of_their_dtype(usual, kind):
    ids = RECORDED["gen.input_ids"].numpy()
    given = ids.tolist() if kind is list else ids.astype(kind)
    found = usual.generate(given, max_new_tokens=2, eos_token_id=None)
    assert found.dtype == (tf.int32 if kind is not np.int64 else tf.int64) and equal(found[:, :17], ids)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_low_precision_generates_what_its_own_logits_say(policy):
    storage = {"param_dtype": policy} if not policy.startswith("mixed") else {"dtype": policy}
    model = TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), **storage)
    ids, mask = RECORDED["gen.input_ids"], RECORDED["in.mask_left"]
    found = model.generate(ids, mask, max_new_tokens=4, eos_token_id=None, jit_compile=False)
    mask = tf.concat([mask, tf.ones((3, 4), mask.dtype)], 1)
    logits = tf.cast(model(found, attention_mask=mask).logits, tf.float32).numpy()
    for place in range(17, 21):  # the cache rounds elsewhere, so the choice is near the best, not always the best
        best = logits[:, place - 1].max(-1)
        chosen = logits[np.arange(3), place - 1, found.numpy()[:, place]]
        assert (best - chosen <= 0.05 * np.abs(logits).max()).all()


@pytest.mark.parametrize("jit", [True, False], ids=["xla", "graph"])
def test_cross_attention_generates_with_an_encoder(jit):
    rng = np.random.default_rng(0)
    config = GPT2Config(
        vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, add_cross_attention=True, initializer_range=0.5
    )
    model = TFGPT2LMHeadModel(config, param_dtype="float64")
    ids, states = rng.integers(0, 31, (2, 4)), rng.normal(size=(2, 5, 12))
    options = {"encoder_hidden_states": states, "encoder_attention_mask": [[1] * 5, [1, 1, 0, 0, 0]]}
    found = model.generate(ids, max_new_tokens=6, eos_token_id=None, jit_compile=jit, **options).numpy()
    for length in range(4, 10):
        step = model(found[:, :length], **options).logits[:, -1].numpy().argmax(-1)
        assert (step == found[:, length]).all()


def top(rule, logits, limit):
    """Logits after a rule that looks at the greatest ones first."""
    return rule(logits, rules.first_few(logits), limit)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", ["top_k", "top_p", "penalty", "repeats"])
def test_rules_equal_the_specification(rule, dtype):
    rng = np.random.default_rng(7)
    for turn in range(30):
        words = (40, 160)[turn % 2]  # fewer than are put in order, and more
        logits = np.round(rng.normal(0, 3, (4, words)), 1).astype(dtype)  # rounded, so that there are ties and zeros
        ids = rng.integers(0, 6, (4, 12)).astype(np.int32)
        mask = np.sort(rng.random((4, 12)) > 0.3)
        mask[:, -2:] = True
        rows = list(zip(logits, ids, mask, strict=True))
        if rule == "top_k":
            k = int(rng.integers(1, 100))
            found, expected = top(rules.keep_top_k, tf.constant(logits), k), spec.keep_top_k(logits, k)
        elif rule == "top_p":
            p = float(rng.uniform(0.01, 0.99))
            found, expected = top(rules.keep_top_p, tf.constant(logits), p), spec.keep_top_p(logits, p)
        elif rule == "penalty":
            found = rules.penalise(*map(tf.constant, (logits, ids, mask)), 1.7)
            expected = [spec.penalise(a, b[m], 1.7) for a, b, m in rows]
        else:
            size = int(rng.integers(1, 4))
            found = rules.ban_repeats(*map(tf.constant, (logits, ids, mask)), 12, size)
            expected = [spec.ban_repeats(a, b[m], size) for a, b, m in rows]
        np.testing.assert_allclose(found.numpy(), np.stack(list(expected)), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 + 7, 2**64 - 1])
def test_noise_equals_the_specification(seed):
    tokens, noise = np.arange(5000), counted(tf.constant(seed, tf.uint64), 3)
    words = [[stream & 0xFFFFFFFF, stream >> 32] for stream in spec.noise_streams(seed, 3, 1)]
    assert noise.numpy().tolist() == words
    for step in (0, 1, 1000):
        found = rules.gumbel(noise, step, tokens, tf.float64).numpy()
        for row in range(3):
            expected = spec.gumbel(seed, row, step, tokens)
            np.testing.assert_allclose(found[row], expected, rtol=1e-12, atol=1e-15)


def test_compiled_rules_take_both_zeros_as_one():
    """XLA puts -0 after 0, and folds the addition of 0 away."""
    logits = np.array([[-1, 0, -0.0, 0, -0.0, -2, -0.0, 0]], np.float32)  # of which top-p keeps the first three zeros
    found = tf.function(top, jit_compile=True, autograph=False)(rules.keep_top_p, logits, tf.constant(0.4))
    assert (np.isfinite(found) == [[False, True, True, True, False, False, False, False]]).all()
    keys = tf.function(rules.ordered, jit_compile=True, autograph=False)(logits)
    assert (keys == rules.ordered(logits + np.float32(0))).numpy().all()


def test_samples_of_a_few_words_are_those_of_all():
    """Noise for a few words alone chooses what noise for all of them would have."""
    logits = np.random.default_rng(3).normal(size=(4, 200)).astype(np.float32)
    noise, logits = counted(tf.constant(5, tf.uint64), 4), top(rules.keep_top_k, tf.constant(logits), 50)
    kept = rules.Kept(logits, rules.first_few(logits))
    for step in range(20):
        whole = logits + rules.gumbel(noise, step, tf.range(200), tf.float32)
        assert (rules.sample(kept, noise, step) == tf.argmax(whole, -1, output_type=tf.int32)).numpy().all()


def test_xla_compiles_samples_from_a_multiple_of_eight_words():
    """As one expression, the rounds of the noise kept it busy without an end there."""
    logits = tf.constant(np.random.default_rng(0).normal(size=(2, 64)))
    noise, step = tf.constant([[5, 0], [6, 0]], tf.uint32), tf.constant(3)
    kept, compiled = (
        rules.Kept(logits, rules.first_few(logits)),
        tf.function(rules.sample, jit_compile=True, autograph=False),
    )
    assert (compiled(kept, noise, step) == rules.sample(kept, noise, step)).numpy().all()


BAD = {
    "an unknown option": ({"temprature": 1}, TypeError, "no option 'temprature'; did you mean 'temperature'"),
    "a bad value": ({"top_p": 2}, InputError, "top_p: expected a number above 0, up to 1, found 2"),
    "beyond the context": ({"max_new_tokens": 48}, InputError, "17 prompt tokens and 48 new ones are more than n_p"),
    "no room": ({"max_length": 17}, InputError, "max_length: 17 leaves no room after 17 prompt tokens"),
    "no cross-attention": ({"encoder_hidden_states": tf.zeros((3, 2, 48))}, InputError, "no cross-attention"),
    "a short mask": ({"attention_mask": tf.ones((3, 16))}, InputError, r"attention_mask: expected shape \(3, 17\)"),
    "an empty row": ({"attention_mask": [[1] * 17, [0] * 17, [1] * 17]}, InputError, "a prompt has no token"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(usual, name):
    options, error, sentence = BAD[name]
    with pytest.raises(error, match=sentence):
        usual.generate(RECORDED["gen.input_ids"], **options)


def test_bad_prompts_are_one_sentence(usual):
    with pytest.raises(InputError, match=r"input_ids: the id 503 is outside the vocabulary \(0 to 502\)"):
        usual.generate([[503]])
    with pytest.raises(InputError, match="a prompt has no token"):
        usual.generate(np.zeros((1, 0), int))
    with pytest.raises(InputError, match="input_ids: expected shape"):
        usual.generate([1, 2])
    with pytest.raises(InputError, match="input_ids: expected integers"):
        usual.generate([[1.0]])
    with pytest.raises(InputError, match="input_ids: expected rows of numbers, all of one length"):
        usual.generate([[1, 2], [3]])


def test_the_last_position_can_be_reached(usual):
    assert usual.generate(np.full((1, 60), 5), max_new_tokens=4, eos_token_id=None).shape == (1, 64)


def test_no_rows_give_no_rows(usual):
    assert usual.generate(np.zeros((0, 5), int), max_new_tokens=3, eos_token_id=None).shape == (0, 8)
