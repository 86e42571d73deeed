"""What hostile or merely odd use of training in Flax found once, so that it stays mended: batches, states, files."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.flax import FlaxGPT2ForSequenceClassification, FlaxGPT2LMHeadModel, FlaxGPT2Model
from gpt2_multi.flax.training import (
    Windows,
    create_train_state,
    eval_step,
    optimizer,
    restore_state,
    save_state,
    train_step,
)
from gpt2_multi.flax.training.state import accumulated
from gpt2_multi.model.config import GPT2Config

SMALL = GPT2Config(
    vocab_size=40, n_positions=24, n_embd=12, n_layer=1, n_head=3, eos_token_id=None, initializer_range=0.4,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture(scope="module")
def model():
    return FlaxGPT2LMHeadModel(SMALL.replace())


def sentence(error):
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def state(model):
    return create_train_state(model, optimizer(1e-3))


@pytest.mark.parametrize(
    ("batch", "micro", "words"),
    [
        ({}, False, "batch: expected a dict of inputs and labels, found {}"),
        ((IDS, IDS), False, "batch: expected a dict of inputs and labels, found tuple"),
        ({**BATCH, "attention_mask": IDS[:, :3]}, False, r"attention_mask: expected shape \(2, 7\)"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, False, r"input_ids: expected shape \(any, any\), found \(7,\)"),
        (
            {name: x[None] for name, x in BATCH.items()},
            False,
            r"input_ids: expected shape \(any, any\), found \(1, 2, 7\)",
        ),
        (BATCH, True, r"input_ids: expected shape \(any, any\), found \(7,\)"),
        ({"input_ids": IDS[None], "labels": IDS[[0, 1, 0], None]}, True, "batch: expected as many micro-batches"),
        ({"input_ids": IDS * 1.0, "labels": IDS}, False, "input_ids: expected integers, found float64"),
        ({"input_ids": [[2**40]], "labels": [[1]]}, False, "input_ids: the id 1099511627776 is outside the vocabulary"),
        ({"input_ids": [[1], [1, 2]], "labels": IDS}, False, "input_ids: expected rows of numbers, all of one length"),
        ({"input_ids": jnp.zeros((2, 25), int), "labels": IDS}, False, "25 tokens are more than n_positions 24"),
    ],
)
def test_a_batch_that_no_call_would_take_is_one_sentence(state, batch, micro, words):
    with pytest.raises(InputError, match=words) as error:
        train_step(state, batch, micro)
    sentence(error)


def test_classes_are_checked_and_unknown_inputs_named(state):
    with pytest.raises(TypeError, match="batch has no argument 'atention_mask'; did you mean 'attention_mask'"):
        eval_step(state, {**BATCH, "atention_mask": IDS})
    classifier = create_train_state(FlaxGPT2ForSequenceClassification(SMALL.replace(num_labels=3)), optax.sgd(0.1))
    with pytest.raises(InputError, match="labels: 3 is not a class"):
        train_step(classifier, {"input_ids": IDS, "attention_mask": IDS, "labels": np.array([0, 3])})
    with pytest.raises(InputError, match="batch: expected labels for the loss, found input_ids"):
        train_step(create_train_state(FlaxGPT2Model(SMALL), optax.sgd(0.1)), {"input_ids": IDS})


def test_lists_and_inputs_that_are_none_are_what_arrays_are(state):
    expected = eval_step(state, BATCH)
    assert eval_step(state, {name: x.tolist() for name, x in BATCH.items()} | {"attention_mask": None}) == expected


@pytest.mark.parametrize("bad", [None, 1e-3])
def test_what_is_no_optimizer_and_no_tree_is_one_sentence(model, bad):
    with pytest.raises(InputError, match="optimizer: expected one of optax, found"):
        create_train_state(model, bad)
    with pytest.raises(InputError, match=r"params: .* take model.params"):
        create_train_state(model, optax.sgd(0.1), {"params": model.params} if bad else {})


def test_optimizers_that_leave_parameters_out_train_and_states_are_used_once(model):
    labels = unflatten_dict({path: "still" if "wte" in path else "adam" for path in flatten_dict(model.params)})
    parts = optax.multi_transform({"adam": optax.adam(1e-2), "still": optax.set_to_zero()}, labels)
    state = create_train_state(model, parts, jax.tree.map(np.asarray, model.params))
    after, _ = train_step(state, BATCH)
    for path, leaf in flatten_dict(after.params).items():
        assert np.array_equal(leaf, flatten_dict(model.params)[path]) == ("wte" in path)
    for use in (lambda: train_step(state, BATCH), lambda: eval_step(state, BATCH), lambda: save_state("x", state)):
        with pytest.raises(InputError, match=r"state: the memory was given away, .*; go on with what that returned"):
            use()
    create_train_state(model, optax.adafactor(1e-3))


def test_gradients_of_many_labels_stay_within_float16():
    def loss(params, batch, key):
        return (params["w"] * 100).sum(), jnp.float32(10_000)

    state = SimpleNamespace(params={"w": jnp.ones(2, jnp.float16)}, apply_fn=jax.jit(loss), base=None)
    grads = accumulated(state, {"x": jnp.zeros((4, 1))}, jax.random.key(0))[1]["w"]
    assert grads.dtype == jnp.float16 and grads.tolist() == [100, 100]


def test_windows_look_at_what_they_are_given(tmp_path):
    for options in ({"length": 0}, {"batch_size": 0}, {"seed": -1}, {"length": 2.5}):
        with pytest.raises(InputError, match=f"{next(iter(options))}: expected a whole number from"):
            Windows(np.arange(50), **{"length": 5, "batch_size": 2, **options})
    with pytest.raises(InputError, match="ids: expected integers, found float64"):
        Windows(np.arange(50) * 1.5, 5, 2)
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "ids")
    data = Windows(np.memmap(tmp_path / "ids", np.uint16), 5, 2)
    assert (
        isinstance(data.ids.base, np.memmap) and data[0]["labels"].dtype == np.int32
    )  # the file is not read as a whole


@pytest.mark.filterwarnings("ignore")
def test_damaged_and_missing_states_are_one_sentence(state, tmp_path):
    with pytest.raises(CheckpointError, match="expected a saved state, found none"):
        restore_state(tmp_path / "none", state)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="keep: expected a whole number from 1, found 0"):
        save_state(tmp_path / "s", state, keep=0)
    save_state(tmp_path / "s", state)
    for name, change in (("_METADATA", Path.unlink), ("_sharding", lambda path: path.write_text("{"))):
        shutil.copytree(tmp_path / "s", tmp_path / name)
        change(tmp_path / name / "0" / "default" / name)
        with pytest.raises(CheckpointError, match=r"the state of step 0 is damaged .*; delete it to go on") as error:
            restore_state(tmp_path / name, state)
        sentence(error)


@pytest.mark.filterwarnings("ignore")
def test_the_example_refuses_what_it_cannot_use(state, tmp_path, monkeypatch):
    testing = pytest.importorskip("click.testing")
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "examples")
    example = importlib.import_module("train_flax")
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    (tmp_path / "short").write_text("To be")
    save_state(tmp_path / "old" / "states", state)
    for text, output, more, words in (
        ("t", "a", (), "not readable as UTF-8"),
        ("short", "a", (), "ids: expected at least"),
        ("short", "old", (), "has the states of a run; add --resume, or take another folder"),
        ("short", "t", (), "expected a folder to write in"),
        ("short", "a", ("--stop-at", "0"), "Invalid value for '--stop-at'"),
    ):
        options = ["--text", str(tmp_path / text), "--output", str(tmp_path / output), *more]
        result = testing.CliRunner().invoke(example.main, options)
        assert result.exit_code and words in result.output, (result.output, result.exception)
