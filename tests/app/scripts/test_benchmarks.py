"""The benchmarks run, say what they measured, and refuse what they do not know; how fast is not asked here."""

import importlib
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import gpu
from benchmarks.files import imports
from benchmarks.generation import generate, growth, quantized
from benchmarks.harness import OURS, PeerError, Row, compare, folders, pictures, reports, rounds
from benchmarks.harness.measuring import Case, Found, measure
from benchmarks.harness.rows import FLOOR
from benchmarks.peers import __main__ as process
from benchmarks.peers import workers
from benchmarks.tokenizing import tf_tokenizer, tokenizer
from benchmarks.training import memory, train
from gpt2_multi.model.config import GPT2Config
from tests.support.shared_data import shared

TINY = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)


@pytest.fixture
def dummy(monkeypatch):
    rows = [Row("work", OURS, 2.0, "s", {OURS: 1.0}, 3), Row("work", "peer", 5.0, "s", {OURS: 2.5}, 3)]
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
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert cells == [
        ["", OURS, "peer", "rounds"],
        [set_off(cell) for cell in cells[1]],
        ["work, s", "2", "5 (2.50)", "3"],
    ]
    assert said.startswith("`python -m benchmarks dummy`, 20") and "threads " in said


def set_off(cell):
    """What Markdown has below the head of a column."""
    assert len(cell) > 0
    return "-" * len(cell)


def test_brackets_have_the_ratio_of_each_of_ours_and_the_floor_is_last():
    first, second = f"{OURS}, PyTorch", f"{OURS}, JAX"
    rows = [
        Row("a", FLOOR, 1234.5, "s", {first: 0.5, second: 0.25}),
        Row("a", first, 3.0, "s", {first: 1.0, second: 0.5}),
        Row("b", second, 0.0123, "s", {second: 1.0}, rounds=2),
        Row("b", "peer", 7.0, "s", {second: 2.0}, rounds=2, differs=True),
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reports.table(rows)]
    assert cells[0] == ["", first, second, "peer", FLOOR, "rounds"]
    assert cells[2:] == [
        ["a, s", "3", "", "", "1,234 (0.50 · 0.25)", "1"],
        ["b, s", "", "0.0123", "7 (- · 2.00) DIFFERENT", "", "2"],
    ]


def test_json(dummy, tmp_path):
    assert command.main(["dummy", "--json", str(tmp_path / "rows.json")]) == 0
    report = json.loads((tmp_path / "rows.json").read_text())
    found = report["benchmarks"]["dummy"]
    values = {"what": "work", "who": "peer", "value": 5.0, "unit": "s", "ratios": {OURS: 2.5}}
    assert found["rows"][1] == values | {"rounds": 3, "differs": False}
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


@pytest.mark.parametrize("name", list(command.MODULES))
def test_small_is_what_a_benchmark_takes(name):
    try:
        module = importlib.import_module(command.MODULES[name])
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs {error.name}")
    assert module.SMALL and module.SMALL.keys() <= inspect.signature(module.run).parameters.keys()


def test_option_that_a_benchmark_has_not_is_one_sentence(dummy, capsys):
    assert command.main(["dummy", "--who", "JAX"]) == 1
    assert capsys.readouterr().err == "The benchmark 'dummy' cannot be measured: it takes no --who; leave that out\n"


def test_peers_take_turns():
    calls = []
    peers = {OURS: lambda: calls.append("ours"), "peer": lambda: calls.append("theirs")}
    assert {who: len(seconds) for who, seconds in rounds("work", peers, 3).items()} == {OURS: 3, "peer": 3}
    assert calls == ["ours", "theirs"] * 4
    assert len(rounds("work", peers, 5, patience=0)[OURS]) == 1


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
        self.called = {"result": process.version(self.peer.package)}

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731

    def send(self, *call):
        self.called = process.answered(self.peer, *json.loads(json.dumps(call)))

    def answer(self):
        if "error" in self.called:
            raise PeerError(self.called["error"])
        return self.called["result"]

    ask = workers.Worker.ask


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
        *(("greedy, batch 1", who) for who in (*both, FLOOR)),
        *(("sampled, batch 1", who) for who in both),
        ("sampled, batch 1, its rules", both[0]),
        *((what, who) for what in ("4 beams", "prompt lookup", "first token after 8") for who in both),
    ]
    assert [(row.what, row.who) for row in rows] == wanted  # none is marked as different
    assert all(row.value > 0 for row in rows if row.unit in ("s", "tokens/s"))


