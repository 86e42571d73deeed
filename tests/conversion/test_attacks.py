"""What users do to the conversion: odd places to write to, odd names, and what must not be lost there."""

import os
from pathlib import Path

import gpt2_multi_conversion as conversion
import numpy as np
import pytest
from click.testing import CliRunner
from gpt2_multi_conversion import convert
from gpt2_multi_conversion.cli import main
from gpt2_multi_conversion.verification import check

from gpt2_multi.errors import CheckpointError
from gpt2_multi.model.checkpoint import read_config, write_weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table
from tests.support.fixtures import write_model

SMALL = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def model(tmp_path):
    """A model folder of float32."""
    write_model(tmp_path / "model", SMALL, "lm", dtype=np.float32)
    return tmp_path / "model"


def names(folder):
    """What a folder holds, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_as_target_stays_a_link_to_the_new_model(model, tmp_path, there):
    if there:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("real")
    convert(model, tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("real") and names(tmp_path) == ["link", "model", "real"]
    assert {"config.json", "conversion.json", "model.safetensors"} | ({"notes"} if there else set()) == set(
        names(tmp_path / "real")
    )


@pytest.mark.parametrize("target", [".", "..", "", "../work"])
def test_the_folder_that_the_user_works_in_is_refused(model, tmp_path, monkeypatch, target):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(CheckpointError, match="is the folder that you work in, or holds it; give another"):
        convert(model, target)
    assert names(tmp_path) == ["model", "work"] and names(tmp_path / "work") == []


def test_folders_stay_whatever_their_names_even_by_force(model, tmp_path):
    for name in ("checkpoint", "metadata.json", "sub"):
        (tmp_path / "new" / name).mkdir(parents=True)
        (tmp_path / "new" / name / "data").write_text("precious")
    convert(model, tmp_path / "new")
    convert(model, tmp_path / "new", to="pytorch", force=True)
    with pytest.raises(CheckpointError, match=r"could not be written .*; what was there is whole"):
        convert(model, tmp_path / "new", to="openai", force=True)  # which has a file of the name checkpoint
    assert [(tmp_path / "new" / name / "data").read_text() for name in ("checkpoint", "metadata.json", "sub")] == [
        "precious"
    ] * 3
    assert "pytorch_model.bin" in names(tmp_path / "new") and names(tmp_path) == ["model", "new"]


def test_a_pipe_in_the_target_is_not_waited_for(model, tmp_path):
    (tmp_path / "new").mkdir()
    os.mkfifo(tmp_path / "new" / "pipe")
    (tmp_path / "new" / "gone").symlink_to("nowhere")
    convert(model, tmp_path / "new")
    assert {"pipe", "gone", "model.safetensors"} < set(names(tmp_path / "new"))


def test_what_the_files_of_tensorflow_begin_with_is_a_source(model, tmp_path):
    convert(model, tmp_path / "openai", to="openai")
    found = CliRunner().invoke(main, ["convert", str(tmp_path / "openai" / "model.ckpt"), str(tmp_path / "new")])
    assert "(openai, lm)" in found.output and conversion.verify(model, tmp_path / "new").tensors == {}


def test_brackets_in_a_name_are_printed(model, tmp_path):
    convert(model, tmp_path / "a [b]c[" / "d]")
    found = CliRunner().invoke(main, ["verify", str(model), str(tmp_path / "a [b]c[" / "d]")])
    assert found.exit_code == 0 and "[b]c[" in found.output


def test_weights_that_are_not_finite_are_verified_too(model, tmp_path):
    weights = dict(conversion.open(model))
    weights["h.0.mlp.c_fc.bias"][:2] = np.nan, np.inf
    config = read_config(model)
    (tmp_path / "nan").mkdir()
    config.save_pretrained(tmp_path / "nan")
    rows = [(row, weights[row.name].dtype, lambda row=row: weights[row.name]) for row in table(config)]
    write_weights(tmp_path / "nan", rows, "lm")
    convert(tmp_path / "nan", tmp_path / "new", check=check)
    assert conversion.verify(tmp_path / "nan", tmp_path / "new").ok
    assert not conversion.verify(model, tmp_path / "new").ok


def test_checkpoints_are_told_apart_and_shown(model):
    one, other = conversion.open(model), conversion.open(model)
    assert one == one and one != other and len({one, other}) == 2
    assert repr(one).endswith("format='safetensors', head='lm', 28 tensors)")


def test_a_head_that_differs_is_a_difference(tmp_path):
    write_model(tmp_path / "a", SMALL, "sequence_classification", dtype=np.float32)
    weights = dict(conversion.open(tmp_path / "a"))
    convert(tmp_path / "a", tmp_path / "b")
    assert conversion.verify(tmp_path / "a", tmp_path / "b").ok
    rows = table(SMALL, "sequence_classification")
    weights["score.weight"] = 2 * weights["score.weight"]
    made = [(row, weights[row.name].dtype, lambda row=row: weights[row.name]) for row in rows]
    write_weights(tmp_path / "b", made, "sequence_classification")
    verdict = conversion.verify(tmp_path / "a", tmp_path / "b")
    assert not verdict.ok and list(verdict.tensors) == ["score.weight"] and all(line.ok for line in verdict.lines)


def test_an_absurd_number_of_layers_is_refused_by_inspect_too(model):
    SMALL.replace(n_layer=10**9).save_pretrained(model)
    with pytest.raises(CheckpointError, match="too few for the 1000000000 layers"):
        conversion.inspect(model)
