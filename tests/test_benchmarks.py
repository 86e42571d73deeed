"""The benchmarks run, say what they measured, and refuse what they do not know; how fast is not asked here."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import tf_generate, tf_train, tf_workers
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


def test_all_leaves_out_tensorflow(monkeypatch):
    monkeypatch.setattr(command, "NAMES", ["load", "tf_train"])
    assert command.chosen(["all"]) == ["load"] and command.chosen(["all", "tf_train"]) == ["load", "tf_train"]


TENSORFLOW = ("transformers", "transformers, XLA", "kerashub", "kerashub, XLA")


@pytest.fixture
def no_peers(monkeypatch):
    for variable in tf_workers.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


def test_tf_generate_reports_the_peers_that_are_not_there(no_peers, capsys):
    pytest.importorskip("tensorflow")
    rows = tf_generate.run(TINY, batches=(1,), prompt=4, new=3, count=1)
    what = "TensorFlow, generate, batch 1"
    assert [(row.what, row.who) for row in rows] == [(f"{what}, first call", OURS), (what, OURS)]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in said] == [["not measured", who] for who in TENSORFLOW]


def test_tf_train_measures_both_ways_to_compile(no_peers):
    pytest.importorskip("tensorflow")
    rows = tf_train.run(TINY, batch=1, length=8, count=1)
    assert [row.unit for row in rows] == ["s", "tokens/s"] * 2 and all(row.who == OURS for row in rows)


def test_peer_that_fails_is_reported_with_its_last_words(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GPT2_MULTI_PEER_KERASHUB", sys.executable)
    with tf_workers.running([("kerashub", "plain")], tmp_path) as workers:
        assert workers == {}
    said = capsys.readouterr().out
    assert said.startswith("not measured: kerashub: ModuleNotFoundError: No module named 'keras")


def test_this_library_has_to_run(monkeypatch, tmp_path, capsys):
    def run():
        with tf_workers.running([(OURS, "xla")], tmp_path / "nothing"):
            pass

    (tmp_path / "nothing").mkdir()
    monkeypatch.setitem(sys.modules, "benchmarks.dummy", SimpleNamespace(run=run))
    monkeypatch.setattr(command, "NAMES", ["dummy"])
    assert command.main(["dummy"]) == 1
    assert capsys.readouterr().err.startswith("gpt2_multi itself could not be measured: ")
