"""Generation in Flax: recorded tokens, the specification's rules, padding, counts of compilations, bad input."""

import re
from dataclasses import replace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from flax import linen as nn
from flax.core import FrozenDict

from gpt2_multi.errors import InputError
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.generation import cpu_kernels, decoders, rules
from gpt2_multi.generation import rules as spec
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.config import GPT2Config
from tests.support import fixtures
from tests.support.cases import SAMPLING
from tests.support.effort import some

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
RECORDED = fixtures.reference("lm")
SAMPLES = fixtures.read_safetensors(fixtures.DATA / "lm" / "sampling.safetensors")
IDS = np.arange(15).reshape(3, 5)
END = int(RECORDED["gen.eos"][0])


def equal(found, expected):
    return np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("greedy", {}), ("greedy_eos", {}), ("min_new_12_eos", {"min_new_tokens": 12})],
)
def test_greedy_tokens_equal_the_recorded(model, name, options):
    end = END if name != "greedy" else None
    options = options | {"max_new_tokens": 20, "eos_token_id": end}
    found = model.generate(RECORDED["gen.input_ids"], RECORDED["in.mask_left"], **options)
    assert equal(found, RECORDED[f"gen.{name}"])


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("greedy", {}), ("repetition_1.3", {"repetition_penalty": 1.3}), ("no_repeat_2", {"no_repeat_ngram_size": 2})],
)
def test_a_row_alone_equals_the_recorded_and_the_row_in_a_batch(model, name, options, row):
    recorded = RECORDED[f"gen_alone.{name}.{row}"]
    options = options | {"max_new_tokens": 20, "eos_token_id": None}
    assert equal(model.generate(recorded[:, :-20], **options), recorded)
    batch = model.generate(RECORDED["gen.input_ids"], RECORDED["in.mask_left"], **options)
    assert equal(batch[row, -20:], recorded[0, -20:])


@pytest.mark.parametrize("seed", [0, 12345678901])
@pytest.mark.parametrize("case", SAMPLING)
def test_samples_equal_the_recorded(model, case, seed):
    options = {"top_k": 0, "do_sample": True, "seed": seed, **SAMPLING[case]}
    found = model.generate(
        SAMPLES["input_ids"], SAMPLES["attention_mask"], max_new_tokens=20, eos_token_id=None, **options
    )
    assert equal(found, SAMPLES[f"{case}.seed_{seed}"])


def test_generation_under_a_jit_of_the_user_gives_the_same(exact):
    ids, mask = RECORDED["gen.input_ids"], RECORDED["in.mask_left"]

    @jax.jit
    def outer(params, ids, mask):
        return exact.generate(ids, mask, params=params, max_new_tokens=20, eos_token_id=None)

    assert equal(outer(exact.params, ids, mask), RECORDED["gen.greedy"])


def test_a_decode_step_works_in_a_scan_and_compiles_once(exact):
    ids = RECORDED["gen.input_ids"][:1, -4:]
    cache = exact.init_cache(1, 12)
    out = exact(ids, past_key_values=cache)

    def step(carry, _):
        token, cache = carry
        out = exact.module.apply({"params": exact.params}, token, past_key_values=cache)
        token = out.logits[:, -1:].argmax(-1).astype(token.dtype)
        return (token, out.past_key_values), token[0, 0]

    first = out.logits[:, -1:].argmax(-1)
    _, tokens = jax.lax.scan(step, (first, out.past_key_values), length=7)
    expected = exact.generate(ids, max_new_tokens=8, eos_token_id=None)[0, 4:]
    assert equal(tokens, expected[1:]) and first[0, 0] == expected[0]


def test_another_prompt_of_the_bucket_and_other_options_compile_nothing():
    fresh = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"))
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
    assert fresh.decoders.decode._cache_size() == 1
    fresh.generate(rng.integers(0, 500, (2, 33)), max_new_tokens=16)
    assert fresh.decoders.decode._cache_size() == 2


