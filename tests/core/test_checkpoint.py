"""Model folders: mapped reading, shards, whole replacement, and files that are not what they should be."""

import json
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_multi.errors import CheckpointError, ConfigError
from gpt2_multi.files import folders
from gpt2_multi.files.containers.safetensors import parse_size, read_safetensors, write_safetensors
from gpt2_multi.model import checkpoint
from gpt2_multi.model.checkpoint import is_model_file
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table
from tests.support.fixtures import write_model

SMALL = GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3)
DTYPES = [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]

replaced = partial(folders.replaced, owned=is_model_file)


def source(array):
    return array.dtype, array.shape, lambda: array


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_read_bit_for_bit(tmp_path, dtype):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).astype(dtype),
        "b": np.ones((), dtype),
        "c": np.ones((0, 4), dtype),
    }
    write_safetensors(tmp_path / "x", {name: source(array) for name, array in arrays.items()})
    for reader in (read_safetensors, safetensors.numpy.load_file):
        found = reader(tmp_path / "x")
        for name, array in arrays.items():
            assert found[name].dtype == dtype and found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


def test_the_arrays_are_private_pages_of_the_file(tmp_path):
    path = tmp_path / "x"
    write_safetensors(path, {"a": source(np.zeros(4, np.float32))})
    before = path.read_bytes()
    array = read_safetensors(path)["a"]
    base = array
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    array[:] = 1
    assert path.read_bytes() == before


def test_shards_are_written_as_transformers_does_and_read_back(tmp_path):
    arrays = write_model(tmp_path / "one", SMALL, "lm")
    (tmp_path / "many").mkdir()
    rows = [(w, np.dtype(np.float64), lambda w=w: arrays[w.name]) for w in table(SMALL)]
    checkpoint.write_weights(tmp_path / "many", rows, "lm", max_shard_size=2000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    found = checkpoint.read_weights(tmp_path / "many", SMALL, "lm")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (123, 123),
        ("200MB", 2 * 10**8),
        ("5 GB", 5 * 10**9),
        ("7kb", 7000),
        ("9B", 9),
        ("3GiB", 3 * 2**30),
        ("2 kib", 2048),
    ],
)
def test_sizes(size, found):
    assert parse_size(size) == found


@pytest.mark.parametrize("size", ["five", "", "0", 0, -1, "1TBX", "1iB", 1.5, None])
def test_sizes_that_are_none(size):
    with pytest.raises(CheckpointError, match="max_shard_size: expected bytes or a size"):
        parse_size(size)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    untied = SMALL.replace(tie_word_embeddings=False)
    write_model(tmp_path / "m", untied, "lm")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        checkpoint.read_weights(tmp_path / "m", SMALL, "lm")


def good_file(path):
    write_safetensors(path, {"a": source(np.arange(100, dtype=np.float32)), "b": source(np.ones(3, np.float16))})
    return path.read_bytes()


@pytest.mark.parametrize("length", [0, 3, 8, 20, 100, -1])
def test_a_truncated_file_is_one_sentence(tmp_path, length):
    whole = good_file(tmp_path / "x")
    (tmp_path / "x").write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"x: not a whole safetensors file \(.*\); fetch or save it again"):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tf_model.h5", "model.ckpt.index", "a.bin"])
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 548105171\n"
    (tmp_path / name).write_text(pointer, "utf-8")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name}: .*a pointer of Git LFS and .*: run `git lfs pull`"):
        checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text(pointer, "utf-8")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON .*a pointer of Git LFS"):
        GPT2Config.from_pretrained(tmp_path)


@settings(max_examples=150)
@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_damaged_header_never_crashes(tmp_path_factory, position, byte):
    path = tmp_path_factory.mktemp("damaged") / "x"
    data = bytearray(good_file(path))
    data[position % len(data)] = byte
    path.write_bytes(data)
    try:
        read_safetensors(path)
    except CheckpointError:
        pass


def test_a_huge_header_allocates_nothing(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_safetensors(tmp_path / "x")


def test_an_unknown_dtype_is_named(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(4, np.int16)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="a is stored as I16; expected one of F64"):
        read_safetensors(tmp_path / "x")


def test_folders_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="found no weights, but nothing"):
        checkpoint.open(tmp_path, SMALL)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: the file is empty"):
        checkpoint.open(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "expected a 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "expected a 'weight_map'"),
        ('{"weight_map": {"a": "../x"}}', "names the file '../x', which is not beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is not beside it"),
        ('{"weight_map": {"a": ""}}', "which is not beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "no such file"),
        ('{"weight_map": {"z": "x.safetensors"}}', "lacks z, which model.safetensors.index.json puts there"),
    ],
)
def test_an_index_that_lies(tmp_path, index, sentence):
    good_file(tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.open(tmp_path, SMALL)


def old_model(target):
    """A folder with a model and other things in it."""
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "notes.txt").write_text("mine")
    for old in (
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "vocab.json",
    ):
        (target / old).write_text("old")
    return target


def contents(target):
    return {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}


