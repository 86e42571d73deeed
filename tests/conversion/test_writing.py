"""What `convert` writes, keeps, refuses and leaves behind: whole, whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import gpt2_multi_conversion as conversion
import numpy as np
import pytest
from gpt2_multi_conversion import convert

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.weights import parameter_count
from tests.support.effort import some
from tests.support.fixtures import write_model

SMALL = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
KILLS = some(50, 15)


@pytest.fixture
def model(tmp_path):
    """A model folder of float32, and its tensors."""
    return tmp_path / "model", write_model(tmp_path / "model", SMALL, "lm", dtype=np.float32)


def written(folder):
    """The files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("token_classification", {}),
        ("double_heads", {}),
        ("lm", {"tie_word_embeddings": False}),
        ("base", {"add_cross_attention": True}),
        ("lm", {"n_inner": 17}),
        ("lm", {"pruned_heads": {0: [1]}}),
        ("lm", {"activation_function": "relu"}),
        ("lm", {"layer_norm_epsilon": 1e-6}),
    ],
)
def test_what_a_format_has_no_room_for_is_refused(tmp_path, format, head, changes):
    config, kind = SMALL.replace(**changes), FORMATS[format]
    write_model(tmp_path / "model", config, head, dtype=np.float32)
    lost = head not in kind.heads or any(
        getattr(config, name) not in kind.no_room.get(name, (getattr(config, name),)) for name in changes
    )
    other = any(getattr(config, name) not in given for name, given in kind.fixed.items())
    if not lost and not other:
        assert convert(tmp_path / "model", tmp_path / "new", to=format).warnings == []
        return
    with pytest.raises(
        CheckpointError, match=rf"^{format}: (expected a model with|has no room for|its program comp)[^\n]*$"
    ):
        convert(tmp_path / "model", tmp_path / "new", to=format)
    assert not (tmp_path / "new").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]
    if lost:
        with pytest.raises(CheckpointError):
            convert(tmp_path / "model", tmp_path / "new", to=format, force=True)
    else:
        assert (
            "its results will differ"
            in convert(tmp_path / "model", tmp_path / "new", to=format, force=True).warnings[0]
        )


def test_arguments_that_are_none(model, tmp_path):
    for wrong in ({"to": "onnx"}, {"dtype": "int8"}, {"dtype": 5}):
        with pytest.raises(InputError, match="expected one of"):
            convert(model[0], tmp_path / "new", **wrong)
    with pytest.raises(CheckpointError, match="max_shard_size"):
        convert(model[0], tmp_path / "new", max_shard_size="many")
    assert not (tmp_path / "new").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_is_untied(model, tmp_path):
    folder, arrays = model
    report = convert(folder, tmp_path / "new", untie=True)
    opened = conversion.open(tmp_path / "new")
    assert not opened.config.tie_word_embeddings and report.parameters == parameter_count(opened.config)
    assert np.array_equal(opened["lm_head.weight"], arrays["wte.weight"])
    assert report.missing == [] and report.tensors == len(opened) == len(arrays) + 1
    write_model(tmp_path / "labels", SMALL, "token_classification")
    with pytest.raises(InputError, match="untie: expected a language model"):
        convert(tmp_path / "labels", tmp_path / "other", untie=True)
    with pytest.raises(CheckpointError, match="tf-h5: has no room for a model whose tie_word_embeddings is False"):
        convert(folder, tmp_path / "other", to="tf-h5", untie=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_number_beyond_the_dtype_leaves_nothing_behind(tmp_path, format):
    kind = FORMATS[format]
    config = SMALL.replace(activation_function=kind.fixed.get("activation_function", ("gelu_new",))[0])
    write_model(tmp_path / "model", config, "lm", dtype=np.float64)
    conversion.open(tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-8:] = np.float64(1e39).tobytes()
    path.write_bytes(data)
    for dtype in kind.dtypes or ("float16", "bfloat16", "float32"):
        with pytest.raises(CheckpointError, match=rf"ln_f.*: 1e\+39 is beyond {dtype}|layer_norm.*1e\+39 is beyond"):
            convert(tmp_path / "model", tmp_path / "new", to=format, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if kind.dtypes:
        with pytest.raises(CheckpointError, match=f"has no room for float64; .* dtype: {' or '.join(kind.dtypes)}"):
            convert(tmp_path / "model", tmp_path / "new", to=format)
    else:
        convert(tmp_path / "model", tmp_path / "new", to=format)


def test_infinities_and_nan_are_kept(model, tmp_path):
    folder, _ = model
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-12] + np.array([np.nan, np.inf, -np.inf], np.float32).tobytes())
    for format in ("pytorch", "openai", "keras-hub"):
        convert(folder, tmp_path / format, to=format, dtype="float16")
        found = conversion.open(tmp_path / format)["ln_f.bias"][-3:]
        assert np.isnan(found[0]) and found[1] == np.inf and found[2] == -np.inf


