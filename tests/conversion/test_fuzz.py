"""Damaged checkpoints: a run of the fuzzer with a seed of its own, and files that are known to be nasty."""

import json
import os
import random
import re
import struct
import subprocess
import sys

import pytest

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.containers.tf_bundle import MAGIC, _message, _packed, _table
from gpt2_multi.model.checkpoint import open as open_checkpoint
from tests.support.damage import sealed
from tests.support.effort import some

CASES = some(1500, 500)


def test_damaged_files_of_every_format():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    call = [sys.executable, "-m", "tests.support.fuzz", "--seed", str(seed), "--count", str(CASES)]
    run = subprocess.run(call, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{CASES} files, 0 faults" in run.stdout


SETTINGS = {
    "n_layer": [10**9, -1, 0, "2", 2.0, None, True, [2], 10**4000, 3],
    "n_head": [10**9, 0, "x", 3],
    "n_embd": [10**18, -8],
    "vocab_size": [10**18, 10**4000],
    "n_inner": [10**18, "x"],
    "num_labels": [10**9, -1, "x"],
    "id2label": [{"9" * 5000: "x"}, {"x": "x"}, [], {"0": 0}],
    "pruned_heads": [{str(n): [0] for n in range(3, 1000)}, {"9" * 5000: [0]}, [1]],
    "layer_norm_epsilon": [10**400, -1, 0, "x"],
    "architectures": [5, [5], {}],
    "dtype": ["int7", [[]] * 10**5, {}],
    "model_type": ["x" * 10**6, 5],
    "activation_function": ["x" * 10**6, []],
}
DEEP = json.loads("[" * 600 + "]" * 600)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in SETTINGS for value in SETTINGS[name]],
    ids=lambda v: str(v)[:20] if isinstance(v, str) else "",
)
def test_absurd_settings(whole, outcome, name, value):
    files = whole("safetensors")
    config = json.loads(files["config.json"])
    found = outcome({**files, "config.json": json.dumps({**config, name: value}).encode()})
    assert re.match("(ConfigError|CheckpointError): ", found), found


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b"\xff", b"[" * 10**6, b'{"a":' * 10**5, b"null", b"{}", b'{"n_layer": 1' + b"0" * 5000 + b"}"],
)
def test_settings_that_are_none(whole, outcome, text):
    for format, file in (("safetensors", "config.json"), ("keras-hub", "config.json"), ("openai", "hparams.json")):
        files = whole(format)
        if format == "openai":
            del files["config.json"]
        assert re.match("(ConfigError|CheckpointError): ", outcome({**files, file: text}))


def test_names_without_end_are_cut(whole, outcome):
    for format in ("keras-hub", "safetensors"):
        found = outcome(
            {**whole(format), "config.json": json.dumps({"class_name": 1, "gpt2_config": {"x" * 10**5: 1}}).encode()}
        )
        assert re.match(r"(ConfigError|CheckpointError): \S*(config\.json|case)\b", found), found[:300]


def test_settings_nested_deeply(whole, outcome):
    files = whole("safetensors")
    config = json.loads(files["config.json"])
    assert "nested too deeply" in outcome({**files, "config.json": json.dumps({**config, "x": DEEP}).encode()})


@pytest.mark.parametrize("name", ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"])
@pytest.mark.parametrize("value", [10**9, -1, "2", None, [], {}])
def test_absurd_settings_of_openai(whole, outcome, name, value):
    files = whole("openai")
    del files["config.json"]
    given = json.loads(files["hparams.json"])
    found = outcome({**files, "hparams.json": json.dumps({**given, name: value}).encode()})
    assert re.match(r"(ConfigError|CheckpointError): \S*(hparams\.json|case)\b", found), found


SHARDS = [
    "../model.safetensors", "/etc/passwd", "model.safetensors.index.json", "config.json", "gone.safetensors", "", ".",
    "..", "a/b", "a\0b", "\ud800", "x" * 5000, "folder", "pipe", None, 5, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: ascii(shard)[:20])
@pytest.mark.parametrize("format", ["safetensors", "pytorch", "tf-h5", "flax-msgpack"])
def test_an_index_of_shards_that_leads_elsewhere(whole, tmp_path, format, shard):
    files = whole(format)
    (name,) = [name for name in files if name.endswith((".safetensors", ".bin", ".h5", ".msgpack"))]
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "config.json").write_bytes(files["config.json"])
    (tmp_path / "model.safetensors").write_bytes(files[name])
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "endless", "loop"])
def test_what_is_no_file(whole, tmp_path, name, kind):
    for file, data in whole("safetensors").items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / ("config.json" if name == "config.json" else "model.safetensors")).unlink()
    place = tmp_path / name
    make = {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "endless": lambda: place.symlink_to("/dev/zero")}
    make.get(kind, lambda: place.symlink_to(place))()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def bundle(*entries):
    """An index with these names and messages, whose checksums are right."""
    return _table({b"": _message((1, 1), (3, _message((1, 1)))), **dict(entries)})