def test_replacing_keeps_other_files_and_drops_old_weights(tmp_path):
    target = old_model(tmp_path / "m")
    inode = target.stat().st_ino
    with replaced(target) as stage:
        (stage / "config.json").write_text("new")
        (target / "log.txt").write_text("meanwhile")
    assert contents(target) == {
        "config.json": "new",
        "deep/notes.txt": "mine",
        "vocab.json": "old",
        "log.txt": "meanwhile",
    }
    assert target.stat().st_ino == inode and {p.name for p in tmp_path.iterdir()} == {"m"}
    assert not [p for p in target.iterdir() if p.name.startswith(".")]


def test_a_failed_write_leaves_the_old_model_whole(tmp_path):
    before = contents(old_model(tmp_path / "m"))
    with pytest.raises(RuntimeError), replaced(tmp_path / "m") as stage:
        (stage / "config.json").write_text("new")
        raise RuntimeError("disk full")
    assert contents(tmp_path / "m") == before


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()], ids=["full", "stopped"])
@pytest.mark.parametrize("failing", range(3))
def test_an_error_while_files_change_places_puts_the_old_ones_back(tmp_path, monkeypatch, failing, error):
    before = contents(old_model(tmp_path / "m"))
    real, calls = Path.replace, []

    def replace(self, to):
        calls.append(to)
        if len(calls) == failing + 1:
            raise error
        return real(self, to)

    monkeypatch.setattr(Path, "replace", replace)
    expected = (CheckpointError, r"could not be written \(no space\)") if str(error) else (KeyboardInterrupt, None)
    with pytest.raises(expected[0], match=expected[1]), replaced(tmp_path / "m") as stage:
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            (stage / name).write_text("new")
    assert {k: v for k, v in contents(tmp_path / "m").items() if k in before} == before


def test_a_killed_process_leaves_a_whole_model(tmp_path):
    """Killed at every call that changes a name: what is there, or in the hidden folder, is the old model or the new."""
    script = (
        "import os, sys; from pathlib import Path; n = int(sys.argv[1])\n"
        "from gpt2_multi.files.folders import replaced; from gpt2_multi.model.checkpoint import is_model_file\n"
        "real = Path.replace\n"
        "def replace(self, to):\n"
        "    global n\n"
        "    n -= 1\n"
        "    os._exit(9) if n < 0 else None\n"
        "    return real(self, to)\n"
        "Path.replace = replace\n"
        "with replaced(sys.argv[2], is_model_file) as stage:\n"
        "    [(stage / name).write_text('new') for name in ('config.json', 'model.safetensors')]\n"
    )
    for n in range(3):
        target = old_model(tmp_path / str(n))
        before = contents(target)
        code = subprocess.run([sys.executable, "-c", script, str(n), str(target)], check=False).returncode
        now = contents(target)
        kept = {key.split("/", 1)[1]: value for key, value in now.items() if key.startswith(".replaced-")}
        model = {key: value for key, value in before.items() if "/" not in key and key != "vocab.json"}
        assert (code == 0 and now["config.json"] == now["model.safetensors"] == "new") or (code == 9 and kept == model)


def test_the_current_folder_can_be_saved_into(tmp_path, monkeypatch):
    monkeypatch.chdir(old_model(tmp_path / "m"))
    with replaced(".") as stage:
        (stage / "config.json").write_text("new")
    assert Path("config.json").read_text() == "new" and Path.cwd() == tmp_path / "m"


def test_a_folder_of_nothing_else_is_exchanged_as_a_whole(tmp_path):
    """Not its files: who has the old folder open goes on to read the old model."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("old")
    inode = (tmp_path / "m").stat().st_ino
    with replaced(tmp_path / "m") as stage:
        (stage / "model.safetensors").write_text("new")
        assert contents(tmp_path / "m") == {"config.json": "old"}
    assert contents(tmp_path / "m") == {"model.safetensors": "new"} and (tmp_path / "m").stat().st_ino != inode
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


@pytest.mark.parametrize("can", [True, False])
def test_folders_change_names_however_the_system_can(can, tmp_path, monkeypatch):
    """And whatever one that was stopped has left."""
    if not can:
        monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: None)
    for name in ("new", "new.old", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    folders.exchange(tmp_path / "new", tmp_path / "old")
    found = contents(tmp_path)
    assert found.pop("old/x") == "new" and found in [{}, {"new/x": "old", "new.old/x": "new.old"}][: 1 + can]


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    with replaced(tmp_path / "a" / "b") as stage:
        (stage / "x").write_text("1")
    assert contents(tmp_path / "a" / "b") == {"x": "1"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "m").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder to save the model in"), replaced(tmp_path / "m"):
        pass


def test_a_tensor_that_does_not_fit_is_refused(tmp_path):
    dtype = np.dtype(np.float32)
    with pytest.raises(CheckpointError, match=r"a has shape \(2,\), but the configuration makes it \(3,\)"):
        write_safetensors(tmp_path / "x", {"a": (dtype, (3,), lambda: np.zeros(2, np.float32))})
