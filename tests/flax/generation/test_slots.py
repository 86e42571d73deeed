"""Rows that come and go in Flax: options of their own, tokens as alone, few compilations."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from gpt2_multi.errors import InputError
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.generation import rules, slots
from gpt2_multi.flax.generation.slots import Slots
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options, Row
from gpt2_multi.model.config import GPT2Config
from tests.support import fixtures
from tests.support.effort import some
from tests.support.generation_cases import jobs, made_alone, options_of, rows_case, served

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype

VOCAB, POSITIONS = 97, 48
COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX tells whoever listens
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
    return FlaxGPT2LMHeadModel.from_pretrained(folder, param_dtype="float64")


def compiled(texts, before=None):
    """How often each function was compiled, since it was so often: JAX counts what is no model's own for all models."""
    counts = {name: function._cache_size() for name, function in texts.functions._asdict().items()}
    return {name: count - (before or {}).get(name, 0) for name, count in counts.items()}


def test_each_row_has_its_own_options():
    @jax.jit
    def chosen(logits, ids, mask, length, made, options):
        kept = rules.process(logits, ids, mask, length, made, options)
        return kept.logits, rules.choose(kept, made, options)

    for seed in range(some(200, 40)):
        case = rows_case(seed)
        options = Options.stacked(case.rows, case.logits.shape[1])
        processed, tokens = chosen(case.logits, case.ids, case.mask, case.length, case.made, options)
        sampled = [row.config.do_sample for row in case.rows]
        np.testing.assert_allclose(processed[np.array(sampled)], case.processed[sampled], rtol=1e-9)
        assert tokens.tolist() == case.chosen.tolist()


def test_each_row_gets_what_it_gets_alone_by_few_compiled_functions(model, arrays, monkeypatch):
    monkeypatch.setattr(slots, "LEAST", 32)  # so that there is more than one number of columns
    texts = Slots(model, 4)
    before = compiled(texts)
    assert texts.rooms == [32, 64]
    for seed in range(some(20, 1)):
        given = jobs(seed, 16, VOCAB, POSITIONS)
        assert served(texts, given, seed) == [made_alone(SMALL, arrays, job) for job in given]
    prompt = np.array([given[0].prompt])
    generated = model.generate(prompt, generation_config=options_of(given[0]))[0, prompt.shape[1] :]
    assert generated.tolist() == made_alone(SMALL, arrays, given[0])
    again = Slots(model, 4)
    served(again, jobs(99, 20, VOCAB, POSITIONS), 99)
    most = {"prefill": 3, "read": 6, "choose": 3}  # lengths of prompts; 1, 2 and 4 rows in 2 rooms; those rows
    assert {name: count for name, count in compiled(again, before).items() if count > most.get(name, 12)} == {}


def test_all_that_rows_need_is_compiled_while_nobody_waits():
    """Whoever comes, with what options ever, and how many others are there, nothing more is compiled."""
    texts, names = Slots(FlaxGPT2LMHeadModel(SMALL, seed=1), 2), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    while texts.warm():
        assert texts.free == 2
    assert names.count(COMPILED) > 10
    names.clear()
    served(texts, jobs(3, 12, VOCAB, POSITIONS), 3)
    texts.join([1] * 20, Row(GenerationConfig(), top=2))
    while not texts.step().slots:
        assert not texts.warm()
    texts.score([1, 2, 3], 2)
    assert COMPILED not in names


def test_log_probabilities_are_of_the_logits_before_any_option(model):
    texts, ids = Slots(model, 2), [1, 2, 3]
    row = Row(GenerationConfig(do_sample=True, top_k=2, temperature=0.5), top=3, bias={7: 100.0})
    own = texts.join(ids, row)
    steps = [step for _ in range(4) if (step := texts.step()).slots]
    for step in steps:
        expected = np.asarray(jax.nn.log_softmax(model(np.array([ids])).logits[0, -1]))
        assert step.slots == [own] and step.tokens.tolist() == [7]
        assert step.log_probs[0] == pytest.approx(expected[7], rel=1e-5)
        assert step.top_ids[0].tolist() == np.argsort(-expected)[:3].tolist()
        np.testing.assert_allclose(step.top_log_probs[0], -np.sort(-expected)[:3], rtol=1e-5)
        ids.append(7)
    score = texts.score(ids, 2)
    expected = np.asarray(jax.nn.log_softmax(model(np.array([ids])).logits[0, :-1]))
    np.testing.assert_allclose(score.log_probs, expected[np.arange(len(ids) - 1), ids[1:]], rtol=1e-5)
    assert score.top_ids.tolist() == np.argsort(-expected)[:, :2].tolist() and len(steps) == 3
    assert texts.score([1], 2).top_ids.shape == (0, 2)


def test_what_cannot_join_is_refused_and_nobody_goes_on_beyond_the_context(model):
    texts, anyhow = Slots(model, 1), Row(GenerationConfig(), presence=1e6)
    for ids, words in (([], "no token"), ([VOCAB], "outside the vocabulary"), ([1] * POSITIONS, "n_positions")):
        with pytest.raises(InputError, match=words):
            texts.join(ids, anyhow)
    slot, made = texts.join([1, 2], anyhow), []
    with pytest.raises(InputError, match="slots: all are taken"):
        texts.join([1], anyhow)
    while len(made) < POSITIONS - 2:
        made += texts.step().tokens.tolist()
    assert len(set(made)) == POSITIONS - 2  # presence
    with pytest.raises(InputError, match="49 tokens are more than n_positions 48"):
        texts.step()
    texts.leave(slot)
    assert texts.free == 1 and not texts.step().slots
