"""Rows that come and go: each gets what it gets alone, whoever else is there."""

import random
import warnings

import numpy as np
import pytest
import torch

from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import DEMO
from gpt2_multi.generation import rules as spec
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options, Row
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel
from gpt2_multi.pt.generation import rules, slots
from gpt2_multi.pt.generation.slots import Slots

VOCAB = 97


def tiny(**settings):
    """A model whose next tokens are neither all alike nor all different."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    config = GPT2Config(**sizes, eos_token_id=None, bos_token_id=None)
    return GPT2LMHeadModel(config, **settings).eval()


def draw(rng):
    """Options of a row, each off as often as not."""
    some = {
        "temperature": 0.7, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.7, "repetition_penalty": 1.4,
        "no_repeat_ngram_size": rng.choice([1, 2, 3]), "eos_token_id": [3, 90], "min_new_tokens": rng.choice([2, 40]),
        "bad_words_ids": [[5], [1, 2]], "min_length": 12,
    }  # fmt: skip
    options = {name: value for name, value in some.items() if rng.random() < 0.4}
    top_k = rng.choice([0, 0, 3, 40, 500])
    return {"do_sample": rng.random() < 0.7, "top_k": top_k, "eos_token_id": [], **options}


def config_of(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of greedy rows with a temperature
        return GenerationConfig().with_options(options)


@pytest.mark.parametrize("seed", range(40))
def test_rules_of_rows_are_those_of_each(seed, monkeypatch):
    monkeypatch.setattr(rules, "FEW", (20, 128)[seed % 2])  # of a vocabulary of 97
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    rows = [
        Row(config_of(draw(rng)), rng.getrandbits(64), *rng.choice([((),), ({4: 2.0, 5: -1.0}, 0.5, 0.25)]))
        for _ in range(rng.choice([1, 2, 7]))
    ]
    logits, ids = numbers.normal(0, 3, (len(rows), VOCAB)), numbers.integers(0, 6, (len(rows), 12))
    keep = np.arange(12) >= numbers.integers(0, 4, (len(rows), 1))
    made = numbers.integers(0, 8, (len(rows), 1))
    options = rules.as_tensors(Options.stacked(rows, VOCAB), torch.device("cpu"), torch.float64)
    given = *map(torch.from_numpy, (logits, ids, keep, made)), options
    processed = rules.process(*given)
    chosen = rules.choose(processed, given[3], options)
    for i, row in enumerate(rows):
        own = spec.add_biases(logits[i], ids[i], [((token,), bias) for token, bias in dict(row.bias).items()])
        own = spec.discourage(own, ids[i, 12 - made[i, 0] :], row.presence, row.frequency)
        expected = spec.process(own, ids[i][keep[i]], int(made[i, 0]), row.config)
        if row.config.do_sample:
            np.testing.assert_allclose(processed.whole(VOCAB)[i].numpy(), expected, rtol=1e-12)
            expected = expected + spec.gumbel(row.stream, 0, int(made[i, 0]), np.arange(VOCAB))
        assert int(chosen[i]) == expected.argmax()


def alone(model, prompt, row, new):
    """What `generate` makes of a prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = row.config.with_options({"max_new_tokens": new, "seed": row.stream})
    return model.generate(torch.tensor([prompt]), generation_config=own)[0, len(prompt) :].tolist()


def serve(texts, jobs, rng):
    """The new tokens of each job (prompt, row, how many), which come and go at random."""
    waiting, there, made = list(range(len(jobs))), {}, {i: [] for i in range(len(jobs))}
    while waiting or there:
        while waiting and texts.free and rng.random() < 0.6:
            number = waiting.pop(0)
            there[texts.join(*jobs[number][:2])] = number
        step = texts.step()
        for slot, token in zip(step.slots, step.tokens.tolist(), strict=True):
            number = there[slot]
            made[number].append(token)
            if len(made[number]) == jobs[number][2] or token in jobs[number][1].config.eos_token_ids:
                texts.leave(slot)
                del there[slot]
    return [made[number] for number in range(len(jobs))]