@pytest.mark.parametrize("format", ["safetensors", "tf-safetensors", "pytorch"])
def test_shards(model, tmp_path, format):
    folder, arrays = model
    convert(folder, tmp_path / "new", to=format, max_shard_size="3KB")
    (index,) = (tmp_path / "new").glob("*.index.json")
    places = json.loads(index.read_text())
    sizes = {name: (tmp_path / "new" / name).stat().st_size for name in set(places["weight_map"].values())}
    assert len(sizes) > 2 and places["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    opened = conversion.open(tmp_path / "new")
    assert opened.format == format and all(np.array_equal(opened[name], array) for name, array in arrays.items())
    assert conversion.open(index).keys() == arrays.keys()
    convert(folder, tmp_path / "new", to=format, force=True)
    assert not list((tmp_path / "new").glob("*-of-*")) and not index.exists()


def test_files_go_along(model, tmp_path):
    folder, _ = model
    given = {"vocab.json": "{}", "merges.txt": "#", "generation_config.json": '{"x": 1}', "tokenizer_config.json": "{}"}
    given["vocab.txt"] = "[PAD]"  # of a tokenizer of another kind
    for name, content in {**given, "README.md": "not a model's"}.items():
        (folder / name).write_text(content)
    report = convert(folder, tmp_path / "openai", to="openai")
    names = {
        "encoder.json": "{}",
        "vocab.bpe": "#",
        "generation_config.json": '{"x": 1}',
        "tokenizer_config.json": "{}",
        "vocab.txt": "[PAD]",
    }
    assert {name: (tmp_path / "openai" / name).read_text() for name in names} == names
    assert "vocab.json as encoder.json" in report.files and not (tmp_path / "openai" / "README.md").exists()
    convert(tmp_path / "openai", tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_text() for name in given} == given
    assert not (tmp_path / "back" / "encoder.json").exists()


def test_the_report(model, tmp_path):
    folder, arrays = model
    report = convert(folder, tmp_path / "new", to="openai", dtype="float16")
    assert json.loads((tmp_path / "new" / "conversion.json").read_text()) == report.to_dict()
    assert report.to_dict() == {
        "source": str(folder), "target": str(tmp_path / "new"), "from_format": "safetensors", "to_format": "openai",
        "head": "lm", "prefix": "", "cut": {},
        "tensors": len(arrays), "parameters": parameter_count(SMALL), "dropped": [], "missing": [],
        "files": [], "warnings": [], "cast": dict.fromkeys(arrays, "float32 to float16"), "renamed": report.renamed,
    }  # fmt: skip
    assert report.renamed["transformer.h.0.attn.c_attn.weight"] == ["model/h0/attn/c_attn/w"]
    assert len(report.renamed) == len(arrays)


def test_where_it_is_written(model, tmp_path):
    folder, _ = model
    before = written(folder)
    for place in (folder, folder / ".." / "model", folder / "."):
        for force in (False, True):
            with pytest.raises(CheckpointError, match="is the folder that is read"):
                convert(folder, place, force=force)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CheckpointError, match="is the folder that is read"):
        convert(folder, tmp_path / "link", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected a folder to write, found a file"):
        convert(folder, tmp_path / "file", force=True)
    with pytest.raises(CheckpointError, match="expected a folder to save the model in"):
        convert(folder, tmp_path / "file" / "new")
    assert written(folder) == before and (tmp_path / "file").read_text() == "x"


def test_a_model_that_is_there_is_replaced_by_force_alone(model, tmp_path):
    folder, _ = model
    new = tmp_path / "new"
    convert(folder, new, to="pytorch", max_shard_size="3KB")
    (new / "notes").mkdir()
    (new / "notes" / "a.txt").write_text("mine")
    (new / "README.md").write_text("mine")
    before = written_files(new)
    with pytest.raises(CheckpointError, match="holds a model already"):
        convert(folder, new)
    assert written_files(new) == before
    convert(folder, new, to="tf-h5", force=True)
    names = {"config.json", "conversion.json", "tf_model.h5", "notes", "README.md"}
    assert {path.name for path in new.iterdir()} == names
    assert (new / "notes" / "a.txt").read_text() == (new / "README.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]


def written_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_check_that_fails_keeps_the_old_one(model, tmp_path):
    folder, _ = model

    def check(old, new):
        assert old.format == "safetensors" and new.format == "pytorch" and new.keys() == old.keys()
        raise CheckpointError("no")

    convert(folder, tmp_path / "new", to="tf-h5")
    before = written(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"^no$"):
        convert(folder, tmp_path / "new", to="pytorch", force=True, check=check)
    assert written(tmp_path / "new") == before and len(list(tmp_path.iterdir())) == 2


LOOP = """
import sys
from gpt2_multi_conversion import convert
one, other, target = sys.argv[1:]
print("ready", flush=True)
while True:
    convert(one, target, to="pytorch", force=True)
    convert(other, target, to="safetensors", max_shard_size="100KB", force=True)
"""


def test_a_process_that_is_killed_leaves_the_old_model_or_the_new(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, config = random.Random(seed), SMALL.replace(n_embd=48, vocab_size=501)
    models = [write_model(tmp_path / str(n), config, "lm", n, np.float32) for n in range(2)]
    target, seen = tmp_path / "target", set()
    convert(tmp_path / "0", target, to="pytorch")
    for _ in range(KILLS):
        call = [sys.executable, "-c", LOOP, str(tmp_path / "0"), str(tmp_path / "1"), str(target)]
        with subprocess.Popen(call, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(rng.random() * 0.3)
            os.kill(child.pid, signal.SIGKILL)
        opened = conversion.open(target)
        seen.add(opened.format)
        wanted = models[0 if opened.format == "pytorch" else 1]
        assert all(np.array_equal(opened[name], array) for name, array in wanted.items())
        assert json.loads((target / "conversion.json").read_text())["to_format"] == opened.format
        files = {path.name for path in target.iterdir()}
        assert {"conversion.json", "config.json"} < files
        assert ("pytorch_model.bin" in files) == (opened.format == "pytorch") == (len(files) == 3)
    assert seen == {"pytorch", "safetensors"}