def test_padding_may_stand_on_either_side_and_in_the_middle(exact):
    ids = RECORDED["gen.input_ids"][:1, -6:]
    options = {"max_new_tokens": 8, "eos_token_id": None}
    alone = exact.generate(ids, **options)[:, 6:]
    for where in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [0, 2, 3, 5, 6, 8]):
        padded, mask = np.full((1, 9), 11), np.zeros((1, 9), int)
        padded[0, where], mask[0, where] = ids[0], 1
        assert equal(exact.generate(padded, mask, **options)[:, 9:], alone)


def test_sequences_of_one_prompt_are_the_rows_of_the_seed(exact):
    ids = RECORDED["gen.input_ids"][:2]
    options = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
    many = exact.generate(ids, num_return_sequences=3, seed=5, **options)
    for row in range(6):
        alone = exact.generate(ids[row // 3][None], seed=5 + row, **options)
        assert equal(many[row], alone[0])
    assert len({tuple(row.tolist()) for row in np.asarray(many)[:3]}) == 3


def test_streamed_columns_are_what_generate_appends(exact):
    options = {"max_new_tokens": 5, "eos_token_id": None}
    ids = RECORDED["gen.input_ids"]
    columns = list(exact.stream_tokens(ids, RECORDED["in.mask_left"], **options))
    assert equal(np.stack(columns, 1), exact.generate(ids, RECORDED["in.mask_left"], **options)[:, -5:])


def test_finished_rows_are_filled_and_the_loop_ends_with_the_last(exact):
    ids = RECORDED["gen.input_ids"]
    options = {"max_new_tokens": 40}
    ends = {"eos_token_id": [END, 502], "pad_token_id": 9}
    found = exact.generate(ids, RECORDED["in.mask_left"], **ends, **options)
    for row in found[:, 17:]:
        ends = (row == END).nonzero()[0]
        assert not len(ends) or (row[ends[0] + 1 :] == 9).all()
    greedy = exact.generate(ids[:1], eos_token_id=None, **options)
    stop = int(greedy[0, 19])
    assert exact.generate(ids[:1], eos_token_id=stop, **options).shape[1] <= 20
    assert len(list(exact.stream_tokens(ids[:1], eos_token_id=stop, **options))) <= 3


def test_defaults_come_from_the_model_and_options_win(exact):
    assert exact.generation_config.eos_token_id == 0 and exact.generation_config.pad_token_id == 1
    ids = RECORDED["gen.input_ids"]
    assert exact.generate(ids, eos_token_id=None).shape[1] == 37
    assert exact.generate(ids, max_new_tokens=0).shape[1] == 17
    own = GenerationConfig(max_new_tokens=3)
    assert exact.generate(ids, generation_config=own).shape[1] == 20
    assert exact.generate(ids, generation_config=own, max_new_tokens=2).shape[1] == 19


@pytest.mark.parametrize("kind", [np.int32, np.int64, list])
def test_ids_of_any_kind_give_ids_of_their_dtype(exact, kind):
    ids = RECORDED["gen.input_ids"]
    given = ids.tolist() if kind is list else ids.astype(kind)
    found = exact.generate(given, max_new_tokens=2, eos_token_id=None)
    assert found.dtype == (np.int32 if kind is np.int32 else np.int64) and equal(found[:, :17], ids)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_low_precision_generates_what_its_own_logits_say(dtype, stored):
    model = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), dtype=dtype, param_dtype=stored)
    ids, mask = RECORDED["gen.input_ids"], RECORDED["in.mask_left"]
    found = np.asarray(model.generate(ids, mask, max_new_tokens=4, eos_token_id=None))
    mask = np.concatenate([mask, np.ones((3, 4), mask.dtype)], 1)
    logits = np.asarray(model(found, attention_mask=mask).logits, np.float32)
    for place in range(17, 21):  # the cache rounds elsewhere, so the choice is near the best, not always the best
        best = logits[:, place - 1].max(-1)
        chosen = logits[np.arange(3), place - 1, found[:, place]]
        assert (best - chosen <= 0.05 * np.abs(logits).max()).all()


