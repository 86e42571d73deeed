"""docs/migration.md keeps to what the library says: every sentence of its tables is one that a call ends in."""

import pickle
import re
from pathlib import Path

import pytest

from gpt2_multi import GenerationConfig, GPT2Config, GPT2Tokenizer, pipeline
from gpt2_multi.errors import InputError
from gpt2_multi.generation.config.table import UNSUPPORTED

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "migration.md").read_text("utf-8")
ROW = re.compile(r"^\| (.+) \| (.+) \|$", re.MULTILINE)


def rows(heading):
    """The rows of the table whose first line this is, as pairs of cells."""
    body = PAGE.split(f"{heading}\n|---|---|\n")[1].split("\n\n")[0]
    return ROW.findall(body + "\n")


def names(cell):
    return re.findall(r"`(\w+)", cell)


OPTIONS = rows("| option | what the error says |")
STOPS = rows("| call | the sentence |")


@pytest.mark.parametrize(("cell", "sentence"), OPTIONS, ids=[cell for cell, _ in OPTIONS])
def test_a_refused_option_says_what_its_row_says(cell, sentence):
    for name in names(cell):
        with pytest.raises(InputError) as found:
            GenerationConfig(**{name: 3})  # which is off for none of them
        assert str(found.value) == f"{name}: is not an option here; leave it out, and {sentence}"


def test_every_refused_option_has_its_row():
    assert sorted(name for cell, _ in OPTIONS for name in names(cell)) == sorted(UNSUPPORTED)


@pytest.fixture(scope="module")
def scope():
    """What the calls of the last table speak of."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("jinja2")
    from gpt2_multi import GPT2ForSequenceClassification, GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained("demo"), GPT2Tokenizer.from_pretrained("demo")
    small = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return {
        "GPT2Config": GPT2Config,
        "classifier": GPT2ForSequenceClassification(small),
        "generator": pipeline("text-generation", model, tokenizer),
        "ids": torch.tensor([[5, 9, 7]]),
        "model": model,
        "pickle": pickle,
        "pipeline": pipeline,
        "tokenizer": tokenizer,
        "torch": torch,
    }


@pytest.mark.parametrize(("cell", "sentence"), STOPS, ids=[cell for cell, _ in STOPS])
def test_a_call_that_stops_says_what_its_row_says(scope, cell, sentence):
    with pytest.raises(Exception) as found:
        exec(cell.strip("`"), scope)
    assert str(found.value) == sentence
