"""The rules in NumPy against transformers' processors on random logits, and stop strings against plain search."""

import math
import random

import numpy as np
import pytest

from gpt2_multi.errors import InputError
from gpt2_multi.generation import rules
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.stopping import FOUND, stop_table, until_end
from tests.support.generation_cases import VOCAB, tokenizer

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

V, T = 40, 12


def of_row(rule):
    """A rule on a row as a rule on a batch."""
    return lambda logits, ids: np.stack([rule(*row) for row in zip(logits, ids, strict=True)])


def config(**options):
    """A rule that `process` carries out for these options alone."""
    return of_row(lambda logits, ids: rules.process(logits, ids, 5, GenerationConfig(**{"top_k": 0, **options})))


PHRASES = [[7], [1, 2], [3, 1, 4]]
RULES = {
    "temperature": (processors.TemperatureLogitsWarper(0.7), config(do_sample=True, temperature=0.7)),
    "top_k": (processors.TopKLogitsWarper(5), config(do_sample=True, top_k=5)),
    "top_p": (processors.TopPLogitsWarper(0.7), config(do_sample=True, top_p=0.7)),
    "min_p": (processors.MinPLogitsWarper(0.1), config(do_sample=True, min_p=0.1)),
    "top_k of beams": (
        processors.TopKLogitsWarper(1, min_tokens_to_keep=2),
        config(do_sample=True, top_k=1, num_beams=2),
    ),
    "top_p of beams": (
        processors.TopPLogitsWarper(0.01, min_tokens_to_keep=3),
        config(do_sample=True, top_p=0.01, num_beams=2, eos_token_id=[1, 2]),
    ),
    "min_p of beams": (
        processors.MinPLogitsWarper(0.99, min_tokens_to_keep=2),
        config(do_sample=True, min_p=0.99, num_beams=2),
    ),
    "repetition_penalty": (processors.RepetitionPenaltyLogitsProcessor(1.7), config(repetition_penalty=1.7)),
    "no_repeat_ngram_size": (processors.NoRepeatNGramLogitsProcessor(2), config(no_repeat_ngram_size=2)),
    "bad_words_ids": (processors.NoBadWordsLogitsProcessor(PHRASES, eos_token_id=None), config(bad_words_ids=PHRASES)),
    "logit_bias": (
        processors.SequenceBiasLogitsProcessor([[[7], 2.0], [[1, 2], -3.5], [[3, 1, 4], 1.0]]),
        config(logit_bias={7: 2.0, (1, 2): -3.5, (3, 1, 4): 1.0}),
    ),
    "min_length": (
        processors.MinLengthLogitsProcessor(T + 1, eos_token_id=[3, 5]),
        config(min_length=T + 1, eos_token_id=[3, 5]),
    ),
    "min_new_tokens": (
        processors.MinNewTokensLengthLogitsProcessor(T - 5, 6, eos_token_id=3),
        config(min_new_tokens=6, eos_token_id=3),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_equal_transformers(name):
    theirs, ours = RULES[name]
    rng = np.random.default_rng(11)
    for _ in range(50):
        logits, ids = rng.normal(0, 3, (4, V)), rng.integers(0, 6, (4, T))
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()
        np.testing.assert_allclose(ours(logits, ids), expected, rtol=1e-12)


def test_a_phrase_is_ruled_out_right_after_a_prompt_that_is_its_beginning():
    """transformers looks at phrases only where the text is as long as the whole phrase."""
    found = rules.add_biases(np.zeros(5), np.array([3, 1]), [((3, 1, 4), -math.inf)])
    assert np.isinf(found).tolist() == [False] * 4 + [True]


def test_a_phrase_table_holds_the_phrases():
    phrases, values = rules.phrase_table([((3, 1, 4), -1.0), ((7,), 2.0)])
    assert phrases.shape == (8, 8) and values.tolist() == [-1.0, 2.0, 0, 0, 0, 0, 0, 0]
    assert phrases[0].tolist() == [-1] * 5 + [3, 1, 4] and phrases[2].tolist() == [-1] * 7 + [0]
    assert rules.phrase_table([((1,) * 9, 1.0)] * 9)[0].shape == (16, 16)


def test_streams():
    assert rules.noise_streams(5, 2, 2) == [5, 6, 7, 8] and rules.noise_streams([5, 9], 2, 2) == [5, 6, 9, 10]
    assert rules.noise_streams(2**64 - 1, 2, 1) == [2**64 - 1, 0]


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_windows_hold_more_than_half_a_context_and_move_by_half(size):
    starts = [rules.window_start(length, size) for length in range(1, 5 * size)]
    for length, start in enumerate(starts, 1):
        assert start % max(size // 2, 1) == 0 and length - start <= size
        assert length <= size or length - start > size - max(size // 2, 1)
    assert starts == sorted(starts)


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_are_found_where_they_end(seed):
    rng = random.Random(seed)
    alphabet = "abé€\n"
    stops = ["".join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))]
    table = stop_table(stops, tokenizer(), VOCAB)
    assert table.shape[0] & (table.shape[0] - 1) == 0 and table.min() >= FOUND
    for _ in range(30):
        ids = tokenizer()("".join(rng.choices(alphabet, k=30))).input_ids
        made = list(until_end(ids, table, ()))
        whole = [any(s.encode() in tokenizer().decode_bytes(ids[:n]) for s in stops) for n in range(len(ids) + 1)]
        assert len(made) == (whole.index(True) if True in whole else len(ids))


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(InputError, match="stop_strings: are found in text, which needs a tokenizer; give tokenizer="):
        stop_table(["a"], None, 10)