@pytest.mark.parametrize("name", ["TensorFlow", "JAX"])
def test_growth_takes_off_what_the_text_before_costs(here, monkeypatch, tmp_path, name):
    pytest.importorskip(LIBRARIES[name])
    seconds = {1: 3.0, 3: 7.0, 5: 15.0}  # of so many tokens
    monkeypatch.setattr(growth, "measure", timed(growth.measure, seconds))
    rows = growth.run(TINY, lengths=(4, 6), new=2, whole=5, count=1, who=[name])
    found = {row.what: row.value for row in rows if row.who == f"{OURS}, {name}"}
    first, last, whole = "a token after 4", "a token after 6", "a token of 5 in one call"
    assert found == {first: 2000, last: 2000, whole: 3000, f"{last} / {first}": 1, f"{whole} / {first}": 1.5}


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
    (row,) = generate.rules(greedy, sampled)
    assert (row.what, row.who, row.unit, round(row.value, 6)) == ("sampled, its rules", who, "% of a step", 10.0)


@pytest.mark.parametrize("who", [["PyTorch", "nanoGPT", "transformers"], ["TensorFlow"], ["JAX"]])
def test_train_measures_equal_losses(here, who):
    pytest.importorskip(LIBRARIES.get(who[0]))
    pytest.importorskip("transformers" if "transformers" in who else "numpy")
    rows = train.run(TINY, shapes={"float32": ((1, 8),)}, count=1, who=who)
    assert [row.what for row in rows] == ["float32, 1 x 8"] * (2 if who == ["TensorFlow"] else len(who))  # and XLA
    assert all(row.value > 0 and not row.differs for row in rows)


@pytest.mark.parametrize("peer", [workers.TENSORFLOW, workers.JAX])
def test_whole_logits_train_alike(here, peer):
    pytest.importorskip(LIBRARIES[peer.name.removeprefix(f"{OURS}, ")])
    ids = [[1, 2, 3, 4, 5, 6, 7, 8]]
    with (
        folders.written(folders.plain(TINY)) as folder,
        workers.running([peer, peer("whole logits")], folder) as running,
    ):
        plain, whole = ([worker.ask("train", ids) for _ in range(3)] for worker in running.values())
    assert plain == pytest.approx(whole, rel=1e-4) and plain[2] < plain[0]


def test_memory_is_that_of_a_process(here):
    pytest.importorskip("torch")
    rows = memory.run(TINY, shapes=((1, 8),), who=["PyTorch"])
    who = [f"{OURS}, PyTorch", "PyTorch, whole logits"]
    assert [(row.what, row.who, row.unit) for row in rows] == [("peak, 1 x 8", name, "MB") for name in who]
    assert all(row.value > 50 for row in rows)


def test_quantized_measures_each_kind_and_the_loss(here):
    pytest.importorskip("torch")
    shared("text", "tinyshakespeare.txt")
    few = {"batches": (1,), "prompt": 4, "new": 3, "count": 1, "texts": 1}
    rows = quantized.run(TINY, **few, kinds=["float32", "bfloat16"], who=["PyTorch"])
    found = {row.what: row for row in rows if row.who == f"{OURS}, PyTorch"}
    speeds = {"float32, batch 1", "bfloat16, batch 1", "bfloat16, batch 1, of its float32"}
    losses = {"bfloat16, loss of random ids", "bfloat16, loss of demo model, Shakespeare"}
    assert found.keys() == speeds | losses
    assert all(0 < abs(found[loss].value) < 5 for loss in losses)


def test_peer_that_cannot_do_it_is_reported_and_one_that_differs_is_marked(capsys):
    def worker(answer, compiles=True):
        def ask(*_):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return SimpleNamespace(ask=ask, answer=ask, send=lambda *call: sent.append(answer), compiles=compiles)

    sent = []
    others = {"peer": worker([1, 3], False), "same": worker([1, 2]), "lame": worker(PeerError("it has none"))}
    (found,) = measure([Case("work", ("generate",), 2)], {f"{OURS}, JAX": worker([1, 2])} | others, 2)
    assert [(row.who, row.differs) for row in found.rows()] == [
        (f"{OURS}, JAX", False),
        ("peer", True),
        ("same", False),
    ]
    assert capsys.readouterr().out == "not measured: lame, work: it has none\n"
    assert sent[-1] == [1, 3]  # who does not compile is alone


