"""Generation in Flax beyond one choice after the other: beams, records, lookup, windows, texts, compilations."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from gpt2_multi.errors import InputError
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.generation import generate
from gpt2_multi.flax.generation.decoders import Source
from gpt2_multi.generation.callbacks import TextStreamer
from gpt2_multi.generation.request import Given
from gpt2_multi.generation.rules import window_start
from gpt2_multi.model.config import GPT2Config
from tests.support import fixtures
from tests.support.generation_cases import tokenizer

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
RECORDED = fixtures.reference("lm")
IDS, MASK = RECORDED["gen.input_ids"], RECORDED["in.mask_left"]
BEAMS = {"num_beams": 4, "max_new_tokens": 12, "pad_token_id": 1, "eos_token_id": None}
ENDING = BEAMS | {"eos_token_id": int(RECORDED["gen.eos"][0]), "num_return_sequences": 2, "length_penalty": 0.8}
SMALL = GPT2Config(
    vocab_size=294, n_positions=24, n_embd=12, n_layer=2, n_head=3, initializer_range=0.5,
    eos_token_id=None, bos_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """A model of few positions, and of the vocabulary that `tokenizer` has."""
    return FlaxGPT2LMHeadModel(SMALL, param_dtype="float64", seed=3)


def equal(found, expected):
    return np.array_equal(found, expected)


@pytest.mark.parametrize(("name", "options"), [("beam4", BEAMS), ("beam4_eos", ENDING)])
def test_beams_equal_the_recorded(model, name, options):
    assert equal(model.generate(IDS, MASK, **options), RECORDED[f"gen.{name}"])


@pytest.mark.parametrize("row", [0, 1, 2])
def test_beams_of_a_row_alone_equal_the_recorded(exact, row):
    recorded = RECORDED[f"gen_alone.beam4.{row}"]
    assert equal(exact.generate(recorded[:, :-12], **BEAMS), recorded)


def test_beams_under_a_jit_of_the_user_give_the_same(exact):
    outer = jax.jit(lambda params, ids, mask: exact.generate(ids, mask, params=params, **ENDING))
    assert equal(outer(exact.params, IDS, MASK), RECORDED["gen.beam4_eos"])


def test_scanned_layers_have_the_same_beams():
    model = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), scan_layers=True)
    assert equal(model.generate(IDS, MASK, **BEAMS), RECORDED["gen.beam4"])


def test_records_of_beams_say_how_each_text_came_about(exact):
    out = exact.generate(IDS, MASK, return_dict_in_generate=True, output_scores=True, output_logits=True, **ENDING)
    assert equal(out.sequences, RECORDED["gen.beam4_eos"])
    scores, beams = np.stack(out.scores), np.asarray(out.beam_indices)
    assert scores.shape == (len(scores), 12, 503) and out.logits[0].shape == (12, 503)
    sums = np.zeros(6)
    for text, tokens in enumerate(np.asarray(out.sequences)[:, 17:]):
        there = beams[text] >= 0
        expected = scores[np.arange(there.sum()), beams[text, there], tokens[there]]
        np.testing.assert_allclose(np.asarray(out.log_probs)[text, there], expected)
        sums[text] = expected.sum() / there.sum() ** 0.8
    np.testing.assert_allclose(out.sequences_scores, sums, rtol=1e-5)


def test_records_of_samples_are_the_distributions_that_they_are_drawn_from(exact):
    options = {"do_sample": True, "top_k": 5, "seed": 3, "max_new_tokens": 6, "eos_token_id": None}
    out = exact.generate(IDS, MASK, return_dict_in_generate=True, output_scores=True, output_logits=True, **options)
    assert equal(out.sequences, exact.generate(IDS, MASK, **options))
    for step, (scores, token) in enumerate(zip(out.scores, np.asarray(out.sequences).T[17:], strict=True)):
        log_probs = jax.nn.log_softmax(scores)[np.arange(3), token]
        np.testing.assert_allclose(out.log_probs[:, step], log_probs, rtol=1e-6)
        assert (np.isfinite(scores).sum(-1) == 5).all()
    np.testing.assert_allclose(out.logits[0], exact(IDS, attention_mask=MASK).logits[:, -1], rtol=1e-3, atol=1e-4)


def test_lookup_gives_the_greedy_tokens_in_fewer_steps(exact):
    ids = np.tile([[5, 9, 11, 5, 9, 12]], 4)
    options = {"max_new_tokens": 30, "eos_token_id": None}
    greedy = exact.generate(ids, **options)
    config = exact.generation_config.with_options({**options, "prompt_lookup_num_tokens": 4})
    given = Given(ids)
    source = Source.of(exact, None, given)
    request, prompt = generate.request_of(exact, config, given, source)
    strategy = generate.strategy_of(request, source)
    (part,) = generate.parts(strategy, request, prompt)
    states = generate.states_of(exact, source, request, strategy, part, 1)
    shown = [np.array(state.shown) for state in states]
    assert equal(shown[-1][:, :30], greedy[:, 24:]) and len(shown) < 30
    assert equal(exact.generate(ids, prompt_lookup_num_tokens=4, **options), greedy)


def test_lookup_of_a_batch_can_be_streamed(exact):
    options = {"max_new_tokens": 10, "eos_token_id": None}
    columns = list(exact.stream_tokens(IDS, MASK, prompt_lookup_num_tokens=3, **options))
    expected = exact.generate(IDS, MASK, **options)[:, 17:]
    assert equal(np.stack(columns, 1), expected)
    assert equal(exact.generate(IDS, MASK, prompt_lookup_num_tokens=3, **options)[:, 17:], expected)


def test_a_sliding_window_is_what_the_model_sees(small):
    ids = np.random.default_rng(0).integers(0, 294, (1, 30))
    found = np.asarray(small.generate(ids, sliding_window=True, max_new_tokens=40))
    for length in range(30, 70):
        seen = found[:, window_start(length, 24) : length]
        assert found[0, length] == small(seen).logits[0, -1].argmax()
    assert equal(np.stack(list(small.stream_tokens(ids, sliding_window=True, max_new_tokens=40)), 1), found[:, 30:])
    assert (small.decoders.prefill._cache_size(), small.decoders.decode._cache_size()) == (1, 1)


def test_what_is_guided_from_outside_cannot_be_traced(small):
    outside = {"max_time": 1, "streamer": TextStreamer(tokenizer()), "assistant_model": small}
    for options in (
        {"sliding_window": True},
        {"prompt_lookup_num_tokens": 2},
        *({name: x} for name, x in outside.items()),
    ):
        with pytest.raises(InputError, match=f"{next(iter(options))}: cannot be used while generate is traced"):
            jax.jit(lambda ids, o=options: small.generate(ids, max_new_tokens=2, **o))(np.ones((1, 4), int))


def test_texts_come_in_and_out_and_in_pieces(small):
    words = tokenizer()
    options = {"tokenizer": words, "max_new_tokens": 12}
    text = small.generate("the one", **options)
    assert text.startswith("the one") and "".join(small.stream("the one", **options)) == text[7:]
    assert small.generate(["the one", ""], **options)[0] == text
    ids = np.array([words("the one").input_ids])
    assert words.decode(np.asarray(small.generate(ids, **options))[0]) == text
    assert small.generate("the one", return_dict_in_generate=True, **options).texts == text


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_stop_string_ends_a_text(small, more):
    options = {"tokenizer": tokenizer(), "max_new_tokens": 12, "no_repeat_ngram_size": 1, **more}
    plain = np.ravel(small.generate("the one", **options)).tolist()
    stop = next(character for character in plain[0][7:] if character.isascii())
    found = np.ravel(small.generate("the one", stop_strings=stop, **options)).tolist()
    assert any(stop in text[7:] for text in found)
    for text, longer in zip(found, plain, strict=True):
        assert "num_beams" in more or longer.startswith(text)
        assert text.find(stop, 7) in (-1, len(text) - 2, len(text) - 1)  # a token has two letters at most


def test_other_lengths_and_options_compile_nothing():
    fresh, rng = FlaxGPT2LMHeadModel(SMALL, seed=1), np.random.default_rng(0)
    every = [
        {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[1], [2, 3]]}, {"min_length": 9},
        {"logit_bias": {5: 2.0}}, {"min_new_tokens": 4}, {"eos_token_id": [3, 4, 5]}, {"pad_token_id": 2},
        {"stop_strings": ["a", "th"], "tokenizer": tokenizer()}, {"max_new_tokens": 2},
    ]  # fmt: skip
    sampled = [{"temperature": 0.5, "top_k": 3}, {"top_p": 0.4}, {"min_p": 0.2}, {"seed": [7]}]
    every += [{"do_sample": True, **options} for options in sampled]
    searched = [{"length_penalty": 0.2}, {"early_stopping": True}, {"early_stopping": "never"}, {"do_sample": True}]
    for number, options in enumerate(every):
        fresh.generate(rng.integers(0, 294, (1, 1 + number % 16)), **{"max_new_tokens": 6} | options)
    for number, options in enumerate(every + searched):
        fresh.generate(rng.integers(0, 294, (1, 1 + number % 16)), **{"max_new_tokens": 6, "num_beams": 3} | options)
    found = fresh.decoders
    assert [f._cache_size() for f in (found.start, found.prefill, found.decode)] == [2, 2, 2]  # choices, and beams
