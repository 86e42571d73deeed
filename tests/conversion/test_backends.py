"""Every backend loads every example of every format, and computes what the program that wrote it computed."""

import shutil

import numpy as np
import pytest

from gpt2_multi.files.containers.safetensors import read_safetensors
from tests.conversion.test_conversion import COARSE, LM_FORMATS, OTHERS, close
from tests.conversion.test_layouts import EXPECTED, FILES, NO_HEADS, PEERS
from tests.support import fixtures
from tests.support.shared_data import shared

TRAINERS = fixtures.DATA / "trainers"
CASES = {"sequence_classification": "single", "double_heads": "double"}


@pytest.mark.parametrize("name", LM_FORMATS)
def test_what_transformers_wrote_is_computed(backend, name):
    _, model, head = LM_FORMATS[name]
    case = CASES.get(model, "plain")
    found = backend(head, shared("fixtures", "lm_formats", name), "float32", fixtures.cases(model)[case])
    keys = {"logits", "mc_logits", "last_hidden_state"} & found.keys()
    assert keys
    for key in keys:
        close(np.asarray(found[key]), fixtures.reference(model)[f"{case}.{key}"], COARSE.get(name, 1e-4))


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_wrote_is_computed(backend, name):
    folder = shared("fixtures", name)
    expected = read_safetensors(folder / "reference.safetensors")
    (ids,) = [array for array in expected.values() if array.dtype.kind == "i"]
    close(np.asarray(backend("lm", folder, "float32", {"input_ids": ids})["logits"]), expected["logits"])


@pytest.mark.parametrize("file", FILES)
def test_what_programs_without_settings_wrote_is_computed(backend, tmp_path, file):
    shutil.copy(PEERS / file, tmp_path)
    if FILES[file][0] in NO_HEADS:
        shutil.copy(PEERS / ("mingpt" if "mingpt" in file else "transformers") / "config.json", tmp_path)
    found = backend("lm", tmp_path, "float32", {"input_ids": EXPECTED["ids"]})["logits"]
    close(np.asarray(found), EXPECTED[FILES[file][1]])


def test_what_trainers_saved_is_loaded_as_it_is(backend):
    """A file by itself, without settings; a value head beside the model, and tables that are cut."""
    ids = {"input_ids": np.arange(6)[None]}
    expected = np.asarray(backend("lm", TRAINERS / "reference", "float32", ids)["logits"])
    for name, options in (
        ("lightning/last.ckpt", {"n_head": 2}),
        ("trl", {"drop": "v_head.*", "vocab_size": 11, "n_positions": 6}),
    ):
        found = np.asarray(backend("lm", TRAINERS / name, "float32", ids, **options)["logits"])
        assert found.shape[-1] == options.get("vocab_size", 16)
        close(found, expected[..., : found.shape[-1]])