def jobs_of(rng, count, positions=48):
    beginning = [rng.randrange(VOCAB) for _ in range(positions)]
    jobs = []
    for _ in range(count):
        length = rng.choice([1, 2, 5, 20, positions - 1])
        prompt = beginning[:length] if rng.random() < 0.4 else [rng.randrange(VOCAB) for _ in range(length)]
        row = Row(config_of(draw(rng)), rng.getrandbits(63))
        jobs.append((prompt, row, rng.randint(1, positions - length)))
    return jobs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [3, 128])
def test_each_row_gets_what_it_gets_alone(seed, chunk, monkeypatch):
    monkeypatch.setattr(slots, "CHUNK", chunk)
    monkeypatch.setattr(slots, "LEAST", 4)
    rng, model = random.Random(seed), tiny(param_dtype="float64")
    jobs = jobs_of(rng, 24)
    found = serve(Slots(model, 5), jobs, rng)
    assert found == [alone(model, *job) for job in jobs]


def test_rows_of_a_trained_model_get_what_they_get_alone():
    """In float32, by the quick kernels."""
    rng, model = random.Random(5), GPT2LMHeadModel.from_pretrained(DEMO)
    jobs = [(prompt, row, min(new, 12)) for prompt, row, new in jobs_of(rng, 12)]
    texts = Slots(model, 8)
    assert serve(texts, jobs, rng) == [alone(model, *job) for job in jobs]
    assert texts.reader.kernels is not None


@torch.no_grad()
def test_log_probabilities_are_of_the_logits_before_any_option():
    model, prompt = tiny(param_dtype="float64"), [1, 2, 3]
    texts = Slots(model, 2)
    row = Row(config_of({"do_sample": True, "top_k": 2, "temperature": 0.5}), top=3, bias={7: 100.0})
    texts.join(prompt, row)
    texts.join([4], Row(GenerationConfig()))
    ids = list(prompt)
    for _ in range(3):
        step = texts.step()
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert step.tokens[0] == 7 and step.log_probs[0] == pytest.approx(float(expected[7]), rel=1e-5)
        assert step.top_ids[0].tolist() == expected.topk(3).indices.tolist()
        np.testing.assert_allclose(step.top_log_probs[0], expected.topk(3).values.numpy(), rtol=1e-5)
        ids.append(7)
    score = texts.score(ids, 2)
    expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(score.log_probs, expected[range(5), ids[1:]].numpy(), rtol=1e-5)
    assert score.top_ids.tolist() == expected.topk(2).indices.tolist()
    assert texts.score([1], 2).top_ids.shape == (0, 2)


def test_what_was_made_is_discouraged_and_a_prompt_is_not():
    texts = Slots(tiny(param_dtype="float64"), 3)
    texts.join([1, 2], Row(GenerationConfig(), presence=1e6))
    found = [int(texts.step().tokens[0]) for _ in range(40)]
    assert len(set(found)) == 40


@pytest.mark.parametrize(
    ("ids", "row", "words"),
    [
        ([], Row(GenerationConfig()), "no token"),
        ([VOCAB], Row(GenerationConfig()), "outside the vocabulary"),
        ([1] * 48, Row(GenerationConfig()), "n_positions"),
        ([1.5], Row(GenerationConfig()), "integers"),
        ([1], Row(GenerationConfig(), bias={VOCAB: 1.0}), "bias"),
        ([1], Row(GenerationConfig(bad_words_ids=[[VOCAB]])), "bad_words_ids"),
    ],
)
def test_what_cannot_join_is_refused(ids, row, words):
    texts = Slots(tiny(), 1)
    with pytest.raises(InputError, match=words):
        texts.join(ids, row)
    slot = texts.join([1], Row(GenerationConfig()))
    with pytest.raises(InputError, match="slots"):
        texts.join([1], Row(GenerationConfig()))
    texts.leave(slot)
    assert texts.free == 1 and not len(texts.step().tokens)
