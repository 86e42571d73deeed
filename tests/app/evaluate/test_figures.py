"""The figures of `evaluate`, beside the oracle, one token after the other, and beside what is counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpt2_multi.app.evaluate import scorer as scorers
from gpt2_multi.app.evaluate.measures.perplexity import Perplexity
from gpt2_multi.app.evaluate.measures.questions import Question
from gpt2_multi.app.evaluate.measures.tasks import Task
from gpt2_multi.app.evaluate.records import plain
from gpt2_multi.app.evaluate.scorer import Scorer
from gpt2_multi.errors import InputError
from tests.app.conftest import END
from tests.app.evaluate.conftest import CONFIG, logits_of

LONG = "What say you, my lord? " * 4
TEXTS = [LONG, "a", "", "é日😀" * 5, "ab"]


def log_prob(scorer: Scorer, ids: list[int], place: int) -> float:
    """Of the id at a place, after those before it."""
    logits = logits_of(scorer.row.weights, np.array([ids[:place]]))[0, -1]  # type: ignore[attr-defined]
    return float(logits[ids[place]] - np.log(np.exp(logits).sum()))


def by_hand(scorer: Scorer, text: str, length: int, stride: int, start: bool) -> tuple[int, float]:
    """Each token in the first window that has it and something before it; how many, and their log-probability."""
    ids = [END] * start + list(text.encode())
    total = 0.0
    for place in range(1, len(ids)):
        first = min(at for at in range(0, place, stride) if place < at + length and at < place)
        total += log_prob(scorer, ids[first : place + 1], place - first)
    return max(len(ids) - 1, 0), total


@pytest.mark.parametrize(("length", "stride", "start"), [(32, 16, True), (32, 31, False), (7, 1, True), (2, 1, False)])
def test_each_token_counts_once_in_the_first_window_that_has_it(scorer, length, stride, start):
    measure = Perplexity(length, stride, start).settled(CONFIG)
    found = measure.measure(TEXTS, scorer)
    for text, result in zip(TEXTS, found, strict=True):
        tokens, total = by_hand(scorer, text, length, stride, start)
        assert result["tokens"] == tokens and math.isclose(result["log_prob"], total, abs_tol=1e-9)
        assert result["bytes"] == len(text.encode()) - (not start and text != "")
    figures = measure.summary(found)
    total, sizes = sum(each["log_prob"] for each in found), sum(each["bytes"] for each in found)
    assert figures["documents"] == 5 and math.isclose(figures["bits_per_byte"], -total / math.log(2) / sizes)
    assert math.isclose(figures["perplexity"], math.exp(-total / figures["tokens"]))


def test_the_figures_of_a_model_that_knows_nothing(scorer):
    """Every byte is a token, and each of 257 is as likely."""
    uniform = replace(scorer, row=Uniform())
    found = Perplexity().settled(CONFIG).measure(["ab cd", "é"], uniform)
    assert [(each["tokens"], each["bytes"], each["words"]) for each in found] == [(5, 5, 2), (2, 2, 1)]
    figures = Perplexity().summary(found)
    assert math.isclose(figures["perplexity"], 257) and math.isclose(figures["bits_per_byte"], math.log2(257))
    assert math.isclose(figures["byte_perplexity"], 257) and math.isclose(figures["word_perplexity"], 257 ** (7 / 3))
    without = Perplexity(start=False).settled(CONFIG).measure(["é"], uniform)  # one of its two bytes is scored
    assert (without[0]["tokens"], without[0]["bytes"]) == (1, 1)


class Uniform:
    """A backend on which every token is as likely as any other, but none likelier than some."""

    def __init__(self, likeliest: bytes = b"", log_prob: float = -math.log(257)) -> None:
        self.likeliest, self.log_prob = list(likeliest), log_prob

    def log_probs(self, model: Any, ids: Any, mask: Any) -> Any:
        return np.full(ids[:, 1:].shape, self.log_prob), np.isin(ids[:, 1:], self.likeliest)


def test_texts_without_a_token_have_no_perplexity(scorer):
    measure = Perplexity(start=False).settled(CONFIG)
    with pytest.raises(InputError, match="data: has no token that could be scored"):
        measure.summary(measure.measure(["", "a"], scorer))


def test_what_is_no_number_is_refused_and_what_is_too_large_is_none_in_json(scorer):
    """The choice among endings would be one of those that have no number."""
    for measure, values in ((Perplexity().settled(CONFIG), ["ab"]), (Task("choices"), QUESTIONS[:1])):
        with pytest.raises(InputError, match="the model gives a log-probability of nan: look at its weights"):
            measure.measure(values, replace(scorer, row=Uniform(log_prob=math.nan)))
    word = {"tokens": 1000, "bytes": 1000, "words": 1, "log_prob": -1000.0}
    figures = Perplexity().summary([word])
    assert (figures["word_perplexity"], plain(figures)["word_perplexity"]) == (math.inf, None)
    assert plain(figures) | {"word_perplexity": math.inf} == figures


def test_windows_leave_no_token_out():
    assert Perplexity().settled(CONFIG) == Perplexity(32, 16, True)
    assert Perplexity().settled(CONFIG.replace(bos_token_id=None)) == Perplexity(32, 16, False)
    for given, sentence in (
        (Perplexity(33), "length: expected 2 to 32, which the model can read at once, found 33"),
        (Perplexity(1), "length: expected 2 to 32"),
        (Perplexity(8, 8), "stride: expected 1 to 7, less than the length of a window, found 8"),
        (Perplexity(8, 0), "stride: expected 1 to 7"),
    ):
        with pytest.raises(InputError, match=sentence):
            given.settled(CONFIG)


def test_batches_are_of_like_lengths_and_change_nothing(scorer, monkeypatch):
    measure, parts = Perplexity().settled(CONFIG), []
    expected = measure.measure(TEXTS, replace(scorer, batch_size=1), parts.append)
    assert math.isclose(sum(parts), 1) and {rows for rows, _ in scorer.row.shapes} == {1}
    monkeypatch.setitem(scorers.TOKENS, "cpu", 64)
    scorer.row.shapes.clear()
    found = measure.measure(TEXTS, scorer)
    assert scorer.row.shapes[0] == (2, 32) and all(rows * width <= 64 for rows, width in scorer.row.shapes)
    assert scorer.row.shapes == sorted(scorer.row.shapes, key=lambda shape: -shape[1])
    for one, other in zip(found, expected, strict=True):
        assert math.isclose(one["log_prob"], other["log_prob"], abs_tol=1e-9)


QUESTIONS = [
    Question("Who is there?", ("é日", "nobody at all", "I"), 2),
    Question("A long way to go: " * 3, ("a", "bc"), 0),  # of which a part is cut
    Question("", ("a", "b"), 1),
    Question("space ", ("a", "bb"), 1),
]


def test_endings_are_chosen_by_what_the_oracle_gives_them(scorer):
    found = Task("choices").measure(QUESTIONS, scorer)
    for question, result in zip(QUESTIONS, found, strict=True):
        before = list(question.context.rstrip().encode()) or [END]
        totals = []
        for ending in question.endings:
            after = list(f"{question.context[len(question.context.rstrip()) :]} {ending}".encode())
            ids = [*before, *after][-33:]
            totals.append(sum(log_prob(scorer, ids, len(ids) - i) for i in range(len(after), 0, -1)))
        np.testing.assert_allclose(result["log_probs"], totals, atol=1e-9)
        assert result["choice"] == np.argmax(totals) and result["gold"] == question.gold
        by_length = [total / len(ending) for total, ending in zip(totals, question.endings, strict=True)]
        by_bytes = [total / len(ending.encode()) for total, ending in zip(totals, question.endings, strict=True)]
        assert (result["choice_norm"], result["choice_bytes"]) == (np.argmax(by_length), np.argmax(by_bytes))
    assert [result["cut"] > 0 for result in found] == [False, True, False, False]


def test_the_means_of_a_task_have_standard_errors():
    rows = [{"gold": 0, "choice": i % 2, "choice_norm": 0, "choice_bytes": 1, "cut": i} for i in range(4)]
    figures = Task("choices").summary(rows)
    assert (figures["acc"], figures["acc_norm"], figures["acc_bytes"], figures["questions_cut"]) == (0.5, 1, 0, 3)
    assert math.isclose(figures["acc_stderr"], np.std([1, 0, 1, 0], ddof=1) / 2) and figures["acc_norm_stderr"] == 0
    assert Task("choices").summary(rows[:1])["acc_stderr"] is None
    words = [{"log_prob": -1.0, "greedy": True, "cut": 0}, {"log_prob": -3.0, "greedy": False, "cut": 0}]
    figures = Task("lambada").summary(words)
    assert figures["acc"] == 0.5 and math.isclose(figures["perplexity"], math.exp(2))
    assert math.isclose(figures["perplexity_stderr"], math.exp(2) * np.std([1, 3], ddof=1) / math.sqrt(2))
    with pytest.raises(InputError, match="data: has no question"):
        Task("lambada").summary([])


def test_a_last_word_is_found_where_each_of_its_tokens_is_the_likeliest(scorer):
    writing = replace(scorer, row=Uniform(likeliest=b" ab"))
    words = [Question("what", (word,), 0) for word in ("aba", "abc", "b")]
    found = Task("lambada").measure(words, writing)
    assert [each["greedy"] for each in found] == [True, False, True]
    assert [round(each["log_prob"] / math.log(257)) for each in found] == [-4, -4, -2]


def test_an_ending_beyond_the_context_is_refused(scorer):
    with pytest.raises(InputError, match="endings: expected 1 to 32 tokens, found 41 in ' xxxx"):
        Task("choices").measure([Question("a", ("x" * 40, "b"), 0)], scorer)
