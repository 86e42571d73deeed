"""The command `evaluate`: on every backend, from files, and on after it was stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gpt2_multi.app.evaluate import records, running
from gpt2_multi.app.evaluate.measures.perplexity import Perplexity
from gpt2_multi.app.evaluate.measures.tasks import Task
from gpt2_multi.app.evaluate.records import Records
from gpt2_multi.errors import InputError
from gpt2_multi.files.documents import find
from tests.app.conftest import good, refusal
from tests.app.evaluate.conftest import CONFIG

TEXTS = ["What say you, my lord? " * 3, "", "é日😀", "To be", "or not", "to be: that is the question", "?"]
QUESTIONS = [{"question": f"Who is {i}?", "choices": ["me", "you, é"], "answer": i % 2} for i in range(5)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of texts."""
    return lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


class Source:
    """A model that is there."""

    def __init__(self, scorer: Any) -> None:
        self.scorer, self.loads = scorer, 0

    def load(self) -> Any:
        self.loads += 1
        return self.scorer


def test_every_backend_gives_the_oracles_figures(backend, tiny, data, tmp_path, scorer):
    folder, _ = tiny
    options = ("--backend", backend.__name__, "--device", "cpu", "--json")
    measure = Perplexity().settled(CONFIG)
    expected = measure.summary(measure.measure(TEXTS, scorer))
    found = json.loads(good("evaluate", folder, data, *options, "--batch-size", "3"))
    assert found.keys() - expected.keys() == {"measure", "length", "stride", "start"}
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-5), name
    task = lines(tmp_path / "questions.jsonl", QUESTIONS)
    figures = json.loads(good("evaluate", folder, task, "--task", "choices", *options))
    expected = Task("choices").summary(
        Task("choices").measure([Task("choices").parse(row) for row in QUESTIONS], scorer)
    )
    assert figures == {"measure": "choices", **expected}


