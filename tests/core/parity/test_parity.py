"""Every backend against the oracle in float64, and against transformers' recorded outputs in float32."""

import functools

import numpy as np
import pytest

from gpt2_multi.errors import InputError
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from tests.support import fixtures
from tests.support.cases import ALONE
from tests.support.effort import THOROUGH

ALL = {"output_hidden_states": True, "output_attentions": True}
BOUND64, BOUND32 = 1e-9, 1e-4
ON_PURPOSE = {"tok.loss"}  # recorded with the labels of padding counted, which ours ignores


def run_oracle(name, inputs):
    """The oracle's answer in float64, of what the head in question returns."""
    inputs = {key: value.astype(np.float64) if value.dtype.kind == "f" else value for key, value in inputs.items()}
    found = reference.outputs(fixtures.config(name), fixtures.weights(name), fixtures.head(name), inputs)
    no_past = fixtures.head(name) in ("token_classification", "question_answering")
    return {key: value for key, value in found.items() if not (no_past and key.startswith("past."))}


def calls(name):
    """A fixture's calls; of a variant those that meet what it changes, which never is how words become vectors."""
    every = fixtures.cases(name)
    met = every if THOROUGH or not name.startswith("variant") else ("plain", "mask_left", "head_mask")
    return {case: every[case] for case in met}


def recorded(name, case):
    """The outputs of one recorded call."""
    arrays = {key: value for key, value in fixtures.reference(name).items() if key.split(".")[0] == case}
    return {key.split(".", 1)[1]: value for key, value in arrays.items() if key not in ON_PURPOSE}


def kept(inputs):
    """Where the outputs mean something: the positions that the mask keeps."""
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return np.asarray(inputs.get("attention_mask", np.ones(ids.shape[:2]))) != 0


def difference(found, expected, keep):
    """The greatest difference, over the kept positions of whatever has a (B, T, ...) or (B, H, T, ...) shape."""
    delta = np.abs(np.asarray(found, np.float64) - expected)
    if delta.shape[:2] == keep.shape:
        delta = delta[keep]
    elif delta.ndim == 4 and (len(delta), delta.shape[2]) == keep.shape:
        delta = np.moveaxis(delta, 1, 2)[keep]
    return delta.max(initial=0.0)


@pytest.mark.parametrize("name", fixtures.MODELS)
def test_float64_equals_the_oracle(name, backend):
    worst = 0.0
    for case, inputs in calls(name).items():
        expected = run_oracle(name, inputs)
        found = backend(fixtures.head(name), fixtures.folder(name), "float64", inputs, ALL)
        assert expected.keys() <= found.keys(), case
        for key, value in expected.items():
            delta = difference(found[key], value, kept(inputs))
            worst = max(worst, delta)
            assert delta <= BOUND64, (case, key)
    print(f"{name}: greatest difference {worst:.1e}")


@pytest.mark.parametrize("name", fixtures.MODELS)
def test_float32_is_close_to_the_recording(name, backend):
    worst = 0.0
    for case, inputs in calls(name).items():
        found = backend(fixtures.head(name), fixtures.folder(name), "float32", inputs, ALL)
        for key, value in recorded(name, case).items():
            relative = difference(found[key].reshape(value.shape), value, kept(inputs)) / np.abs(value).max()
            worst = max(worst, relative)
            assert relative <= BOUND32, (case, key)
    print(f"{name}: greatest relative difference {worst:.1e}")
    assert worst > 0, "nothing was compared"


@pytest.mark.parametrize("name", fixtures.MODELS)
def test_oracle_equals_the_recording(name):
    compared = 0
    for case, inputs in fixtures.cases(name).items():
        found = run_oracle(name, inputs)
        for key, value in recorded(name, case).items():
            mine = np.asarray(found[key]).reshape(value.shape)
            assert difference(mine, value, kept(inputs)) <= 1e-5 * np.abs(value).max(), (case, key)
            compared += 1
    assert compared


def test_every_recorded_case_is_run():
    not_calls = {"in", "gen", "gen_alone", "warp", "grad", "train"}
    for name in fixtures.MODELS:
        found = {key.split(".")[0] for key in fixtures.reference(name)} - not_calls
        assert found == set(fixtures.cases(name)), name


def test_positions_come_from_the_mask():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert reference.positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize(("head", "labels"), ALONE)
def test_one_row_may_have_its_label_alone(head, labels, backend, tmp_path):
    config = GPT2Config(vocab_size=31, n_positions=9, n_embd=12, n_layer=1, n_head=3, num_labels=3)
    fixtures.write_model(tmp_path / "m", config, head)
    run = functools.partial(backend, head, tmp_path / "m", "float64")
    ids = np.arange(18).reshape((1, 2, 9) if head == "double_heads" else (2, 9))[:1]
    alone = run({"input_ids": ids, **labels})
    found = run({"input_ids": ids, **{name: x[None] for name, x in labels.items()}})
    key = "mc_loss" if head == "double_heads" else "loss"
    assert float(alone[key]) == float(found[key]) > 0
    two = np.repeat(ids, 2, 0)
    with pytest.raises(InputError, match=r"expected shape \(2,\), found \(1,\)"):
        run({"input_ids": two, "attention_mask": np.ones_like(two), **labels})
