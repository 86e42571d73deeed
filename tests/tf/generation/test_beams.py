"""Beams, lookup, sliding windows, records and texts in TensorFlow, compiled by XLA where nothing else is said."""

import warnings

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from gpt2_multi.errors import InputError
from gpt2_multi.generation.rules import bucket, window_start
from gpt2_multi.tf import TFGPT2LMHeadModel
from gpt2_multi.tf.generation.decoders import Decoders
from tests.support import fixtures
from tests.support import generation_cases as cases

RECORDED = fixtures.reference("lm")
IDS, MASK = RECORDED["gen.input_ids"], RECORDED["in.mask_left"]
END = int(RECORDED["gen.eos"][0])
XLA = pytest.mark.parametrize("jit", [True, False], ids=["xla", "graph"])
BEAM4 = {"max_new_tokens": 12, "num_beams": 4, "eos_token_id": None, "pad_token_id": 1}
BEAM4_EOS = BEAM4 | {"eos_token_id": END, "num_return_sequences": 2, "length_penalty": 0.8}


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """A random model whose ids are those of a small tokenizer."""
    folder = tmp_path_factory.mktemp("speller")
    cases.write(folder, 1)
    return TFGPT2LMHeadModel.from_pretrained(folder, param_dtype="float64")


@pytest.mark.parametrize(("name", "options"), [("beam4", BEAM4), ("beam4_eos", BEAM4_EOS)])
def test_beams_equal_the_recorded(model, name, options, jit):
    found = model.generate(IDS, MASK, jit_compile=jit, **options).numpy()
    assert np.array_equal(found, RECORDED[f"gen.{name}"])


@pytest.mark.parametrize("row", [0, 1, 2])
def test_beams_of_a_row_alone_equal_the_recorded(exact, row):
    recorded = RECORDED[f"gen_alone.beam4.{row}"]
    assert np.array_equal(exact.generate(recorded[:, :-12], jit_compile=False, **BEAM4), recorded)


def test_beams_traced_into_another_function_give_the_same(exact):
    signature = [tf.TensorSpec((None, None), tf.int64)] * 2

    @tf.function(input_signature=signature)
    def outer(ids, mask):
        return exact.generate(ids, mask, **BEAM4)

    assert np.array_equal(outer(IDS, MASK), RECORDED["gen.beam4"])


@pytest.mark.parametrize("sampled", [False, True])
def test_records_are_of_the_tokens(model, sampled, jit):
    options = {"max_new_tokens": 6, "eos_token_id": END, "return_dict_in_generate": True, "jit_compile": jit}
    options |= {"do_sample": True, "seed": 3} if sampled else {}
    out = model.generate(IDS, MASK, output_scores=True, output_logits=True, **options)
    made = out.sequences.numpy()[:, 17:]
    assert out.log_probs.shape == made.shape and len(out.scores) == len(out.logits) == made.shape[1]
    ended = np.cumsum(made == END, 1) - (made == END) > 0
    for step, scores in enumerate(out.scores):
        expected = tf.nn.log_softmax(scores).numpy()[np.arange(3), made[:, step]]
        np.testing.assert_allclose(out.log_probs[:, step], np.where(ended[:, step], 0, expected), rtol=1e-5, atol=1e-6)
    first = model(IDS, attention_mask=MASK).logits[:, -1]
    np.testing.assert_allclose(out.logits[0], first, rtol=1e-4, atol=1e-4)
    assert out.sequences_scores is None


def test_beams_scores_are_the_sums_of_their_log_probs(exact):
    details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "jit_compile": False}
    out = exact.generate(IDS, MASK, **BEAM4_EOS, **details)
    assert np.array_equal(out.sequences, RECORDED["gen.beam4_eos"])
    beams, log_probs, made = out.beam_indices.numpy(), out.log_probs.numpy(), out.sequences.numpy()[:, 17:]
    lengths = (beams >= 0).sum(1)
    np.testing.assert_allclose(out.sequences_scores, log_probs.sum(1) / lengths**0.8, rtol=1e-5)
    for row, step in zip(*np.nonzero(beams >= 0), strict=True):
        chosen = out.scores[step][beams[row, step], made[row, step]]
        np.testing.assert_allclose(chosen, log_probs[row, step], rtol=1e-6)
    assert len(out.logits) == len(out.scores) and out.scores[0].shape == (12, 503)


def test_nothing_to_make_has_records_too(usual):
    out = usual.generate(IDS, max_new_tokens=0, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.shape == (3, 17) and out.log_probs.shape == (3, 0) and out.scores == ()
    none = np.zeros((0, 5), int)
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"sliding_window": True}):
        assert usual.generate(none, max_new_tokens=3, **options).shape == (0, 8)
        assert usual.generate(IDS, max_new_tokens=0, **options).shape == (3, 17)


def test_lookup_gives_the_tokens_of_greedy_choice(model, jit):
    options = {"max_new_tokens": 20, "eos_token_id": END, "jit_compile": jit}
    guesses = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}
    found = model.generate(IDS, MASK, **guesses, **options)
    assert np.array_equal(found, model.generate(IDS, MASK, **options))
    columns = list(model.stream_tokens(IDS, MASK, **guesses, **options))
    assert np.array_equal(tf.stack(columns, 1), found[:, 17:])


