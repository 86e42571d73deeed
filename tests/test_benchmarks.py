"""The benchmarks run, say what they measured, and refuse what they do not know; how fast is not asked here."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import OURS, Row, compare, rounds
from gpt2_multi.config import GPT2Config

TINY = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)


@pytest.fixture
def dummy(monkeypatch):
    rows = [Row("work", OURS, 2.0, "s", 1.0), Row("work", "peer", 5.0, "s", 2.5)]
    monkeypatch.setitem(sys.modules, "benchmarks.dummy", SimpleNamespace(run=lambda: rows))
    monkeypatch.setattr(command, "NAMES", ["dummy"])


def test_names_are_listed(dummy, capsys):
    assert command.main([]) == 0
    assert capsys.readouterr().out == "dummy\n"


@pytest.mark.parametrize("name", ["dummy", "all"])
def test_table(dummy, capsys, name):
    assert command.main([name]) == 0
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["what", "who", "value", "unit", "ratio"] in cells
    assert ["work", "peer", "5", "s", "2.50"] in cells


def test_json(dummy, tmp_path):
    assert command.main(["dummy", "--json", str(tmp_path / "rows.json")]) == 0
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["rows"][1] == {"what": "work", "who": "peer", "value": 5.0, "unit": "s", "ratio": 2.5}
    assert {"CPU", "cores", "Python", "numpy"} <= report["environment"].keys()


def test_unknown_name_is_one_sentence(dummy, capsys):
    assert command.main(["nothing"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "There is no benchmark 'nothing'; there are dummy, and all.\n"


def test_missing_peer_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(command, "NAMES", ["generate"])
    monkeypatch.setitem(sys.modules, "benchmarks.generate", None)
    assert command.main(["generate"]) == 1
    assert capsys.readouterr().err == "This benchmark needs a package that is not installed: benchmarks.generate.\n"


def test_peers_take_turns():
    calls = []
    peers = {OURS: lambda: calls.append("ours"), "peer": lambda: calls.append("theirs")}
    assert {who: len(seconds) for who, seconds in rounds("work", peers, 3).items()} == {OURS: 3, "peer": 3}
    assert calls == ["ours", "theirs"] * 4


def test_ratios_are_taken_within_rounds():
    ours, theirs = compare("work", {OURS: [1.0, 10.0, 1.0], "peer": [2.0, 20.0, 3.0]}, "s")
    assert (ours.value, ours.ratio, theirs.value, theirs.ratio) == (1.0, 1.0, 3.0, 2.0)
    assert compare("work", {OURS: [2.0]}, "tokens/s", 10)[0].value == 5.0


def test_generate_measures_equal_tokens():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks import generate

    rows = generate.run(TINY, batches=(1, 2), prompt=4, new=3, count=1)
    assert [(row.what, row.who) for row in rows] == [
        (f"generate, batch {batch}", who) for batch in (1, 2) for who in (OURS, "transformers")
    ]
    assert all(row.value > 0 and row.unit == "tokens/s" for row in rows)