def test_cross_attention_generates_with_an_encoder():
    rng = np.random.default_rng(0)
    config = GPT2Config(
        vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, add_cross_attention=True, initializer_range=0.5
    )
    model = FlaxGPT2LMHeadModel(config, param_dtype="float64")
    ids, states = rng.integers(0, 31, (2, 4)), rng.normal(size=(2, 5, 12))
    options = {"encoder_hidden_states": states, "encoder_attention_mask": [[1] * 5, [1, 1, 0, 0, 0]]}
    found = model.generate(ids, max_new_tokens=6, eos_token_id=None, **options)
    for length in range(4, 10):
        step = model(found[:, :length], **options).logits[:, -1].argmax(-1)
        assert (step == found[:, length]).all()


def top(rule, logits, limit):
    """Logits after a rule that looks at the greatest ones first."""
    return rule(logits, rules.first_few(logits), limit)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", ["top_k", "top_p", "typical", "penalty", "repeats"])
def test_rules_equal_the_specification(rule, dtype):
    rng = np.random.default_rng(7)
    for turn in range(some(30, 8)):
        words = (40, 160)[turn % 2]  # fewer than are put in order, and more
        logits = np.round(rng.normal(0, 3, (4, words)), 1).astype(dtype)  # rounded, so that there are ties and zeros
        ids = rng.integers(0, 6, (4, 12)).astype(np.int32)
        mask = np.sort(rng.random((4, 12)) > 0.3)
        mask[:, -2:] = True
        rows = list(zip(logits, ids, mask, strict=True))
        if rule == "top_k":
            k = int(rng.integers(1, 100))
            found, expected = top(rules.keep_top_k, jax.numpy.asarray(logits), k), spec.keep_top_k(logits, k)
        elif rule == "top_p":
            p = float(rng.uniform(0.01, 0.99))
            found, expected = top(rules.keep_top_p, jax.numpy.asarray(logits), p), spec.keep_top_p(logits, p)
        elif rule == "typical":
            p = float(rng.uniform(0.01, 0.99))
            found, expected = rules.keep_typical(jax.numpy.asarray(logits), p), spec.keep_typical(logits, p)
        elif rule == "penalty":
            found = rules.penalise(jax.numpy.asarray(logits), ids, mask, 1.7)
            expected = [spec.penalise(a, b[m], 1.7) for a, b, m in rows]
        else:
            size = int(rng.integers(1, 4))
            found = rules.ban_repeats(*map(jax.numpy.asarray, (logits, ids, mask)), 12, size)
            expected = [spec.ban_repeats(a, b[m], size) for a, b, m in rows]
        np.testing.assert_allclose(found, np.stack(list(expected)), rtol=1e-6)


def test_compiled_rules_take_both_zeros_as_one():
    """XLA puts -0 after 0, and folds the addition of 0 away."""
    logits = np.array([[-1, 0, -0.0, 0, -0.0, -2, -0.0, 0]], np.float32)  # of which top-p keeps the first three zeros
    found = jax.jit(top, static_argnums=0)(rules.keep_top_p, logits, 0.4)
    assert (np.isfinite(found) == [[False, True, True, True, False, False, False, False]]).all()
    assert (jax.jit(rules.ordered)(logits) == rules.ordered(logits + np.float32(0))).all()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 + 7, 2**64 - 1])
def test_noise_equals_the_specification(seed):
    tokens = np.arange(5000)
    words = np.array([[stream % 2**32, stream >> 32] for stream in spec.noise_streams(seed, 3, 1)], np.uint32)
    for step in (0, 1, 1000):
        found = np.asarray(rules.gumbel(words, step, tokens, np.float64))
        for row in range(3):
            expected = spec.gumbel(seed, row, step, tokens)
            np.testing.assert_allclose(found[row], expected, rtol=1e-12, atol=1e-15)


