"""Model folders: mapped reading, shards, whole replacement, and files that are not what they should be."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_multi import checkpoint
from gpt2_multi.checkpoint import parse_size, read_safetensors, read_tensors, read_weights, replaced, write_safetensors
from gpt2_multi.config import GPT2Config
from gpt2_multi.errors import CheckpointError
from gpt2_multi.weights import table
from tests.fixtures import write_model

SMALL = GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3)
DTYPES = [np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]


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
    index = json.loads((tmp_path / "many" / checkpoint.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    found = read_weights(tmp_path / "many", SMALL, "lm")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("size", "found"), [(123, 123), ("200MB", 2 * 10**8), ("5 GB", 5 * 10**9), ("7kb", 7000), ("9B", 9)]
)
def test_sizes(size, found):
    assert parse_size(size) == found


@pytest.mark.parametrize("size", ["five", "", "0", 0, -1, "1TBX", 1.5, None])
def test_sizes_that_are_none(size):
    with pytest.raises(CheckpointError, match="max_shard_size: expected bytes or a size"):
        parse_size(size)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    untied = SMALL.replace(tie_word_embeddings=False)
    write_model(tmp_path / "m", untied, "lm")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight"):
        read_weights(tmp_path / "m", SMALL, "lm")


def good_file(path):
    write_safetensors(path, {"a": source(np.arange(100, dtype=np.float32)), "b": source(np.ones(3, np.float16))})
    return path.read_bytes()


@pytest.mark.parametrize("length", [0, 3, 8, 20, 100, -1])
def test_a_truncated_file_is_one_sentence(tmp_path, length):
    whole = good_file(tmp_path / "x")
    (tmp_path / "x").write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"x: not a whole safetensors file \(.*\); fetch or save it again"):
        read_safetensors(tmp_path / "x")


@settings(max_examples=150, deadline=None)
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
    safetensors.numpy.save_file({"a": np.zeros(4, np.int8)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="a is stored as I8; expected one of F64"):
        read_safetensors(tmp_path / "x")


def test_folders_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors .* found no weights"):
        read_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found only pytorch_model\.bin; save or convert"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "not readable as JSON"),
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
    (tmp_path / checkpoint.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=sentence):
        read_tensors(tmp_path)


def test_replacing_keeps_other_files_and_drops_old_weights(tmp_path):
    target = tmp_path / "m"
    (target / "deep").mkdir(parents=True)
    (target / "deep" / "notes.txt").write_text("mine")
    (target / "vocab.json").write_text("{}")
    for old in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", checkpoint.INDEX):
        (target / old).write_text("old")
    with replaced(target) as stage:
        (stage / "config.json").write_text("new")
    assert {p.name for p in target.iterdir()} == {"deep", "vocab.json", "config.json"}
    assert (target / "config.json").read_text() == "new" and (target / "deep" / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_write_leaves_the_old_model_whole(tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(RuntimeError), replaced(target) as stage:
        (stage / "config.json").write_text("new")
        raise RuntimeError("disk full")
    assert (target / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_crash_at_the_swap_leaves_the_old_model_whole(tmp_path, monkeypatch):
    target = tmp_path / "m"
    target.mkdir()
    (target / "config.json").write_text("old")
    real = os.rename
    monkeypatch.setattr(
        checkpoint.Path,
        "rename",
        lambda self, to: (
            (_ for _ in ()).throw(OSError("no")) if to == target and ".old" not in self.name else real(self, to)
        ),
    )
    with pytest.raises(OSError, match="no"), replaced(target) as stage:
        (stage / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    with replaced(tmp_path / "a" / "b") as stage:
        (stage / "x").write_text("1")
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "m").write_text("")
    with (
        pytest.raises(CheckpointError, match="expected a folder to save the model in, found a file"),
        replaced(tmp_path / "m"),
    ):
        pass
