"""Training in Flax on one device: gradients and losses as recorded, the optimizer, accumulation, dropout, resuming."""

import functools

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.flax import FlaxGPT2DoubleHeadsModel, FlaxGPT2LMHeadModel
from gpt2_multi.flax.parameters.tree import rows_of
from gpt2_multi.flax.training import (
    Windows,
    cosine_rate,
    cosine_schedule,
    create_train_state,
    decay_mask,
    eval_step,
    optimizer,
    restore_state,
    save_state,
    train_step,
    update,
)
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table
from tests.support import fixtures

OFF = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, eos_token_id=None, bos_token_id=None)
IDS = np.random.default_rng(5).integers(0, 31, (4, 9)).astype(np.int32)
BATCH = {"input_ids": IDS, "labels": IDS}
ADAMW, SGD, STILL = optimizer(1e-2), optax.sgd(1.0), optax.sgd(0.0)


def recorded_batch():
    recorded = fixtures.reference("lm")
    return {name: recorded[f"in.{name}"].astype(np.int32) for name in ("input_ids", "labels")}


@functools.cache
def model_of(cls=FlaxGPT2LMHeadModel, scan_layers=False, **changes):
    """A randomised model, one for the same arguments, so that its steps are compiled once."""
    model, rng = cls(SMALL.replace(**changes), scan_layers=scan_layers, _do_init=False), np.random.default_rng(0)
    model.params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), model.params_shape_tree)
    model.params = jax.device_put(model.params)
    return model


def state_of(tx=ADAMW, seed=0, **options):
    return create_train_state(model_of(**options), tx, seed=seed)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_gradients_equal_the_recorded(scan_layers):
    recorded = fixtures.reference("lm")
    model = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), scan_layers=scan_layers)
    grads = jax.grad(lambda params: model(**recorded_batch(), params=params).loss)(model.params)
    rows = rows_of(grads, model.config, "lm", scan_layers)
    for row in table(model.config):
        prefix = "transformer." if row.in_body else ""
        expected = recorded[f"grad.{prefix}{row.name}"]
        assert np.abs(rows[row.name]() - expected).max() <= 1e-4 * np.abs(expected).max(), row.name
    assert len(rows) == sum(key.startswith("grad.") for key in recorded) > 30


@pytest.mark.parametrize("options", [{}, {"scan_layers": True, "remat": "nothing_saveable"}])
def test_twenty_steps_of_adamw_give_the_recorded_losses(options):
    model = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), **OFF, **options)
    state = create_train_state(model, optimizer(1e-3, max_norm=None, b1=0.9, b2=0.95, eps=1e-8, mask=None))
    losses = []
    for _ in range(20):
        state, metrics = train_step(state, recorded_batch())
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, fixtures.reference("lm")["train.losses"], rtol=1e-4)
    assert int(state.step) == 20


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("cls", [FlaxGPT2LMHeadModel, FlaxGPT2DoubleHeadsModel])
def test_matrices_and_embeddings_decay_and_nothing_else(cls, scan_layers):
    model = cls(SMALL.replace(add_cross_attention=cls is FlaxGPT2LMHeadModel), scan_layers=scan_layers, _do_init=False)
    mask = decay_mask(model.params_shape_tree)
    rows = {".".join(path): decays for path, decays in flatten_dict(mask).items()}
    assert {path.rsplit(".")[-1] for path, decays in rows.items() if decays} == {"kernel", "embedding"}
    assert {path.rsplit(".")[-1] for path, decays in rows.items() if not decays} == {"bias", "scale"}


def test_what_does_not_decay_stays_where_there_is_no_gradient():
    state = state_of(tx=optimizer(0.1, weight_decay=0.5), scan_layers=True)
    params = jax.tree.map(lambda x: jnp.ones_like(x), state.params)
    updates, _ = state.tx.update(jax.tree.map(jnp.zeros_like, params), state.tx.init(params), params)
    moved = {path: float(np.abs(x).max()) for path, x in flatten_dict(updates).items()}
    for path, change in moved.items():
        assert change == pytest.approx(0.05 if path[-1] in ("kernel", "embedding") else 0, rel=1e-6), path


