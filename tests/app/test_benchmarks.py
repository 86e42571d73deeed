"""The benchmarks run, say what they measured, and refuse what they do not know; how fast is not asked here."""

import importlib
import json
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import flax_generate, flax_train, peer_workers, tf_generate, tf_tokenizer, tf_train
from benchmarks.harness import OURS, Row, compare, draw, rounds
from benchmarks.peers import as_ids
from gpt2_multi.app import backends
from gpt2_multi.model.config import GPT2Config
from tests.support.shared_data import shared

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
    assert capsys.readouterr().err.startswith("The benchmark 'generate' needs a package that is not")


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

    rows = generate.run(TINY, batches=(1, 2), prompt=4, long=8, new=3, count=1)
    whats = [
        "generate, batch 1",
        "generate, batch 2",
        "generate, 4 beams",
        "generate, prompt lookup",
        "first token after 8",
    ]
    assert [(row.what, row.who) for row in rows] == [(what, who) for what in whats for who in (OURS, "transformers")]
    assert all(row.value > 0 and row.unit == ("s" if "first" in row.what else "tokens/s") for row in rows)


def test_batches_measures_every_backend_and_draws_them(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from benchmarks import batches

    rows = batches.run(TINY, batches=(2,), prompt=4, new=3, count=1)
    peers = [*(f"{OURS}, {backends.BACKENDS[name].title}" for name in backends.installed()), "transformers"]
    assert [(row.what, row.who) for row in rows] == [("batch 2", who) for who in peers]
    draw(rows, tmp_path / "rows.svg")
    picture = (tmp_path / "rows.svg").read_text()
    assert picture.startswith("<?xml") and picture.count("<path") > len(rows)


def test_all_leaves_out_jax_and_tensorflow(monkeypatch):
    monkeypatch.setattr(command, "NAMES", ["flax_train", "load", "tf_train"])
    assert command.chosen(["all"]) == ["load"] and command.chosen(["all", "tf_train"]) == ["load", "tf_train"]


@pytest.fixture
def no_peers(monkeypatch):
    for framework in (peer_workers.TF, peer_workers.FLAX):
        for name in ("transformers", "kerashub", "ctranslate2"):
            monkeypatch.delenv(framework.variable(name), raising=False)


class Here:
    """A worker that is no process of its own; what generates has some, whose start takes longer than all they do."""

    def __init__(self, framework, name, mode, folder, log):
        framework.python(name)  # raises where the peer is not there
        self.peer = importlib.import_module(f"benchmarks.{framework.peers}").PEERS[name](folder, mode == "xla")

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731

    def ask(self, what, first, *rest):
        return np.asarray(getattr(self.peer, what)(as_ids(first), *rest)).tolist()

    def answer(self):
        return f"{self.peer.package} {metadata.version(self.peer.package)}"


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(peer_workers, "Worker", Here)


@pytest.mark.parametrize(
    "package, title, benchmark, missing",
    [
        ("tensorflow", "TensorFlow", tf_generate, ["transformers", "transformers, XLA", "kerashub", "kerashub, XLA"]),
        ("flax", "JAX", flax_generate, ["transformers", "kerashub", "ctranslate2"]),
    ],
)
def test_generate_reports_the_peers_that_are_not_there(no_peers, capsys, package, title, benchmark, missing):
    pytest.importorskip(package)
    rows = benchmark.run(TINY, batches=(1,), prompt=4, new=3, count=1)
    what = f"{title}, generate, batch 1"
    assert [(row.what, row.who) for row in rows] == [(f"{what}, first call", OURS), (what, OURS)]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in said] == [["not measured", who] for who in missing]


def test_tf_train_measures_both_ways_to_compile(no_peers, in_process):
    pytest.importorskip("tensorflow")
    rows = tf_train.run(TINY, batch=1, length=8, count=1)
    assert [row.unit for row in rows] == ["s", "tokens/s"] * 2 and all(row.who == OURS for row in rows)