def dims(*sizes):
    return (2, _message(*((2, _message((1, size))) for size in sizes)))


F4 = (1, 1)
INDEXES = {
    "a tensor beyond the end": (bundle((b"a", _message(F4, dims(2**40), (5, 2**42)))), "larger than it is"),
    "an offset beyond the end": (bundle((b"a", _message(F4, dims(1), (4, 2**60), (5, 4)))), "would lie at bytes"),
    "a size that is another": (bundle((b"a", _message(F4, dims(1), (5, 8)))), "the checksum of a is wrong"),
    "a checksum that is wrong": (bundle((b"a", _message(F4, dims(1), (5, 4)))), "the checksum of a is wrong"),
    "a type that no weight has": (bundle((b"a", _message((1, 7), dims(1), (5, 4)))), "not a whole"),
    "slices": (bundle((b"a", _message(F4, dims(1), (7, b"")))), "is in slices"),
    "another file": (bundle((b"a", _message(F4, dims(1), (3, 9), (5, 4)))), "no such file|expected a file"),
    "bytes for a number": (bundle((b"a", _message(F4, dims(1), (3, b"../x")))), "bytes where a number belongs"),
    "bytes for a shape": (bundle((b"a", _message(F4, (2, _message((2, 5))), (5, 4)))), "not a whole"),
    "very many dimensions": (bundle((b"a", _message(F4, dims(*[2**63] * 30_000), (5, 4)))), "30000 dimensions"),
    "very many names": (bundle(*((b"%06d" % i, _message(F4)) for i in range(20_000))), "more than 8192 tensors"),
    "long names": (bundle((b"a" * 300, _message(F4))), "longer than a tensor's"),
    "the other byte order": (_table({b"": _message((1, 1), (2, 1)), b"a": _message(F4)}), "the other byte order"),
    "no header": (_table({b"a": _message(F4)}), "not a whole"),
    "names out of order": (bundle((b"b", _message(F4)), (b"a", _message(F4))), "not in order"),
    "a number without end": (_table({b"": b"\x08" + b"\xff" * 20}), "a number in it has no end"),
    "a foot that lies": (bytes(100) + _packed(2**63) * 4 + struct.pack("<Q", MAGIC), "compressed or cut off"),
    "nothing but a foot": (bytes(40) + struct.pack("<Q", MAGIC), "cut off"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_of_tensorflow(whole, outcome, name):
    data, sentence = INDEXES[name]
    found = outcome({**whole("openai"), "model.ckpt.index": data})
    assert re.match(f"CheckpointError: .*({sentence})", found), found


def test_blocks_of_an_index_over_each_other(whole, outcome):
    """The block that says where the others are names the first one twice."""
    data = whole("openai")["model.ckpt.index"]
    first = _packed(0) + _packed(len(data) // 2)
    whole_block = bytearray(_table({b"a": first, b"b": first}))
    found = outcome({**whole("openai"), "model.ckpt.index": sealed(bytes(whole_block), bytes(whole_block))})
    assert re.match("CheckpointError: ", found), found


def test_giants_of_json(whole, outcome):
    """What Python makes of JSON is many times as large, so that a file of it may not be large."""
    giant = b'{"x": [' + b"[]," * 2**21 + b"0]}"
    files = whole("safetensors")
    (name,) = [name for name in files if name.endswith(".safetensors")]
    assert re.match("CheckpointError: .*more than such a file", outcome({**files, "config.json": giant}))
    shards = {"config.json": files["config.json"], f"{name}.index.json": giant}
    assert re.match("CheckpointError: .*more than such a file", outcome(shards))
    header = len(giant).to_bytes(8, "little") + giant
    assert re.match("CheckpointError: .*its header has", outcome({**files, name: header}))