def test_lookup_reads_less_often_where_a_text_repeats_itself(exact, monkeypatch, eager):
    reads, call = [], exact.call
    counted = lambda **given: reads.append(given["input_ids"].shape[1]) or call(**given)  # noqa: E731
    monkeypatch.setitem(vars(exact), "call", counted)
    text = exact.generate(IDS[:1, :8], max_new_tokens=20, eos_token_id=None).numpy()  # what it says after IDS
    again = np.concatenate([text, text[:, :8]], 1)
    options = {"max_new_tokens": 16, "eos_token_id": None}
    reads.clear()
    expected = exact.generate(again, **options)
    assert reads[0] == 47 and reads[1:] == [1] * 16
    reads.clear()
    assert np.array_equal(exact.generate(again, prompt_lookup_num_tokens=4, **options), expected)
    assert len(reads[1:]) < 16 and max(reads[1:]) == 5


def test_a_sliding_window_shows_what_the_model_is_called_on(model, jit):
    options = {"max_new_tokens": 60, "eos_token_id": None, "sliding_window": True, "jit_compile": jit}
    found = model.generate(IDS, MASK, **options).numpy()
    for row in range(3):
        ids = np.concatenate([IDS[row][MASK[row] != 0], found[row, 17:]])
        for length in range(len(ids) - 60, len(ids), 7):
            logits = model(ids[None, window_start(length, 64) : length]).logits[0, -1].numpy()
            assert logits[ids[length]] >= logits.max() - 1e-4
    columns = list(model.stream_tokens(IDS, MASK, **options))
    assert np.array_equal(tf.stack(columns, 1), found[:, 17:])


@pytest.mark.parametrize("option", [{"sliding_window": True}, {"prompt_lookup_num_tokens": 2}])
def test_what_needs_the_host_is_not_traced(usual, option):
    outer = tf.function(lambda ids: usual.generate(ids, max_new_tokens=3, **option))
    with pytest.raises(InputError, match=f"{next(iter(option))}: cannot be traced into another function"):
        outer(IDS)


def test_texts_go_in_and_come_out(speller):
    options = {"tokenizer": cases.tokenizer(), "max_new_tokens": 8, "jit_compile": False}
    text = speller.generate("the rain", **options)
    assert text.startswith("the rain") and speller.generate(["the rain", "on"], **options)[0] == text
    assert "".join(speller.stream("the rain", **options)) == text[len("the rain") :]
    two = speller.generate(["the rain", "on"], num_beams=2, num_return_sequences=2, **options)
    assert [len(row) for row in two] == [2, 2] and all(t.startswith("the rain") for t in two[0])
    out = speller.generate("the rain", return_dict_in_generate=True, **options)
    assert out.texts == text and out.log_probs.shape == (1, 8)
    with pytest.raises(InputError, match="tokenizer"):
        speller.generate("the rain")


@XLA
@pytest.mark.parametrize("beams", [1, 2])
def test_a_text_ends_with_its_stop_string(speller, beams, jit):
    options = {"tokenizer": cases.tokenizer(), "max_new_tokens": 12, "num_beams": beams, "jit_compile": jit}
    free = speller.generate("the rain", **options)[len("the rain") :]
    stop = next(free[i : i + 2] for i in range(2, len(free)) if "\ufffd" not in free[i : i + 2])
    found = speller.generate("the rain", stop_strings=stop, **options)[len("the rain") :]
    assert stop in found and (beams > 1 or free.startswith(found))
    if beams == 1:
        assert "".join(speller.stream("the rain", stop_strings=[stop], **options)) == found


SAMPLED = {"do_sample": True, "seed": 2**64 - 1}
OPTIONS = [
    {"temperature": 0.5, "top_k": 3, "top_p": 0.4, "min_p": 0.1, **SAMPLED},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_length": 20, "cache_implementation": "static"},
    {"eos_token_id": [5, 6], "pad_token_id": 7, "min_new_tokens": 2, "cache_implementation": "dynamic"},
    {"bad_words_ids": [[1], [2, 3, 4]], "logit_bias": {7: 2.0}, "seed": [1, 2]},
    {},
]
OF_BEAMS = [{"length_penalty": -1.0}, {"early_stopping": True}, {"early_stopping": "never"}, SAMPLED, {}]


def traces(function):
    """How often a compiled function was traced."""
    return function.experimental_get_tracing_count()


@pytest.mark.parametrize("beams", [1, 3])
def test_calls_compile_no_more_than_there_are_buckets(beams):
    fresh, rng, buckets = TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm")), np.random.default_rng(0), set()
    for number in range(20):
        length, new = int(rng.integers(10, 30)), int(rng.integers(2, 16))
        options = OPTIONS[number % 5] | (OF_BEAMS[number // 5] if beams > 1 else {})
        buckets.add((bucket(length), bucket(new)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not every option changes something
            fresh.generate(rng.integers(0, 500, (2, length)), num_beams=beams, max_new_tokens=new, **options)
    xla, graph = Decoders.of(fresh, True), Decoders.of(fresh, False)
    assert traces(xla.prefill) == traces(xla.decode) == len(buckets) == 2
    assert traces(graph.prefill) == traces(graph.decode) == 0