def test_figures_are_printed_for_people(tiny, data, tmp_path):
    pytest.importorskip("torch")
    folder, _ = tiny
    (tmp_path / "one.txt").write_text("a b")
    shown = good("evaluate", folder, tmp_path / "one.txt", data, "--backend", "pt", "--limit", "2", "--length", "8")
    assert "documents        2\ntokens           72\nbytes            72\n" in shown and "bits per byte    " in shown
    task = lines(tmp_path / "questions.jsonl", QUESTIONS)
    shown = good("evaluate", folder, task, "--task", "choices", "--backend", "pt")
    assert " ± 0." in shown
    assert shown == good("evaluate", folder, "-", "--task", "choices", "--backend", "pt", stdin=task.read_text())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ("{data}", "--task", "lambada", "--stride", "3"),
            2,
            "--task lambada has no use for --stride, which would change nothing",
        ),
        (("{data}", "--task", "lambada", "--no-start"), 2, "--task lambada has no use for --no-start, which would"),
        (("{data}", "--greedy", "--seed", "1"), 2, "perplexity has no use for --greedy, --seed, which would change"),
        (("{data}", "--task", "generate"), 2, "--task generate needs --output, the file that the texts go to"),
        (("{data}", "--task", "generate", "--max-new-tokens", "32", "--output", "x.jsonl"), 1, "found 32"),
        (("{data}", "--length", "99"), 1, "length: expected 2 to 32, which the model can read at once, found 99"),
        (("{data}", "--task", "choices"), 1, "texts.jsonl, line 1: fields: expected one of question, context, prompt"),
        (("{data}", "--device", "cuda:9"), 1, "device: PyTorch has "),
        (("{data}", "--output", "{data}.txt"), 1, "output: expected a name that ends in .jsonl"),
        (("{data}", "--output", "nowhere/x.jsonl"), 1, "output: there is no folder nowhere; make it"),
        (("{data}", "--field", "body"), 1, "texts.jsonl, line 1: expected the field 'body', found 'text'"),
        (("nothing.txt",), 1, "nothing.txt: no such file or folder"),
        ((), 2, "Missing argument 'DATA...'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tiny, data, arguments, code, words):
    pytest.importorskip("torch")
    given = [each.format(data=data) for each in arguments]
    assert words in refusal("evaluate", tiny[0], *given, *(["--backend", "pt"] if given else []), code=code)


def results(data: Path, scorer: Any, output: Path | None, limit: int | None = None, **run: Any) -> list[Any]:
    """What a run gives, with so many blocks of two documents; `after` of them it is killed, in the middle of a line."""
    source, measure = Source(scorer), Perplexity().settled(CONFIG)
    compute = running.in_process(source, measure, int)  # type: ignore[arg-type]
    items = running.texts(find([data]).files, None)
    if output is None:
        return list(running.results(items, limit, compute, None))
    with Records(output, run) as kept:
        found = list(running.results(items, limit, compute, kept))
        kept.finish({"loads": source.loads}, len(found))
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two documents."""
    monkeypatch.setattr(records, "DOCUMENTS", 2)


def test_one_run_at_a_time_writes_its_results(data, tmp_path, scorer):
    pytest.importorskip("fcntl")
    output = tmp_path / "kept.jsonl"
    with Records(output, {}), pytest.raises(InputError, match="another process writes there"):
        Records(output, {"model": "another"})
    assert json.loads((tmp_path / "kept.json").read_text())["run"] == {}
    assert len(results(data, scorer, output)) == 7


def test_a_run_that_was_stopped_goes_on_and_writes_the_same_bytes(small_blocks, data, tmp_path, scorer):
    expected = results(data, scorer, tmp_path / "whole.jsonl")
    assert [each["document"] for each in expected] == [*range(7)] and expected == results(data, scorer, None)
    assert expected[1]["source"] == f"{data}, document 2"
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == expected
    part, beside = tmp_path / "part.jsonl", tmp_path / "part.json"
    for size in range(0, len(whole), 97):  # killed at any byte
        part.write_bytes(whole[:size])
        beside.write_bytes((tmp_path / "whole.json").read_bytes())
        scorer.row.shapes.clear()
        assert results(data, scorer, part) == expected and part.read_bytes() == whole
        done = whole[:size].count(b"\n") // 2 * 2
        assert sum(rows for rows, _ in scorer.row.shapes) == sum(map(windows, TEXTS[done:])), (
            "what is there is computed"
        )
    assert json.loads(beside.read_text())["figures"] == {"loads": 1}
    assert results(data, scorer, part) == expected and json.loads(beside.read_text())["figures"] == {"loads": 0}


def windows(text: str) -> int:
    """How many windows of 32 tokens a text has, half of them new."""
    return 0 if not text else 1 + max(0, math.ceil((len(text.encode()) + 1 - 32) / 16))


def test_results_of_another_run_are_not_gone_on_with(small_blocks, data, tmp_path, scorer):
    output = tmp_path / "out.jsonl"
    results(data, scorer, output, stride=16)
    with pytest.raises(InputError, match=r"out.jsonl is of another run \(stride 16, not 8\); name another file"):
        results(data, scorer, output, stride=8)
    with pytest.raises(InputError, match="has 7 results, the data 3; give all the data"):
        results(data, scorer, output, limit=3, stride=16)
    lines(data, [{"text": text} for text in [TEXTS[0], "other", *TEXTS[2:]]])
    with pytest.raises(InputError, match=r"output: line 2 of .* is of another document than .*, document 2"):
        results(data, scorer, output, stride=16)
    (tmp_path / "out.json").unlink()
    with pytest.raises(InputError, match=r"is there, and no out.json that says of what run; move it"):
        results(data, scorer, output, stride=16)


def test_data_that_has_grown_is_measured_to_its_end(small_blocks, data, tmp_path, scorer):
    output = tmp_path / "out.jsonl"
    results(data, scorer, output)
    lines(data, [{"text": text} for text in [*TEXTS, "more", "and more"]])
    assert results(data, scorer, output) == results(data, scorer, None)
    assert output.read_bytes().count(b"\n") == 9


def test_the_command_goes_on_too_and_says_what_was_measured(tiny, data, tmp_path):
    pytest.importorskip("torch")
    folder, _ = tiny
    output = tmp_path / "out.jsonl"
    command = ("evaluate", folder, data, "--backend", "pt", "--device", "cpu", "--json", "--output", output)
    first = good(*command)
    written = output.read_bytes()
    output.write_bytes(written[:300])
    assert good(*command) == first and output.read_bytes() == written
    beside = json.loads((tmp_path / "out.json").read_text())
    assert beside["run"]["stride"] == 16 and beside["run"]["backend"] == "pt" and beside["figures"]["documents"] == 7
    assert "is of another run (dtype 'float32', not 'bfloat16')" in refusal(*command, "--dtype", "bfloat16")


@pytest.mark.parametrize("options", [("--greedy",), ("--seed", "3")])
def test_texts_are_those_of_generate_and_a_stopped_run_goes_on(tiny, tmp_path, options):
    pytest.importorskip("torch")
    folder, _ = tiny
    prompts = lines(tmp_path / "prompts.jsonl", [{"text": text} for text in ("ab", "What say you", "", "é", "ab")])
    common = ("--backend", "pt", "--max-new-tokens", "5", *options)
    output, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    shown = good("evaluate", folder, prompts, "--task", "generate", "--batch-size", "2", "--output", output, *common)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    good("generate", "--model", folder, "--prompts", prompts, "--field", "text", "--output", other, *common)
    expected = [json.loads(line) for line in other.read_text().splitlines()]
    assert [(each["prompt"], each["completion"]) for each in found] == [
        (each["prompt"], each["completion"]) for each in expected
    ]
    assert f"characters       {sum(len(each['completion']) for each in found)}" in shown
    whole = output.read_bytes()
    output.write_bytes(whole[:99])
    good("evaluate", folder, prompts, "--task", "generate", "--batch-size", "2", "--output", output, *common)
    assert output.read_bytes() == whole


def test_a_block_without_memory_says_where_and_what_to_do(data, scorer, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(scorer.row, "log_probs", fail)
    with pytest.raises(
        InputError, match=r"document 1, or one of 6 after it: the memory does not suffice; give a small"
    ):
        results(data, scorer, None)


def test_who_interrupts_a_run_is_told_that_it_can_go_on(tiny, data, tmp_path, monkeypatch):
    pytest.importorskip("torch")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Perplexity, "measure", stop)
    said = refusal("evaluate", tiny[0], data, "--output", tmp_path / "out.jsonl", "--backend", "pt", code=130)
    assert said == "interrupted; the same command goes on"