@pytest.mark.parametrize(
    ("steps", "warmup", "least"), [(20, 5, 0.1), (7, 0, 0.0), (3, 3, 0.5), (1, 0, 0.1), (2, 4, 0.2)]
)
def test_the_schedule_is_that_of_pytorch(steps, warmup, least):
    other = pytest.importorskip("gpt2_multi.pt.training").cosine_schedule
    for step in range(steps + 5):
        expected = other(step, steps, warmup, least)
        assert float(cosine_schedule(jnp.int32(step), steps, warmup, least)) == pytest.approx(expected, abs=1e-6)
        assert float(cosine_rate(3.0, steps, warmup, least)(step)) == pytest.approx(3 * expected, abs=1e-6)


def test_gradients_are_clipped_together():
    state = state_of(optax.chain(optax.clip_by_global_norm(0.01), SGD), **OFF)
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = train_step(state, BATCH)
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, before, after.params))
    assert float(metrics["grad_norm"]) > 0.01 and float(moved) == pytest.approx(0.01, rel=1e-4)


def test_the_optimizer_clips_unless_it_is_told_not_to():
    params, grads = {"bias": jnp.ones(2)}, {"bias": jnp.array([30.0, 40.0])}
    for norm, expected in ((1.0, 0.8), (None, 40.0)):
        tx = optimizer(1.0, max_norm=norm, b1=0.0)
        _, moments = tx.update(grads, tx.init(params), params)
        assert float(optax.tree_utils.tree_get(moments, "mu")["bias"][1]) == pytest.approx(expected, rel=1e-5)


def test_accumulation_gives_what_the_big_batch_gives():
    mask, labels = np.ones_like(IDS), IDS.copy()
    mask[3, 3:], labels[0, :4] = 0, -100  # the micro-batches have different numbers of labels
    big = {"input_ids": IDS, "labels": labels, "attention_mask": mask}
    one, first = train_step(state_of(SGD, **OFF), big)
    two, second = train_step(state_of(SGD, **OFF), {name: x.reshape(2, 2, 9) for name, x in big.items()}, micro=True)
    assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_dropout_differs_by_step_and_can_be_repeated():
    def losses(seed):
        state, found = state_of(STILL, seed, resid_pdrop=0.5), []
        for _ in range(3):
            state, metrics = train_step(state, BATCH)
            found.append(float(metrics["loss"]))
        return found

    first = losses(0)
    assert len(set(first)) == 3 and first == losses(0) and first != losses(1)


def test_dropout_differs_by_micro_batch_and_is_off_in_evaluation():
    state = state_of(STILL, resid_pdrop=0.5)
    loss, count = eval_step(state, BATCH)
    assert float(loss) == float(eval_step(state, BATCH)[0]) and int(count) == 4 * 8
    state, one = train_step(state, BATCH)
    state, two = train_step(state.replace(step=state.step * 0), {n: np.stack([x, x]) for n, x in BATCH.items()}, True)
    assert len({float(loss), float(one["loss"]), float(two["loss"])}) == 3


def test_training_without_a_dropout_key_is_one_sentence():
    with pytest.raises(InputError, match=r"dropout_rng: train=True draws dropout; give a key, such as jax.random.key"):
        FlaxGPT2LMHeadModel(SMALL)(**BATCH, train=True)


def test_a_step_takes_the_state_but_not_the_model():
    state = state_of()
    after, _ = train_step(state, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(model_of().params))
    given = create_train_state(model_of(), ADAMW, after.params)
    assert all(x.is_deleted() for x in jax.tree.leaves(after.params))  # used up, as the words say
    assert jax.eval_shape(update, given, BATCH)[1]["loss"].shape == ()


def test_a_step_is_compiled_once():
    from gpt2_multi.flax.training.state import _compiled

    state = state_of()
    _compiled.cache_clear()
    for _ in range(3):
        state, _ = train_step(state, BATCH)
    tree, leaves = jax.tree.structure(state), tuple(x.sharding for x in jax.tree.leaves(state))
    assert _compiled.cache_info().misses == 1
    assert _compiled(tree, leaves, False)._cache_size() == 1


