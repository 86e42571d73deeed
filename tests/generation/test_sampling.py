"""The specification of generation: options, noise, rules on logits."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from gpt2_multi.errors import InputError
from gpt2_multi.generation import rules
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.config.table import OF_CALLS
from gpt2_multi.generation.options import Options, Row
from gpt2_multi.generation.request import Given
from gpt2_multi.model.config import GPT2Config
from tests.support import fixtures

NOISE = json.loads((fixtures.DATA / "lm" / "noise.json").read_text())


def words(texts):
    return tuple(int(text, 16) for text in texts)


@pytest.mark.parametrize("answer", NOISE["known_answers"])
def test_threefry_gives_the_known_answers(answer):
    found = rules.threefry2x32(words(answer["key"]), words(answer["counter"]))
    assert tuple(int(word) for word in found) == words(answer["out"])


@pytest.mark.parametrize("value", NOISE["values"])
def test_noise_equals_the_recorded(value):
    where = (value["seed"], value["row"], value["step"], np.arange(8))
    assert rules.uniform(*where).tolist() == value["u_of_tokens_0_to_7"]
    np.testing.assert_allclose(rules.gumbel(*where), value["gumbel"], rtol=1e-12)


def test_noise_is_exact_in_float32_and_never_0_or_1():
    u = rules.uniform(7, 0, 3, np.arange(50257))
    assert np.array_equal(u.astype(np.float32), u) and 0 < u.min() and u.max() < 1


def test_samples_follow_the_distribution():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    drawn = [np.argmax(logits + rules.gumbel(0, row, 0, np.arange(4))) for row in range(20000)]
    np.testing.assert_allclose(np.bincount(drawn) / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.015)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("top_k_7", lambda logits, ids: rules.keep_top_k(logits, 7)),
        ("top_p_0.8", lambda logits, ids: rules.keep_top_p(logits, 0.8)),
        ("temperature_0.7", lambda logits, ids: logits / 0.7),
        (
            "repetition_1.5",
            lambda logits, ids: np.stack([rules.penalise(a, b, 1.5) for a, b in zip(logits, ids, strict=True)]),
        ),
    ],
)
def test_rules_equal_transformers(name, rule):
    recorded = fixtures.reference("lm")
    expected = recorded[f"warp.{name}"]
    found = rule(recorded["warp.logits"].astype(np.float64), recorded["warp.input_ids"])
    hidden = expected < -1e30
    assert np.array_equal(np.isinf(found), hidden)
    np.testing.assert_allclose(found[~hidden], expected[~hidden], rtol=1e-6)


def test_top_k_keeps_ties_and_top_p_takes_the_lowest_ids():
    logits = np.array([1.0, 2.0, 2.0, 2.0, 0.0])
    assert np.isfinite(rules.keep_top_k(logits, 2)).tolist() == [False, True, True, True, False]
    assert np.isfinite(rules.keep_top_p(logits, 0.5)).tolist() == [False, True, True, False, False]
    assert np.isfinite(rules.keep_top_p(logits, 1e-9)).tolist() == [False, True, False, False, False]


def test_ban_repeats():
    ids = np.array([1, 2, 3, 1, 2])
    assert np.isinf(rules.ban_repeats(np.zeros(5), ids, 3)).tolist() == [False, False, False, True, False]
    assert np.isinf(rules.ban_repeats(np.zeros(5), ids, 1)).tolist() == [False, True, True, True, False]
    assert np.isfinite(rules.ban_repeats(np.zeros(5), ids[:1], 3)).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_p": 2}, "top_p: expected a number above 0, up to 1, found 2"),
        ({"top_p": 0}, "top_p: expected"),
        (
            {"temperature": 0},
            r"temperature: expected a number from 1e-9 \(for greedy choice: do_sample=F",
        ),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"top_k": -1}, "top_k: expected a whole number from 0, or None, found -1"),
        ({"top_k": 1.5}, "top_k: expected"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected"),
        ({"seed": -1}, "seed: expected a whole number from 0 to"),
        ({"seed": 2**64}, "seed: expected"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size: expected"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected"),
        ({"num_return_sequences": 2}, "greedy choice gives one text only"),
        ({"do_sample": 1}, "do_sample: expected True or False, found 1"),
        ({"eos_token_id": "x"}, "eos_token_id: expected"),
        ({"eos_token_id": [3, -1]}, "eos_token_id: expected"),
        ({"pad_token_id": -1}, "pad_token_id: expected"),
        ({"seed": []}, "seed: expected a whole number from 0 to"),
        ({"seed": [1, -1]}, "seed: expected"),
        ({"min_p": 1.5}, "min_p: expected a number from 0 to 1, or None, found 1.5"),
        ({"bad_words_ids": [3]}, "bad_words_ids: expected a list of lists of ids, none of them empty, or None"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: expected"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias: expected a mapping from ids"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias: expected"),
        ({"logit_bias": [3]}, "logit_bias: expected"),
        ({"num_beams": 0}, "num_beams: expected a whole number from 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences: 3 texts need as many beams"),
        ({"early_stopping": "always"}, "early_stopping: expected True, False or \"never\", found 'always'"),
        ({"length_penalty": "x"}, "length_penalty: expected a number"),
        ({"stop_strings": [""]}, "stop_strings: expected a text, a list of texts, none of them empty"),
        ({"cache_implementation": "quantized"}, 'cache_implementation: expected "static", "dynamic" or None'),
        ({"prompt_lookup_num_tokens": 3, "do_sample": True}, "prompt_lookup_num_tokens: is for greedy choice"),
        ({"sliding_window": True, "num_beams": 2}, "sliding_window: cannot be used with num_beams"),
        (
            {"sliding_window": True, "output_attentions": True, "return_dict_in_generate": True},
            "sliding_window: cannot be used with output_hidden_states",
        ),
        (
            {"output_scores": True},
            "output_scores, output_logits, output_hidden_states, output_attentions: ids have no place for them",
        ),
    ],
)
def test_bad_options_are_one_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        GenerationConfig(**options)


def test_arguments_of_a_model_s_call_are_named():
    for name, sentence in OF_CALLS.items():
        with pytest.raises(TypeError, match=f"^{name}: {re.escape(sentence)}$"):
            Given.of(GenerationConfig(), None, None, None, {name: [1]})
    more = {"position_ids": None, "logits_to_keep": 1, "num_beams": 3}
    assert Given.of(GenerationConfig(), None, None, None, more)[1] == GenerationConfig(num_beams=3)


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(TypeError, match=r"no option 'temprature'; did you mean 'temperature'\?"):
        GenerationConfig().with_options({"temprature": 1})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.7}, "temperature changes nothing without do_sample=True"),
        ({"top_k": 3}, "top_k changes nothing without do_sample=True"),
        ({"length_penalty": 2.0}, "length_penalty changes nothing without num_beams above 1"),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size changes nothing without prompt_lookup_num_tokens"),
    ],
)
def test_an_option_that_changes_nothing_is_warned_about(options, sentence):
    with pytest.warns(UserWarning, match=sentence):
        GenerationConfig().with_options(options)


def test_what_changes_something_or_is_the_default_is_not_warned_about(recwarn):
    GenerationConfig().with_options({"temperature": 1.0, "top_k": 50, "early_stopping": False})
    GenerationConfig().with_options({"top_k": 0})
    GenerationConfig().with_options({"do_sample": True, "temperature": 0.7, "top_k": 3, "seed": 1})
    GenerationConfig().with_options({"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"})
    assert not recwarn.list


def test_the_length_of_the_call_wins():
    config = GenerationConfig(max_new_tokens=5)
    assert config.with_options({"max_length": 30}).total_length(7) == 30
    assert config.with_options({"max_length": 30, "max_new_tokens": 2}).total_length(7) == 9


def test_biases_and_bad_words_are_phrases():
    config = GenerationConfig(logit_bias={3: 1.0, (1, 2): -2.0}, bad_words_ids=[[4], [5, 6]])
    assert config.biases == [((3,), 1.0), ((1, 2), -2.0), ((4,), -math.inf), ((5, 6), -math.inf)]
    config.check_vocabulary(7)
    with pytest.raises(InputError, match=r"bad_words_ids: the id 6 is outside the vocabulary \(0 to 5\)"):
        config.check_vocabulary(6)


def test_every_option_comes_back_from_its_file(tmp_path):
    given = {
        "logit_bias": {3: 1.0, (1, 2): -math.inf}, "bad_words_ids": [[4], [5, 6]], "num_beams": 3, "min_p": 0.1,
        "early_stopping": "never", "stop_strings": ["x"], "length_penalty": 0.5, "num_return_sequences": 2,
        "eos_token_id": [1, 2], "do_sample": True, "seed": [1, 2], "cache_implementation": "static",
    }  # fmt: skip
    config = GenerationConfig(**given)
    config.save_pretrained(tmp_path)
    read = GenerationConfig.of_folder(tmp_path, GPT2Config(bos_token_id=None, eos_token_id=None), {})
    assert "Infinity" not in (tmp_path / "generation_config.json").read_text()
    assert sorted(read.biases) == sorted(config.biases)
    neither = {"logit_bias": None, "bad_words_ids": None}
    assert replace(read, **neither) == replace(config, **neither)


def test_lengths():
    assert GenerationConfig().total_length(5) == 25
    assert GenerationConfig(max_new_tokens=0).total_length(5) == 5
    assert GenerationConfig(max_length=9).total_length(5) == 9
    assert GenerationConfig(max_length=9, max_new_tokens=3).total_length(5) == 8
    with pytest.raises(InputError, match="max_length: 5 leaves no room after 5 prompt tokens"):
        GenerationConfig(max_length=5).total_length(5)


def test_a_file_comes_back_with_every_key(tmp_path):
    keys = {"_from_model_config": True, "eos_token_id": [0, 3], "top_k": 20, "transformers_version": "4.57.6"}
    (tmp_path / "generation_config.json").write_text(json.dumps(keys))
    config = GenerationConfig.of_folder(tmp_path, GPT2Config(pad_token_id=7, bos_token_id=None), {})
    assert config.top_k == 20 and config.eos_token_ids == (0, 3) and config.fill_token_id == 7
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == keys | {"pad_token_id": 7}


def test_buckets_waste_less_than_half_and_are_few():
    found = [rules.bucket(length) for length in range(1, 1025)]
    assert found == sorted(found) and len(set(found)) == 20
    assert all(length <= size < max(length + 16, 1.25 * length + 1) for length, size in enumerate(found, 1))


def test_rows_with_options_of_their_own_are_stacked():
    sampled = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, bad_words_ids=[[1] * 9, [3]], eos_token_id=4)
    greedy = GenerationConfig(temperature=0.5, repetition_penalty=1.5, eos_token_id=list(range(40)))
    rows = [Row(sampled, stream=2**40 + 3), Row(greedy, bias={5: 2.0, 6: -1.0}, presence=0.5, frequency=0.25)]
    found = Options.stacked(rows, 31)
    assert found.do_sample.tolist() == [[True], [False]]
    assert found.temperature.tolist() == [[0.5], [1]] and found.top_k.tolist() == [[7], [1]]  # the likeliest alone
    assert found.repetition_penalty.tolist() == [[1], [1.5]] and found.streams.tolist() == [[3, 256], [0, 0]]
    assert found.presence.tolist() == [[0], [0.5]] and found.frequency.tolist() == [[0], [0.25]]
    assert [set(row) - {-1} for row in found.ends.tolist()] == [{4}, set(range(40))]
    listed = [
        {(*phrase[phrase >= 0].tolist(), bias) for phrase, bias in zip(*row, strict=True) if bias}
        for row in zip(found.phrases, found.biases.tolist(), strict=True)
    ]
    assert listed == [{(*[1] * 9, -math.inf), (3, -math.inf)}, {(5, 2.0), (6, -1.0)}]
    assert found.stops.shape[1] == 31 and not found.stops.any()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"stop_strings": "a"}, {"sliding_window": True}])
def test_what_a_row_among_others_cannot_have_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Row(GenerationConfig(**options))


def test_tokens_that_were_made_are_discouraged():
    found = rules.discourage(np.zeros(4), np.array([2, 1, 2]), presence=0.5, frequency=0.25)
    assert found.tolist() == [0, -0.75, -1, 0]
