"""Questions with endings to choose from, as the published files of each task spell them.

What the model reads is what EleutherAI's lm_eval gives it for the same task, so that the figures can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpt2_multi.errors import InputError, described, shortened

Row = Mapping[str, Any]
CONTEXTS = ("question", "context", "prompt")
ENDINGS = ("choices", "endings")
ANSWERS = ("answer", "label")


@dataclass(frozen=True)
class Question:
    """A context, the endings that may follow it, and which of them is right; a space joins the two."""

    context: str
    endings: tuple[str, ...]
    gold: int


def lambada(row: Row) -> Question:
    """A passage whose last word is to be found: {"text"}, as OpenAI published it."""
    context, _, word = text_of(row, "text").rpartition(" ")
    if not context or not word:
        raise InputError("text: expected words, with one at the end that is to be found; mend the row")
    return Question(context, (word,), 0)


def hellaswag(row: Row) -> Question:
    """{"activity_label", "ctx_a", "ctx_b", "endings", "label"}; without the two parts, "ctx"."""
    if "ctx_a" in row and "ctx_b" in row:
        context = f"{text_of(row, 'ctx_a')} {text_of(row, 'ctx_b').capitalize()}"
    else:
        context = text_of(row, "ctx")
    endings = [cleaned(ending) for ending in texts_of(row, "endings")]
    return question(cleaned(f"{text_of(row, 'activity_label')}: {context}"), endings, number_of(row, "label"))


def cleaned(text: str) -> str:
    """Without the marks of WikiHow: a title ends a sentence, other brackets go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def choices(row: Row) -> Question:
    """A question of any file: ARC's and PIQA's are known by their fields, others have one field of each kind."""
    if "answerKey" in row:
        return arc(row)
    if "goal" in row:
        goal, endings = text_of(row, "goal"), [text_of(row, "sol1"), text_of(row, "sol2")]
        return question(f"Question: {goal}\nAnswer:", endings, number_of(row, "label"))
    context, endings = text_of(row, only(row, CONTEXTS)), texts_of(row, only(row, ENDINGS))
    name = only(row, ANSWERS)
    return question(context, endings, gold_of(name, row[name], endings))


def arc(row: Row) -> Question:
    """ARC, as AI2 published it, {"question": {"stem", "choices"}}, and as the hub has it, {"question", "choices"}."""
    asked = row.get("question")
    if isinstance(asked, Mapping):
        stem, each = text_of(asked, "stem"), asked.get("choices")
        each = each if isinstance(each, list) and all(isinstance(one, Mapping) for one in each) else []
        pairs = [(text_of(one, "label"), text_of(one, "text")) for one in each]
    else:
        stem, each = text_of(row, "question"), row.get("choices")
        table = each if isinstance(each, Mapping) else {}
        labels, endings = texts_of(table, "label"), texts_of(table, "text")
        if len(labels) != len(endings):
            raise InputError(f"choices: expected as many texts as labels, found {len(endings)} and {len(labels)}")
        pairs = list(zip(labels, endings, strict=True))
    labels, key = [label for label, _ in pairs], text_of(row, "answerKey")
    if labels.count(key) != 1:
        raise InputError(f"answerKey: expected one of {', '.join(labels) or 'the labels'}, found {key!r}; mend the row")
    return question(f"Question: {stem}\nAnswer:", [text for _, text in pairs], labels.index(key))


def question(context: str, endings: list[str], gold: int) -> Question:
    """A question whose endings can be compared."""
    if len(endings) < 2:
        raise InputError(f"endings: expected two or more, found {len(endings)}; leave the row out")
    if not all(endings):
        raise InputError("endings: one is empty, and has no probability; leave the row out")
    if not 0 <= gold < len(endings):
        raise InputError(f"label: expected 0 to {len(endings) - 1}, found {gold}; mend the row")
    return Question(context, tuple(endings), gold)


def gold_of(name: str, given: Any, endings: list[str]) -> int:
    """Which ending is right: its number from 0, its letter from A, or its text; InputError where it could be two."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    if not isinstance(given, str):
        raise InputError(f"{name}: expected the number, the letter or the text of an ending, found {described(given)}")
    found = {i for i, ending in enumerate(endings) if ending == given}
    if re.fullmatch(r"[0-9]{1,2}", given):
        found.add(int(given))
    elif re.fullmatch(r"[A-Z]", given) and ord(given) - ord("A") < len(endings):
        found.add(ord(given) - ord("A"))
    if len(found) != 1:
        which = "could mean several endings" if found else "is none of the endings"
        raise InputError(f"{name}: {shortened(given)!r} {which}; give the number of the right one, from 0")
    return found.pop()


def only(row: Row, names: tuple[str, ...]) -> str:
    """The one of these fields that a row has."""
    found = [name for name in names if name in row]
    if len(found) != 1:
        known = ", ".join(map(repr, list(row)[:9])) or "none"
        raise InputError(f"fields: expected one of {', '.join(names)}, found {shortened(known)}; rename the field")
    return found[0]


def text_of(row: Row, name: str) -> str:
    """A field that is a text."""
    if not isinstance(row.get(name), str):
        found = described(row[name]) if name in row else f"no {name!r} but {shortened(', '.join(map(repr, row)))}"
        raise InputError(f"{name}: expected a text, found {found}; is it a file of this task?")
    text: str = row[name]
    return text


def texts_of(row: Row, name: str) -> list[str]:
    """A field that is a list of texts."""
    given = row.get(name)
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        found = described(given) if name in row else f"no {name!r}"
        raise InputError(f"{name}: expected a list of texts, found {found}; is it a file of this task?")
    return given


def number_of(row: Row, name: str) -> int:
    """A field that is a number, or spells one; what is kept secret of a test set is neither."""
    given = row.get(name)
    if isinstance(given, str) and re.fullmatch(r"[0-9]{1,2}", given):
        return int(given)
    if isinstance(given, bool) or not isinstance(given, int):
        found = repr(given) if name in row else "none"
        raise InputError(f"{name}: expected the number of the right ending, found {found}; take a file with answers")
    return given


FORMS: Mapping[str, Callable[[Row], Question]] = {"lambada": lambada, "hellaswag": hellaswag, "choices": choices}