def test_both_losses_of_two_heads_are_learned():
    ids, options = IDS.reshape(2, 2, 9), dict(cls=FlaxGPT2DoubleHeadsModel, **OFF, summary_first_dropout=0.0)
    batch = {"input_ids": ids, "labels": ids, "mc_labels": np.array([0, 1])}
    out = model_of(**options)(**batch)
    _, metrics = train_step(state_of(**options), batch)
    assert float(metrics["loss"]) == pytest.approx(float(out.loss + out.mc_loss), rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({"input_ids": IDS}, "batch: expected labels for the loss, found input_ids"),
        ({"input_ids": IDS + 25, "labels": IDS}, r"input_ids: the id \d+ is outside the vocabulary"),
        ({"input_ids": IDS, "labels": IDS + 25}, "labels"),
        (dict.fromkeys(("input_ids", "labels"), np.zeros((1, 25), np.int32)), "25 tokens are more than n_positions 24"),
    ],
)
def test_a_bad_batch_is_one_sentence(batch, sentence):
    with pytest.raises(InputError, match=sentence):
        train_step(state_of(), batch)


TEXT = np.random.default_rng(0).integers(0, 31, 200)


def test_windows_follow_from_the_step_and_each_epoch_takes_each_once():
    data = Windows(np.arange(100), length=9, batch_size=5, seed=3)
    assert data.steps_per_epoch == 2
    for epoch in range(3):
        seen = np.concatenate([data[2 * epoch + i]["input_ids"] for i in range(2)])
        assert len(np.unique(seen)) == seen.size == 90 and np.array_equal(np.diff(seen), np.ones((10, 8)))
    assert not np.array_equal(data[0]["input_ids"], data[2]["input_ids"])
    assert equal(data[7], Windows(np.arange(100), length=9, batch_size=5, seed=3)[7])
    with pytest.raises(InputError, match=r"ids: expected at least 54, .* found 30"):
        Windows(np.arange(30), length=9, batch_size=5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_run_that_stops_goes_on_bit_by_bit(scan_layers, tmp_path):
    data = Windows(TEXT, length=9, batch_size=4)

    def run(state, until):
        losses = []
        while int(state.step) < until:
            state, metrics = train_step(state, data[int(state.step)])
            losses.append(float(metrics["loss"]))
        return state, losses

    whole, losses = run(state_of(scan_layers=scan_layers), 9)
    half, _ = run(state_of(scan_layers=scan_layers), 5)
    save_state(tmp_path, half)
    fresh = state_of(scan_layers=scan_layers, seed=1)
    resumed, rest = run(restore_state(tmp_path, fresh), 9)
    assert rest == losses[5:]
    assert equal(whole.params, resumed.params) and equal(whole.opt_state, resumed.opt_state)
    assert jax.random.key_data(whole.dropout_key).tolist() == jax.random.key_data(resumed.dropout_key).tolist()


def test_states_are_kept_by_step_and_what_does_not_fit_is_refused(tmp_path):
    state = state_of()
    with pytest.raises(CheckpointError, match="expected a saved state, found none; save_state writes one"):
        restore_state(tmp_path, state)
    for _ in range(3):
        save_state(tmp_path, state)
        state, _ = train_step(state, BATCH)
    assert int(restore_state(tmp_path, state_of()).step) == 2 and int(restore_state(tmp_path, state_of(), 1).step) == 1
    with pytest.raises(CheckpointError, match="found only those of the steps 1, 2"):
        restore_state(tmp_path, state, 0)
    sentence = r"the state of step 2: expected .*kernel to be float32\[.*\], found float32\[.*; make the model and"
    with pytest.raises(CheckpointError, match=sentence.replace("kernel", "(bias|embedding|kernel|scale)")):
        restore_state(tmp_path, state_of(n_embd=24))
    with pytest.raises(CheckpointError, match=r"expected params.transformer.h.2.attn.* found none; make the model"):
        restore_state(tmp_path, state_of(n_layer=3))
    with pytest.raises(CheckpointError, match=r"expected opt_state.*count to be absent, found int32\[\]"):
        restore_state(tmp_path, state_of(SGD))
