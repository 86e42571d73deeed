"""The benchmarks run, say what they measured, and refuse what they do not know; how fast is not asked here."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import gpu
from benchmarks.generation import generate, growth, quantized
from benchmarks.harness import OURS, PeerError, Row, compare, floor, pictures, rounds
from benchmarks.harness.measuring import Case, Found, measure
from benchmarks.peers import __main__ as process
from benchmarks.peers import workers
from benchmarks.tokenizing import tf_tokenizer
from benchmarks.training import memory, train
from gpt2_multi.model.config import GPT2Config
from tests.support.shared_data import shared

TINY = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)


@pytest.fixture
def dummy(monkeypatch):
    rows = [Row("work", OURS, 2.0, "s", {OURS: 1.0}), Row("work", "peer", 5.0, "s", {OURS: 2.5})]
    monkeypatch.setitem(sys.modules, "benchmarks.dummy", SimpleNamespace(run=lambda: rows))
    monkeypatch.setattr(command, "MODULES", {"dummy": "benchmarks.dummy"})


def test_names_are_listed(dummy, capsys):
    assert command.main([]) == 0
    assert capsys.readouterr().out == "dummy\n"


def test_every_module_of_the_rooms_is_listed():
    there = {path.stem for room in command.ROOMS for path in Path(command.__file__).parent.glob(f"{room}/[a-z]*.py")}
    assert there == command.MODULES.keys()


@pytest.mark.parametrize("name", ["dummy", "all"])
def test_table_and_where_it_comes_from(dummy, capsys, name):
    assert command.main([name]) == 0
    said = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    assert ["what", "who", "value", "unit", "ratio"] in cells
    assert ["work", "peer", "5", "s", "2.50"] in cells
    assert "`python -m benchmarks dummy`, 20" in said and ", threads " in said


def test_json(dummy, tmp_path):
    assert command.main(["dummy", "--json", str(tmp_path / "rows.json")]) == 0
    report = json.loads((tmp_path / "rows.json").read_text())
    found = report["benchmarks"]["dummy"]
    assert found["rows"][1] == {"what": "work", "who": "peer", "value": 5.0, "unit": "s", "ratios": {OURS: 2.5}}
    assert found["command"].startswith("python -m benchmarks dummy, 20")
    assert {"CPU", "cores", "threads", "Python", OURS, "numpy"} <= report["environment"].keys()


def test_unknown_name_is_one_sentence(dummy, capsys):
    assert command.main(["nothing"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "There is no benchmark 'nothing'; there are dummy, and all.\n"


def test_missing_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, command.MODULES["load"], None)
    assert command.main(["load"]) == 1
    assert capsys.readouterr().err.startswith("The benchmark 'load' needs a package that is not")


def test_option_that_a_benchmark_has_not_is_one_sentence(dummy, capsys):
    assert command.main(["dummy", "--who", "JAX"]) == 1
    assert capsys.readouterr().err == "The benchmark 'dummy' cannot be measured: it takes no --who; leave them out\n"


def test_peers_take_turns():
    calls = []
    peers = {OURS: lambda: calls.append("ours"), "peer": lambda: calls.append("theirs")}
    assert {who: len(seconds) for who, seconds in rounds("work", peers, 3).items()} == {OURS: 3, "peer": 3}
    assert calls == ["ours", "theirs"] * 4
    assert len(rounds("work", peers, 5, patience=0)[OURS]) == 2


def test_ratios_are_taken_within_rounds_for_each_of_ours():
    ours, theirs = compare("work", {OURS: [1.0, 10.0, 1.0], "peer": [2.0, 20.0, 3.0]}, "s")
    assert (ours.value, ours.ratios, theirs.value, theirs.ratios) == (1.0, {OURS: 1.0}, 3.0, {OURS: 2.0})
    assert compare("work", {OURS: [2.0]}, "tokens/s", 10)[0].value == 5.0
    pair = {f"{OURS}, PyTorch": [1.0], f"{OURS}, JAX": [4.0], "peer": [2.0]}
    assert compare("work", pair, "s")[2].ratios == {f"{OURS}, PyTorch": 2.0, f"{OURS}, JAX": 0.5}


class Here:
    """A worker that is no process of its own: what starts and imports takes longer than all that is asked of it."""

    def __init__(self, peer, folder, log):
        self.compiles = peer.compiles
        self.peer = process.made(peer.place, str(folder), *peer.modes, peer.kind)

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731

    def ask(self, *call):
        found = process.answered(self.peer, *json.loads(json.dumps(call)))
        if "error" in found:
            raise PeerError(found["error"])
        return found["result"]

    def answer(self):
        return process.version(self.peer.package)


LIBRARIES = {"TensorFlow": "tensorflow", "JAX": "flax", "PyTorch": "torch"}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(workers, "Worker", Here)


def test_generate_measures_equal_tokens_and_the_floor(here):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    rows = generate.run(TINY, batches=(1,), prompt=4, long=8, new=3, count=1, who=["PyTorch", "transformers"])
    both = (f"{OURS}, PyTorch", workers.TRANSFORMERS.title(process.version("transformers")))
    wanted = [
        *(("greedy, batch 1", who) for who in (*both, floor.FLOOR)),
        *(("sampled, batch 1", who) for who in both),
        ("sampled, batch 1, its rules", both[0]),
        *((what, who) for what in ("4 beams", "prompt lookup", "first token after 8") for who in both),
    ]
    assert [(row.what, row.who) for row in rows] == wanted  # none is marked as different
    assert all(row.value > 0 for row in rows if row.unit in ("s", "tokens/s"))


@pytest.mark.parametrize("name", ["TensorFlow", "JAX"])
def test_growth_takes_off_what_the_text_before_costs(here, monkeypatch, tmp_path, name):
    pytest.importorskip(LIBRARIES[name])
    seconds = {1: 3.0, 3: 7.0}  # of so many tokens
    monkeypatch.setattr(growth, "measure", timed(growth.measure, seconds))
    rows = growth.run(TINY, lengths=(4,), new=2, count=1, who=[name])
    who = f"{OURS}, {name}"
    found = {(row.what, row.who): row.value for row in rows if row.who == who}
    assert found == {("a token after 4", who): 2000.0, ("from 4 to 4", who): 1.0}


def timed(measured, seconds):
    """`measure`, with these seconds in the place of what the calls took."""

    def measure(cases, *rest):
        for found in measured(cases, *rest):
            yield replace(found, seconds={who: [seconds[found.case.tokens]] for who in found.seconds})

    return measure


def test_rules_are_what_sampling_adds_in_the_same_rounds():
    who = f"{OURS}, JAX"
    greedy, sampled = (
        Found(Case(what, (), 1), {who: took, "peer": took}, set())
        for what, took in (("greedy", [1.0, 10.0, 1.0]), ("sampled", [1.1, 11.0, 2.0]))
    )
    (row,) = generate.rules([greedy, sampled])
    assert (row.what, row.who, row.unit, round(row.value, 6)) == ("sampled, its rules", who, "% of a step", 10.0)


@pytest.mark.parametrize("who", [["PyTorch", "nanoGPT", "transformers"], ["TensorFlow"], ["JAX"]])
def test_train_measures_equal_losses(here, who):
    pytest.importorskip(LIBRARIES.get(who[0]))
    pytest.importorskip("transformers" if "transformers" in who else "numpy")
    rows = train.run(TINY, shapes=((1, 8),), count=1, kinds=["float32"], who=who)
    assert [row.what for row in rows] == ["float32, 1 x 8"] * (2 if who == ["TensorFlow"] else len(who))  # and XLA
    assert all(row.value > 0 and "DIFFERENT" not in row.who for row in rows)


def test_memory_is_that_of_a_process(here):
    pytest.importorskip("torch")
    rows = memory.run(TINY, shapes=((1, 8),), who=["PyTorch"])
    who = [f"{OURS}, PyTorch", f"{OURS}, PyTorch, whole logits"]
    assert [(row.what, row.who, row.unit) for row in rows] == [("peak, 1 x 8", name, "MB") for name in who]
    assert all(row.value > 50 for row in rows)


def test_quantized_measures_each_kind_and_the_loss(here):
    pytest.importorskip("torch")
    rows = quantized.run(TINY, batches=(1,), prompt=4, new=3, count=1, kinds=["float32", "bfloat16"], who=["PyTorch"])
    found = {row.what: row for row in rows if row.who == f"{OURS}, PyTorch"}
    assert found.keys() >= {"float32, batch 1", "bfloat16, batch 1", "bfloat16, loss of random ids"}
    assert 0 < abs(found["bfloat16, loss of random ids"].value) < 5


def test_peer_that_cannot_do_it_is_reported_and_one_that_differs_is_marked(capsys):
    def worker(answer):
        def ask(*_):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return SimpleNamespace(ask=ask, compiles=True)

    others = {"peer": worker([1, 3]), "same": worker([1, 2]), "lame": worker(PeerError("it has none"))}
    (found,) = measure([Case("work", ("generate",), 2)], {f"{OURS}, JAX": worker([1, 2])} | others, 2)
    assert [row.who for row in found.rows()] == [f"{OURS}, JAX", "peer (DIFFERENT)", "same"]
    assert capsys.readouterr().out == "not measured: lame, work: it has none\n"


@pytest.mark.parametrize("draw, what", [(pictures.bars, "work"), (growth.draw, "a token after 8")])
def test_pictures(tmp_path, draw, what):
    pytest.importorskip("matplotlib")
    rows = [Row(what, who, 3.0, "ms", {f"{OURS}, JAX": 1.0}) for who in (f"{OURS}, JAX", "peer")]
    draw(rows, tmp_path / "a" / "rows.svg", "where it comes from")
    picture = (tmp_path / "a" / "rows.svg").read_text()
    assert picture.startswith("<?xml") and all(text in picture for text in ("peer", f"{OURS}, JAX", "where it comes"))


def test_tf_tokenizer_measures_texts_and_documents(monkeypatch):
    pytest.importorskip("tensorflow")
    shared("vocab", "gpt2")
    ours = [peer for peer in tf_tokenizer.PEERS if peer.name.startswith(OURS)]
    monkeypatch.setattr(tf_tokenizer, "PEERS", ours)
    rows = tf_tokenizer.run(size=2000, documents=2, count=1)
    what = [f"TensorFlow, tokenize, {what}" for what in ("first call", "one text", "2 documents")]
    assert [(row.what, row.unit) for row in rows if row.who == OURS] == list(
        zip(what, ("s", "MB/s", "MB/s"), strict=True)
    )
    assert [row.what for row in rows if row.who == f"{OURS}, GPT2Tokenizer"] == what[1:]  # whose ids are the same


def test_tf_tokenizer_takes_what_peers_say_and_marks_other_ids():
    asked = []
    ours = SimpleNamespace(ask=lambda what, _: {"ids": [1, -1], "seconds": 2.0}[what])
    theirs = SimpleNamespace(ask=lambda what, _: asked.append(what) or {"ids": [2, -1], "seconds": 4.0}.get(what))
    rows = tf_tokenizer.measured("work", {OURS: ours, "KerasHub 1": theirs}, ["a" * 10**6], count=1)
    who = [OURS, "KerasHub 1 (DIFFERENT), cold", "KerasHub 1 (DIFFERENT), warm"]
    assert [(row.who, row.value, row.ratios[OURS]) for row in rows] == list(
        zip(who, (0.5, 0.25, 0.25), (1, 2, 2), strict=True)
    )
    assert asked == ["ids", *(["first", "seconds", "seconds"] * 2)]


def test_flax_compile_measures_scanned_layers_beside_the_others():
    pytest.importorskip("flax")
    from benchmarks.training import flax_compile

    rows = flax_compile.run(TINY, length=8)
    assert [(row.what, row.who) for row in rows] == [
        (f"JAX, compile {what}, 2 layers", who)
        for what in ("forward", "forward and backward")
        for who in (OURS, f"{OURS}, scan_layers")
    ]
    assert all(row.value > 0 and row.unit == "s" for row in rows)


def test_peer_that_fails_is_reported_with_its_last_words(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(workers.KERASHUB.variable, sys.executable)
    nobody = replace(workers.KERASHUB, place="engines:Nobody")
    with workers.running([nobody, workers.TRANSFORMERS_TF], tmp_path) as running:
        assert running == {}
    said = capsys.readouterr().out
    assert said.startswith("not measured: KerasHub: AttributeError: module 'benchmarks.peers.engines' has no attribute")
    assert said.count("\n") == 1  # the other has no Python of its own, and is not asked for


def test_peers_are_chosen_by_how_their_names_begin(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(workers.TRANSFORMERS_TF.variable, raising=False)
    with workers.running([workers.TRANSFORMERS_TF], tmp_path, ["transformers (TensorFlow)"]) as running:
        assert running == {}
    assert "GPT2_MULTI_PEER_TF_TRANSFORMERS names no Python" in capsys.readouterr().out
    with pytest.raises(PeerError, match="nobody's name begins with 'Torch'; there are PyTorch, "):
        workers.check(["JAX", "Torch"])


def test_convert_measures_seconds_and_memory(monkeypatch):
    from benchmarks.files import convert

    for peer in (workers.TRANSFORMERS_TF, workers.TRANSFORMERS_FLAX):
        monkeypatch.delenv(peer.variable, raising=False)
    rows = convert.run(TINY, count=1)
    assert [(row.who, row.unit) for row in rows] == [(OURS, "s"), (OURS, "MB")] * 3
    assert all(row.value > 0 for row in rows)


def test_rows_of_a_gpu_stand_beside_those_of_transformers():
    rows = [
        {"what": "a token", "who": OURS, "value": 2.0, "unit": "ms/token"},
        {"what": "a token", "who": "transformers", "value": 3.0, "unit": "ms/token"},
        {"what": "training", "who": OURS, "value": 30.0, "unit": "tokens/s"},
        {"what": "training", "who": "transformers", "value": 20.0, "unit": "tokens/s"},
        {"what": "jax", "who": "all", "error": "ended after 9 s"},
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gpu.table(rows).splitlines()[2:]]
    assert [row[-1] for row in cells] == ["1.50", "", "1.50", "", ""]
    assert cells[-1][:4] == ["jax", "all", "not measured", "ended after 9 s"]


def test_parts_of_a_gpu_that_fail_are_rows(monkeypatch):
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **how: Ended())
    assert gpu.measured("jax", True, 9, sys.stdout)[-1] == {"what": "jax", "who": "all", "error": "ended with 3"}


class Ended:
    """A process that said something, and then failed."""

    stdout, returncode = ('{"what": "a", "who": "b", "value": 1, "unit": "s"}\n', "Traceback\n"), 3

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self):
        pass

    kill = wait
