"""Questions in the forms in which they were published, and rows that are none."""

import pytest

from gpt2_multi.app.evaluate.measures.questions import FORMS, Question
from gpt2_multi.errors import InputError

SWAG = {"activity_label": "Roof shingle", "endings": ["is [step] on a roof.", "sits  down."], "label": 1}
ARC = {"choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("lambada", {"text": "he was in  the house"}, Question("he was in  the", ("house",), 0)),
        (
            "hellaswag",
            SWAG | {"ctx_a": "A man [title] goes.", "ctx_b": "he  then", "ctx": "-", "label": "0"},
            Question("Roof shingle: A man. goes. He then", ("is on a roof.", "sits down."), 0),
        ),
        ("hellaswag", SWAG | {"ctx": "A man"}, Question("Roof shingle: A man", ("is on a roof.", "sits down."), 1)),
        ("choices", {"question": "Who?", "choices": ["a", "b"], "answer": 1}, Question("Who?", ("a", "b"), 1)),
        ("choices", {"context": "Who?", "endings": ["a", "b"], "label": "B"}, Question("Who?", ("a", "b"), 1)),
        ("choices", {"prompt": "Who?", "endings": ["a", "you"], "answer": "you"}, Question("Who?", ("a", "you"), 1)),
        ("choices", {"prompt": "Who?", "endings": ["a", "b"], "answer": "0"}, Question("Who?", ("a", "b"), 0)),
        ("choices", ARC | {"question": "Who?"}, Question("Question: Who?\nAnswer:", ("a", "b", "c"), 2)),
        (
            "choices",
            {
                "question": {"stem": "Who?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
                "answerKey": "A",
            },
            Question("Question: Who?\nAnswer:", ("a", "b"), 0),
        ),
        (
            "choices",
            {"goal": "Sit", "sol1": "down", "sol2": "up", "label": 0},
            Question("Question: Sit\nAnswer:", ("down", "up"), 0),
        ),
    ],
)
def test_a_row_is_a_question(task, row, expected):
    assert FORMS[task](row) == expected


GOOD = {"question": "Who?", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("task", "row", "sentence"),
    [
        ("lambada", {"passage": "a b"}, "text: expected a text, found no 'text' but 'passage'"),
        ("lambada", {"text": "word"}, "text: expected words, with one at the end that is to be found"),
        ("lambada", {"text": "a word "}, "text: expected words, with one at the end that is to be found"),
        ("hellaswag", SWAG | {"ctx": "A man", "label": ""}, "label: expected the number of the right ending, found ''"),
        ("hellaswag", SWAG | {"ctx": "A man", "label": 2}, "label: expected 0 to 1, found 2"),
        ("hellaswag", SWAG | {"ctx": "A", "endings": ["a", "[b]"]}, "endings: one is empty, and has no probability"),
        ("hellaswag", SWAG, "ctx: expected a text, found no 'ctx' but"),
        ("choices", GOOD | {"label": 1}, "fields: expected one of answer, label, found"),
        ("choices", GOOD | {"prompt": "a"}, "fields: expected one of question, context, prompt, found"),
        ("choices", GOOD | {"choices": ["a"]}, "endings: expected two or more, found 1"),
        ("choices", GOOD | {"choices": "ab"}, "choices: expected a list of texts, found"),
        ("choices", GOOD | {"answer": "c"}, "answer: 'c' is none of the endings"),
        ("choices", GOOD | {"choices": ["1", "0"], "answer": "1"}, "answer: '1' could mean several endings"),
        ("choices", GOOD | {"choices": ["B", "A"], "answer": "A"}, "answer: 'A' could mean several endings"),
        ("choices", GOOD | {"answer": True}, "answer: expected the number, the letter or the text of an ending"),
        ("choices", GOOD | {"answer": -1}, "label: expected 0 to 1, found -1"),
        ("choices", ARC | {"question": "Who?", "answerKey": "C"}, "answerKey: expected one of 1, 2, 3, found 'C'"),
        (
            "choices",
            {"question": "Who?", "choices": {"text": ["a"], "label": ["A", "B"]}, "answerKey": "A"},
            "choices: expected as many texts as labels, found 1 and 2",
        ),
        ("choices", {"goal": "Sit", "sol1": "down", "sol2": "up"}, "label: expected the number of the right ending"),
    ],
)
def test_a_row_that_is_none_is_refused_by_what_is_wrong_with_it(task, row, sentence):
    with pytest.raises(InputError) as caught:
        FORMS[task](row)
    assert str(caught.value).startswith(sentence)