@pytest.mark.parametrize("draw", [pictures.bars, quantized.draw])
def test_pictures(tmp_path, draw):
    pytest.importorskip("matplotlib")
    rows = [Row("work", who, 3.0, "tokens/s", {f"{OURS}, JAX": 1.0}) for who in (f"{OURS}, JAX", "peer", FLOOR)]
    draw([*rows, Row("more", "peer", 3.0, "tokens/s")], tmp_path / "a" / "rows.svg", "where it comes from")
    picture = (tmp_path / "a" / "rows.svg").read_text()
    texts = ("peer", "JAX", "3 (1.00)", "where it comes", "how many times as good")
    assert picture.startswith("<?xml") and all(text in picture for text in texts)


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

    def worker(ids, seconds, asked):
        ask = lambda what, _: asked.append(what) or {"seconds": seconds}.get(what)  # noqa: E731
        return SimpleNamespace(ask=ask, send=lambda *_: None, answer=lambda: ids, compiles=False)

    both = {OURS: worker([1, -1], 2.0, []), "KerasHub 1": worker([2, -1], 4.0, asked)}
    rows = tf_tokenizer.measured("work", both, ["a" * 10**6], count=1)
    assert [(row.who, row.value, row.ratios[OURS], row.differs) for row in rows] == [
        (OURS, 0.5, 1, False),
        ("KerasHub 1, cold", 0.25, 2, True),
        ("KerasHub 1, warm", 0.25, 2, True),
    ]
    assert asked == ["first", "seconds", "seconds"] * 2


def test_tokenizers_encode_both_texts():
    pytest.importorskip("tokenizers")
    shared("vocab", "gpt2")
    rows = tokenizer.run(size=500, count=1)
    assert {row.what for row in rows} == {"tokenize, English", "tokenize, multilingual"}
    assert {f"{OURS}, GPT2Tokenizer", "tokenizers"} <= {row.who for row in rows} and all(row.value > 0 for row in rows)


def test_tokenizers_of_a_file_give_the_same_ids(tmp_path):
    pytest.importorskip("psutil")
    from benchmarks.tokenizing import tokenize_file

    shared("vocab", "gpt2")
    (tmp_path / "text").write_text("One café, two cafés.\n\n" * 50, "utf-8")
    makers = {
        "python": None,
        "fast": "gigatoken",
        "tiktoken": "tiktoken",
        "tokenizers": "tokenizers",
        "gigatoken": "gigatoken",
    }
    there = [name for name, package in makers.items() if package is None or importlib.util.find_spec(package)]
    found = [tokenize_file.encoded(getattr(tokenize_file, name)(), tmp_path / "text")["ids"] for name in there]
    assert found == found[:1] * len(there) and found[0][0] > 100


def test_imports_measure_what_is_over_a_bare_interpreter(monkeypatch):
    monkeypatch.setattr(imports, "PACKAGES", {OURS: "import gpt2_multi", imports.BARE: "pass"})
    monkeypatch.setattr(imports, "MODELS", {OURS: "pass"})
    rows = imports.run(count=1)
    what = ["import the package", "import the package", "import the package, over a bare interpreter"]
    assert [row.what for row in rows] == [*what, "import the model class"]


def test_load_measures_equal_logits(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks.files import load

    monkeypatch.setattr(load, "_growth", lambda who, folder: {"peak": 2.0, "private": 1.0})  # by four more processes
    rows = load.run(TINY, count=1)
    what = ["load", "load and first logits", "peak memory of that", "private memory of that"]
    assert list(dict.fromkeys(row.what for row in rows)) == what and all(row.value > 0 for row in rows)


def test_flax_compile_measures_scanned_layers_beside_the_others(monkeypatch):
    pytest.importorskip("flax")
    from benchmarks.training import flax_compile

    monkeypatch.setattr(flax_compile.jax, "clear_caches", lambda: None)  # other tests go on with what they compiled
    rows = flax_compile.run(TINY.replace(n_layer=2), length=8)
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
