"""Rows that come and go in TensorFlow: options of their own, tokens as alone, one trace."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from gpt2_multi.errors import InputError
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options, Row
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf import TFGPT2LMHeadModel
from gpt2_multi.tf.generation import rules
from gpt2_multi.tf.generation.slots import Slots
from tests.support import fixtures
from tests.support.effort import some
from tests.support.generation_cases import jobs, made_alone, options_of, rows_case, served

VOCAB, POSITIONS = 97, 48
SMALL = GPT2Config(
    vocab_size=VOCAB, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
    eos_token_id=None, bos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's files."""
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def arrays(folder):
    """Its weights."""
    return fixtures.write_model(folder, SMALL, "lm", 1)


@pytest.fixture(scope="module")
def model(folder, arrays):
    return TFGPT2LMHeadModel.from_pretrained(folder, param_dtype="float64")


def test_each_row_has_its_own_options():
    @tf.function(autograph=False)
    def chosen(logits, ids, mask, length, made, options):
        kept = rules.process(logits, ids, mask, length, made, options)
        return kept.logits, rules.choose(kept, made, options)

    for seed in range(some(200, 40)):
        case = rows_case(seed)
        options = rules.as_tensors(Options.stacked(case.rows, case.logits.shape[1]))
        given = map(tf.constant, (case.logits, case.ids, case.mask, case.length, case.made))
        processed, tokens = chosen(*given, options)
        sampled = [row.config.do_sample for row in case.rows]
        np.testing.assert_allclose(processed.numpy()[sampled], case.processed[sampled], rtol=1e-9)
        assert tokens.numpy().tolist() == case.chosen.tolist()


def test_each_row_gets_what_it_gets_alone_by_one_trace(model, arrays):
    texts = Slots(model, 4)
    assert texts.warm() and not texts.warm()
    assert all(function.experimental_get_tracing_count() == 1 for function in texts.functions)
    for seed in range(some(20, 2)):
        given = jobs(seed, 16, VOCAB, POSITIONS)
        assert served(texts, given, seed) == [made_alone(SMALL, arrays, job) for job in given]
    prompt = np.array([given[0].prompt])
    generated = model.generate(prompt, generation_config=options_of(given[0]), jit_compile=False)
    assert generated[0, prompt.shape[1] :].numpy().tolist() == made_alone(SMALL, arrays, given[0])
    assert texts.functions.step.experimental_get_tracing_count() == 1
    assert Slots(model, 2).functions is texts.functions


def test_log_probabilities_are_of_the_logits_before_any_option(model):
    texts, ids = Slots(model, 2), [1, 2, 3]
    row = Row(GenerationConfig(do_sample=True, top_k=2, temperature=0.5), top=3, bias={7: 100.0})
    own = texts.join(ids, row)
    for _ in range(3):
        step, expected = texts.step(), tf.nn.log_softmax(model(np.array([ids])).logits[0, -1]).numpy()
        assert step.slots == [own] and step.tokens.tolist() == [7]
        assert step.log_probs[0] == pytest.approx(expected[7], rel=1e-5)
        assert step.top_ids[0].tolist() == np.argsort(-expected)[:3].tolist()
        np.testing.assert_allclose(step.top_log_probs[0], -np.sort(-expected)[:3], rtol=1e-5)
        ids.append(7)
    score, expected = texts.score(ids, 2), tf.nn.log_softmax(model(np.array([ids])).logits[0, :-1]).numpy()
    np.testing.assert_allclose(score.log_probs, expected[np.arange(len(ids) - 1), ids[1:]], rtol=1e-5)
    assert score.top_ids.tolist() == np.argsort(-expected)[:, :2].tolist()
    assert texts.score([1], 2).top_ids.shape == (0, 2)


def test_what_cannot_join_is_refused_and_nobody_goes_on_beyond_the_context(model):
    texts, anyhow = Slots(model, 1), Row(GenerationConfig(), presence=1e6)
    for ids, words in (([], "no token"), ([VOCAB], "outside the vocabulary"), ([1] * POSITIONS, "n_positions")):
        with pytest.raises(InputError, match=words):
            texts.join(ids, anyhow)
    slot = texts.join([1, 2], anyhow)
    with pytest.raises(InputError, match="slots: all are taken"):
        texts.join([1], anyhow)
    made = [int(texts.step().tokens[0]) for _ in range(POSITIONS - 1)]
    assert len(set(made)) == POSITIONS - 1  # presence
    with pytest.raises(InputError, match="49 tokens are more than n_positions 48"):
        texts.step()
    texts.leave(slot)
    assert texts.free == 1 and not texts.step().slots