def test_tf_tokenizer_measures_texts_and_documents(no_peers, capsys):
    pytest.importorskip("tensorflow")
    shared("vocab", "gpt2")
    rows = tf_tokenizer.run(size=2000, documents=2, count=1)
    what = [f"TensorFlow, tokenize, {what}" for what in ("first call", "one text", "2 documents")]
    assert [(row.what, row.unit) for row in rows if row.who == OURS] == list(
        zip(what, ("s", "MB/s", "MB/s"), strict=True)
    )
    assert [row.what for row in rows if row.who == f"{OURS}, GPT2Tokenizer"] == what[1:]  # whose ids are the same
    assert "not measured: kerashub: " in capsys.readouterr().out


def test_tf_tokenizer_takes_what_peers_say_and_marks_other_ids():
    asked = []
    ours = SimpleNamespace(ask=lambda what, _: {"ids": [1, -1], "seconds": 2.0}[what])
    theirs = SimpleNamespace(ask=lambda what, _: asked.append(what) or {"ids": [2, -1], "seconds": 4.0}.get(what))
    rows = tf_tokenizer.measured("work", {OURS: ours, "keras-hub 1": theirs}, ["a" * 10**6], count=1)
    who = [OURS, "keras-hub 1 (DIFFERENT), cold", "keras-hub 1 (DIFFERENT), warm"]
    assert [(row.who, row.value, row.ratio) for row in rows] == list(
        zip(who, (0.5, 0.25, 0.25), (1, 2, 2), strict=True)
    )
    assert asked == ["ids", *(["first", "seconds", "seconds"] * 2)]


def test_flax_train_is_measured_beside_pytorch_with_the_same_loss(no_peers, in_process):
    pytest.importorskip("flax")
    pytest.importorskip("torch")
    rows = flax_train.run(TINY, batch=1, length=8, count=1)
    assert [(row.who, row.unit) for row in rows] == [
        (who, unit) for unit in ("s", "tokens/s") for who in (OURS, f"{OURS}, PyTorch")
    ]


def test_flax_compile_measures_scanned_layers_beside_the_others():
    pytest.importorskip("flax")
    from benchmarks import flax_compile

    rows = flax_compile.run(TINY, length=8)
    assert [(row.what, row.who) for row in rows] == [
        (f"JAX, compile {what}, 2 layers", who)
        for what in ("forward", "forward and backward")
        for who in (OURS, f"{OURS}, scan_layers")
    ]
    assert all(row.value > 0 and row.unit == "s" for row in rows)


def test_peer_that_fails_is_reported_with_its_last_words(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(peer_workers.TF.variable("kerashub"), sys.executable)
    with peer_workers.running(peer_workers.TF, [("kerashub", "plain")], tmp_path) as workers:
        assert workers == {}
    said = capsys.readouterr().out
    assert said.startswith("not measured: kerashub: ModuleNotFoundError: No module named 'keras")


def test_this_library_has_to_run(monkeypatch, tmp_path, capsys):
    def run():
        with peer_workers.running(peer_workers.FLAX, [(OURS, "plain")], tmp_path / "nothing"):
            pass

    (tmp_path / "nothing").mkdir()
    monkeypatch.setitem(sys.modules, "benchmarks.dummy", SimpleNamespace(run=run))
    monkeypatch.setattr(command, "NAMES", ["dummy"])
    assert command.main(["dummy"]) == 1
    assert capsys.readouterr().err.startswith("The benchmark 'dummy' cannot measure gpt2_multi itself: ")


def test_convert_measures_seconds_and_memory(no_peers):
    from benchmarks import convert

    rows = convert.run(TINY, count=1)
    assert [(row.who, row.unit) for row in rows] == [(OURS, "s"), (OURS, "MB")] * 3
    assert all(row.value > 0 for row in rows)
