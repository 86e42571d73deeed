"""The SavedModel: loaded in a process that has neither this library nor Keras, it computes and generates the same."""

import os
import subprocess
import sys

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from gpt2_multi.errors import CheckpointError, InputError  # noqa: E402
from gpt2_multi.tf import TFGPT2LMHeadModel  # noqa: E402
from tests import fixtures  # noqa: E402

LOADER = """
import sys
sys.modules["gpt2_multi"] = sys.modules["keras"] = None  # importing them fails from here on
import numpy as np, tensorflow as tf
given, functions = np.load(sys.argv[2]), tf.saved_model.load(sys.argv[1]).signatures
answers = {}
for key in ("batch", "short"):
    inputs = {"input_ids": tf.constant(given[key]), "attention_mask": tf.constant(given[key + "_mask"])}
    answers[key + "_ids"] = functions["generate"](**inputs)["output_ids"]
    answers[key + "_logits"] = functions["logits"](**inputs)["logits"]
np.savez(sys.argv[3], **answers)
for bad in ([[503]], [[-1]], [[1] * 60]):
    try:
        functions["generate"](input_ids=tf.constant(bad), attention_mask=tf.ones_like(bad))
    except tf.errors.InvalidArgumentError as error:
        print(" ".join(str(error).split()))
"""


@pytest.fixture(scope="module")
def model():
    return TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"))


def ask(folder, tmp_path):
    """What a fresh process gets from the signatures of a folder, and what it printed."""
    recorded = fixtures.reference("lm")
    batch, mask = (recorded[name].astype(np.int32) for name in ("gen.input_ids", "in.mask_left"))
    given = {"batch": batch, "batch_mask": mask, "short": batch[:1, -5:], "short_mask": mask[:1, -5:]}
    np.savez(tmp_path / "given.npz", **given)
    files = [str(tmp_path / name) for name in ("given.npz", "answers.npz")]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder), *files], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return given, np.load(tmp_path / "answers.npz"), process.stdout


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9, "seed": 7, "num_return_sequences": 2}])
def test_a_fresh_process_gets_the_same_logits_and_texts(options, jit, model, tmp_path):
    options = {"max_new_tokens": 6, "eos_token_id": None, **options}
    model.export_saved_model(tmp_path / "saved", jit_compile=jit, **options)
    given, answers, printed = ask(tmp_path / "saved", tmp_path)
    for key in ("batch", "short"):
        inputs = {"input_ids": given[key], "attention_mask": given[f"{key}_mask"]}
        assert np.array_equal(answers[f"{key}_ids"], model.generate(**inputs, **options, jit_compile=False))
        logits = model(**inputs).logits.numpy()
        np.testing.assert_allclose(answers[f"{key}_logits"], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    if not jit:  # XLA drops assertions
        assert "outside the vocabulary of 503" in printed and "an id is negative" in printed
        assert "a prompt and 6 new tokens are more than n_positions 64" in printed


def test_a_saved_model_is_replaced_whole_and_nothing_else_is(model, tmp_path):
    where = tmp_path / "saved"
    model.export_saved_model(where, max_new_tokens=2)
    before = (where / "saved_model.pb").read_bytes()
    with pytest.raises(TypeError, match="no option 'max_new_token'; did you mean 'max_new_tokens'"):
        model.export_saved_model(where, max_new_token=3)
    assert (where / "saved_model.pb").read_bytes() == before
    model.export_saved_model(where, max_new_tokens=3)
    assert (where / "saved_model.pb").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a new folder or a SavedModel to replace"):
        model.export_saved_model(tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_a_prompt_may_have_any_length_so_max_length_says_nothing(model, tmp_path):
    with pytest.raises(InputError, match="give max_new_tokens instead"):
        model.export_saved_model(tmp_path / "saved", max_length=20)


def test_the_file_has_the_two_signatures_on_any_batch_and_length(model, tmp_path):
    model.export_saved_model(tmp_path / "saved", max_new_tokens=2)
    signatures = tf.saved_model.load(str(tmp_path / "saved")).signatures
    assert set(signatures) == {"logits", "generate"}
    for function in signatures.values():
        specs = function.structured_input_signature[1]
        assert {name: (spec.shape.as_list(), spec.dtype) for name, spec in specs.items()} == {
            name: ([None, None], tf.int32) for name in ("input_ids", "attention_mask")
        }