BAD = {
    "an unknown option": ({"temprature": 1}, TypeError, "no option 'temprature'; did you mean 'temperature'"),
    "a bad value": ({"top_p": 2}, InputError, "top_p: expected a number above 0, up to 1, found 2"),
    "beyond the context": ({"max_new_tokens": 48}, InputError, "17 prompt tokens and 48 new ones are more than n_p"),
    "no room": ({"max_length": 17}, InputError, "max_length: 17 leaves no room after 17 prompt tokens"),
    "no cross-attention": ({"encoder_hidden_states": np.zeros((3, 2, 48))}, InputError, "no cross-attention"),
    "a short mask": ({"attention_mask": np.ones((3, 16))}, InputError, r"attention_mask: expected shape \(3, 17\)"),
    "an empty row": ({"attention_mask": [[1] * 17, [0] * 17, [1] * 17]}, InputError, "a prompt has no token"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(exact, name):
    options, error, sentence = BAD[name]
    with pytest.raises(error, match=sentence):
        exact.generate(RECORDED["gen.input_ids"], **options)


def test_bad_prompts_are_one_sentence(exact):
    with pytest.raises(InputError, match=r"input_ids: the id 503 is outside the vocabulary \(0 to 502\)"):
        exact.generate([[503]])
    with pytest.raises(InputError, match="a prompt has no token"):
        exact.generate(np.zeros((1, 0), int))
    with pytest.raises(InputError, match="input_ids: expected shape"):
        exact.generate([1, 2])
    with pytest.raises(InputError, match="input_ids: expected integers"):
        exact.generate([[1.0]])
    with pytest.raises(InputError, match="input_ids: expected rows of numbers, all of one length"):
        exact.generate([[1, 2], [3]])


def test_the_last_position_can_be_reached_without_a_copy_of_a_cache(exact, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    compiled = []

    def decode(weights, state, strategy, *options):
        loop = ours.decode.lower(weights, state, strategy, *options).compile()
        compiled.append((state.cache.layers[0][0].shape, loop))
        return loop(weights, state, *options)

    ours = exact.decoders
    monkeypatch.setattr(exact, "_decoders", (exact.settings(), replace(ours, decode=decode)))
    assert exact.generate(np.full((1, 60), 5), max_new_tokens=4, eos_token_id=None).shape == (1, 64)
    ((shape, loop),) = compiled
    pair = rf"f64\[{','.join(map(str, shape))}\]\S*"
    operations = re.findall(rf"= \(?{pair} ([\w-]+)\(", loop.as_text())
    assert operations.count("dynamic-update-slice") == 2 * exact.config.n_layer and "copy" not in operations
    assert len(re.findall(r"= f64\[8,1,\d+\]\S* dot\(", loop.as_text())) == 4 * exact.config.n_layer  # by all threads


def test_no_rows_give_no_rows(exact):
    assert exact.generate(np.zeros((0, 5), int), max_new_tokens=3, eos_token_id=None).shape == (0, 8)


@pytest.mark.parametrize("freeze", [dict, FrozenDict])
def test_transposed_kernels_give_the_same_tokens(freeze, monkeypatch):
    config = GPT2Config(vocab_size=31, n_positions=64, n_embd=12, n_head=3, n_layer=2, tie_word_embeddings=False)

    def generate(worthwhile):
        monkeypatch.setattr(decoders, "are_worthwhile", lambda *_: worthwhile)
        model = FlaxGPT2LMHeadModel(config, seed=1)
        params = freeze(jax.tree.map(lambda x: 5 * x, model.params))
        return model.generate(IDS, params=params, max_new_tokens=20, eos_token_id=None, do_sample=False)

    plain = generate(False)
    assert equal(generate(True), plain)
    ours = cpu_kernels.transposed
    monkeypatch.setattr(decoders, "transposed", lambda params: {name: x.T for name, x in ours(params).items()})
    with pytest.raises(TypeError):  # (in, out) taken for (out, in)
        generate(True)


def test_kernels_are_transposed_where_it_pays(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = FlaxGPT2LMHeadModel(GPT2Config(n_embd=12, n_head=3, n_layer=1), _do_init=False)
    found = [cpu_kernels.are_worthwhile(model, rows, 64) for rows in (1, 2, 32, 33)]
    assert found == [False, True, True, False] and not cpu_kernels.are_worthwhile(model, 8, 16)
    with nn.intercept_methods(lambda call, args, inputs, context: call(*args, **inputs)):
        assert not cpu_kernels.are_worthwhile(model, 8, 64)
    monkeypatch.setattr(nn.DenseGeneral, "__call__", lambda self, x: x)
    assert not cpu_kernels.are_worthwhile(model, 8, 64)
