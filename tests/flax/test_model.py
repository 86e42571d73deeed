"""GPT-2 in Flax beyond parity: masks, caches, dtypes, switches of the configuration, gradients, modules, bad input."""

import math
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp
import optax
from jax import lax

from gpt2_multi import flax
from gpt2_multi.errors import InputError
from gpt2_multi.flax import FlaxGPT2LMHeadModel, FlaxGPT2Model, GPT2LMHeadModule, KVCache
from gpt2_multi.flax.layers import of_matrices
from gpt2_multi.flax.parameters.tree import rows_of
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.spelling import TRANSFORMERS
from gpt2_multi.model.weights import table
from tests.support import adapters, fixtures
from tests.support.cases import CHANGES

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, eos_token_id=None, bos_token_id=None)
IDS = np.random.default_rng(5).integers(0, 31, (3, 9))
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
OFF = dict.fromkeys(DROPOUTS, 0.0)
KEY = jax.random.key(0)
LAYOUTS = {
    "plain": {},
    "scanned": {"scan_layers": True},
    "remat": {"remat": "dots_saveable"},
    "remat all": {"remat": "nothing_saveable"},
    "scanned remat": {"scan_layers": True, "remat": "dots_with_no_batch_dims_saveable"},
}


@pytest.fixture
def make(tmp_path):
    """A function that writes a randomised model of a configuration and loads it in float64."""

    def load(config=SMALL, cls=FlaxGPT2LMHeadModel, **options):
        arrays = fixtures.write_model(tmp_path / "m", config, cls.head)
        return cls.from_pretrained(tmp_path / "m", **{"param_dtype": "float64", **options}), arrays

    return load


def close(found, expected, bound=1e-9):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound)


def logits(model, ids=IDS, **inputs):
    return np.asarray(model(ids, **inputs).logits)


def rows(model, tree):
    """The leaves of a tree like `params`, by the table's names: the same for scanned layers."""
    found = rows_of(tree, model.config, model.head, model.scan_layers)
    return {name: np.asarray(row()) for name, row in found.items()}


@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_is_honoured_by_scanned_layers_and_others(change, make):
    config = SMALL.replace(**{change.split("=")[0]: CHANGES[change]})
    for layout in ({}, {"scan_layers": True}):
        model, arrays = make(config, **layout)
        close(logits(model), reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_upcasting_works_in_float32_whatever_the_dtype(dtype, make, monkeypatch):
    from gpt2_multi.flax import attention

    config = SMALL.replace(reorder_and_upcast_attn=True)
    model, arrays = make(config, param_dtype=dtype)
    seen, softmax = [], attention.nn.softmax
    monkeypatch.setattr(attention.nn, "softmax", lambda x: seen.append(str(x.dtype)) or softmax(x))
    found = logits(model)
    assert set(seen) == {"float32"} and found.dtype == dtype
    expected = reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"]
    assert np.abs(found.astype(np.float64) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("field", DROPOUTS)
def test_each_dropout_acts_in_training_alone(field, make):
    for layout in ("plain", "scanned remat"):
        model, _ = make(SMALL.replace(**OFF | {field: 0.5}), **LAYOUTS[layout])
        still = logits(model)
        assert np.array_equal(still, logits(model, dropout_rng=KEY))
        first, second = (logits(model, train=True, dropout_rng=jax.random.key(i)) for i in (0, 1))
        assert np.abs(first - still).max() > 1e-3 and not np.array_equal(first, second)
        assert np.array_equal(first, logits(model, train=True, dropout_rng=KEY))
        with pytest.raises(InputError, match="dropout_rng: train=True draws dropout; give a key"):
            model(IDS, train=True)


def test_each_scanned_layer_draws_its_own_dropout(make):
    model, _ = make(SMALL.replace(**OFF | {"attn_pdrop": 0.5}), scan_layers=True)
    first, second = model(IDS, train=True, dropout_rng=KEY, output_attentions=True).attentions
    assert ((np.asarray(first) == 0) != (np.asarray(second) == 0)).any()


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_outputs_and_gradients_do_not_depend_on_the_layout(layout, make):
    def answer(**options):
        model, _ = make(SMALL.replace(**OFF), **options)

        def loss(params):
            out = model(IDS, params=params, labels=IDS, train=True, dropout_rng=KEY, output_hidden_states=True)
            return out.loss, out.hidden_states

        (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(model.params)
        return value, hidden, rows(model, grads)

    value, hidden, grads = answer(**LAYOUTS[layout])
    expected_value, expected_hidden, expected_grads = answer()
    assert abs(float(value - expected_value)) < 1e-9 and grads.keys() == expected_grads.keys()
    for one, other in zip(hidden, expected_hidden, strict=True):
        close(one, other)
    for name, grad in grads.items():
        close(grad, expected_grads[name])


@pytest.mark.parametrize("layout", ["plain", "scanned"])
def test_gradient_checkpointing_can_be_switched_on(layout, make):
    """Blocks are multiplied through once more in the backward pass, with the same dropout, until it is off again."""
    model, _ = make(**LAYOUTS[layout])

    def loss(params):
        return model(IDS, params=params, labels=IDS, train=True, dropout_rng=KEY).loss

    def taken():
        return str(jax.make_jaxpr(jax.grad(loss))(model.params)).count("dot_general[")

    count, expected = taken(), jax.value_and_grad(loss)(model.params)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing and taken() >= count + 5
    jax.tree.map(close, jax.value_and_grad(loss)(model.params), expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and taken() == count
    with pytest.raises(InputError, match="remat: expected None or one of everything_saveable"):
        model.gradient_checkpointing_enable("everything")


def test_every_policy_of_remat_computes_the_same(make):
    from gpt2_multi.flax.layers import POLICIES

    assert all(hasattr(jax.checkpoint_policies, name) for name in POLICIES)
    with pytest.raises(InputError, match=r"remat: expected None or one of everything_saveable, .*, found 'dots'"):
        FlaxGPT2Model(SMALL, remat="dots")
    with pytest.raises(InputError, match="remat: expected None or one of"):
        flax.GPT2Module(SMALL, remat="save_only_these_names").init(KEY, IDS)


def test_cross_attention_needs_its_setting_and_counts(make):
    config = SMALL.replace(add_cross_attention=True)
    inputs = {"encoder_hidden_states": np.random.default_rng(0).normal(size=(3, 5, 12))}
    for layout in ({}, {"scan_layers": True}):
        model, arrays = make(config, **layout)
        found = logits(model, **inputs)
        close(found, reference.outputs(config, arrays, "lm", {"input_ids": IDS, **inputs})["logits"])
    assert np.abs(found - logits(model)).max() > 1e-3


def test_rank_4_masks_mean_what_rank_2_masks_mean(make):
    model, _ = make()
    for hidden in (slice(6, 9), slice(0, 3), slice(3, 6)):  # right, left, and in the middle
        mask = np.ones((3, 9), int)
        mask[1, hidden] = 0
        four = np.tile(mask[:, None, None], (1, 1, 9, 1))
        positions = np.maximum(np.cumsum(mask, -1) - 1, 0)  # a mask of rank 4 says nothing about them
        flat = logits(model, attention_mask=mask)
        for each in (four, four.astype(bool), four[:, :, :1], np.where(four, 0.0, -np.inf), np.where(four, 0.0, -1e9)):
            found = logits(model, attention_mask=each, position_ids=positions)
            close(found[mask != 0], flat[mask != 0])


@pytest.mark.parametrize("kind", [np.int32, np.float32, bool, list])
def test_every_kind_of_rank_2_mask_means_the_same(kind, make):
    model, arrays = make()
    mask = np.ones((3, 9), int)
    mask[1, :4], mask[2, 5:] = 0, 0
    expected = reference.outputs(SMALL, arrays, "lm", {"input_ids": IDS, "attention_mask": mask})["logits"]
    found = logits(model, attention_mask=mask.tolist() if kind is list else mask.astype(kind))
    close(found[mask != 0], expected[mask != 0])


def test_square_masks_hide_keys_and_stay_causal(make):
    model, _ = make()
    square = (np.random.default_rng(1).random((3, 3, 9, 9)) > 0.3) | np.eye(9, dtype=bool)
    close(logits(model, attention_mask=square), logits(model, attention_mask=np.where(square, 0.0, -1e4)))
    one, other = (logits(model, np.where(np.arange(9) < 8, IDS, last), attention_mask=square) for last in (0, 1))
    close(one[:, :8], other[:, :8])
    hidden = square.copy()
    hidden[..., 2:, 1] = False
    one, other = (logits(model, np.where(np.arange(9) != 1, IDS, i), attention_mask=hidden) for i in (0, 1))
    close(one[:, 2:], other[:, 2:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_what_it_gives_alone(side, make):
    model, _ = make()
    for length in (1, 4, 8):
        ids, mask = np.full((3, 9), 7), np.zeros((3, 9), int)
        where = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[0], mask[0] = IDS[0], 1
        ids[1, where], mask[1, where] = IDS[1, :length], 1
        alone = logits(model, IDS[1:2, :length])
        close(logits(model, ids, attention_mask=mask)[1, where], alone[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [2, 4])
def test_a_row_that_is_all_padding_is_finite(dtype, rank, make):
    model, arrays = make(param_dtype=dtype)
    mask = np.ones((3, 9), int)
    mask[0], mask[1, :8] = 0, 0
    given = mask if rank == 2 else np.where(mask, 0.0, -np.inf)[:, None, None].astype(np.float32)
    found = logits(model, attention_mask=given).astype(np.float64)
    assert np.isfinite(found).all()
    if rank == 2:  # left padding in half precision, too
        expected = reference.outputs(SMALL, arrays, "lm", {"input_ids": IDS, "attention_mask": mask})["logits"]
        assert np.abs(found - expected)[mask != 0].max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("width", [48, 13])
def test_one_row_is_multiplied_by_all_parts_of_a_kernel(width, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    row, kernel = (np.random.default_rng(0).normal(size=size) for size in ((1, 1, width), (width, 2, 3)))
    contracted = (((2,), (0,)), ((), ()))
    found, back = jax.vjp(lambda row, kernel: of_matrices(row, kernel, contracted), row, kernel)
    np.testing.assert_allclose(found, np.tensordot(row, kernel, 1), rtol=0, atol=1e-13)
    of_row, of_kernel = back(found)
    np.testing.assert_allclose(of_row, np.einsum("btnd,knd->btk", found, kernel), rtol=0, atol=1e-13)
    np.testing.assert_allclose(of_kernel, np.einsum("btk,btnd->knd", row, found), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", ["plain", "scanned"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_passed_back_by_hand_gives_the_same_logits(layout, padded, make):
    model, _ = make(**LAYOUTS[layout])
    mask = np.ones((3, 9), int)
    mask[1, :2] = 0 if padded else 1
    whole = logits(model, attention_mask=mask)
    past, pieces = model.init_cache(3, 12), []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        out = model(IDS[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past = out.past_key_values
        pieces.append(out.logits)
    close(np.concatenate(pieces, 1)[mask != 0], whole[mask != 0])
    assert past.get_seq_length() == 9 and past.capacity == 12 and past.stacked == (layout == "scanned")
    assert [key.shape for key, _ in past] == [(3, 3, 9, 4)] * 2 == [value.shape for _, value in past[0:2]]


def test_rank_4_masks_work_with_a_cache(make):
    model, _ = make()
    square = np.tile(np.random.default_rng(1).random((3, 1, 1, 9)) > 0.3, (1, 1, 9, 1))
    whole = logits(model, attention_mask=square)
    first = model(IDS[:, :5], attention_mask=square[:, :, :5, :5], past_key_values=model.init_cache(3, 12))
    second = model(IDS[:, 5:], attention_mask=square[:, :, 5:], past_key_values=first.past_key_values)
    close(second.logits, whole[:, 5:])


def test_a_cache_never_changes_and_can_branch(make):
    model, _ = make()
    past = model(IDS[:, :4], past_key_values=model.init_cache(3, 9)).past_key_values
    one, two = (model(IDS[:, 4:6], past_key_values=past) for _ in range(2))
    assert past.get_seq_length() == 4 and one.past_key_values.get_seq_length() == 6
    assert np.array_equal(one.logits, two.logits) and len(past) == 2 and past[0][0].shape == (3, 3, 4, 4)


@pytest.mark.parametrize("layout", ["plain", "scanned"])
def test_a_cache_is_reused_after_reset_and_refuses_too_much(layout, make):
    model, _ = make(**LAYOUTS[layout])
    first = model(IDS[:, :6], past_key_values=model.init_cache(3, 6))
    cache = first.past_key_values
    with pytest.raises(InputError, match="6 cached and 1 new tokens are more than the cache's max_length 6"):
        model(IDS[:, 6:7], past_key_values=cache)
    cache = cache.reset()
    assert isinstance(cache, KVCache) and cache.get_seq_length() == 0 and cache.capacity == 6
    assert np.array_equal(model(IDS[:, :6], past_key_values=cache).logits, first.logits)
    with pytest.raises(InputError, match="25 tokens are more than n_positions 24"):
        model.init_cache(1, 25)


@pytest.mark.parametrize("change", ["rows", "dtype", "layout", "layers", "pairs", "nothing"])
def test_a_cache_that_does_not_fit_is_one_sentence(change, make):
    model, _ = make()
    past = {
        "rows": lambda: model.init_cache(4, 20),
        "dtype": lambda: make(dtype="float32")[0].init_cache(3, 20),
        "layout": lambda: make(scan_layers=True)[0].init_cache(3, 20),
        "layers": lambda: make(SMALL.replace(n_layer=1))[0].init_cache(3, 20),
        "pairs": lambda: tuple(model.init_cache(3, 20))[:1],
        "nothing": lambda: (),
    }[change]()
    with pytest.raises(InputError, match=r"past_key_values: (expected a cache of 2 layers|made for)"):
        model(IDS, past_key_values=past)


@pytest.mark.parametrize("layout", ["plain", "scanned"])
def test_pairs_of_keys_and_values_are_a_past_that_grows(layout, make):
    """As in the other frameworks, stacked or not, under the name of 2019 too; where pairs go in, pairs come out."""
    model, _ = make(**LAYOUTS[layout])
    whole, cache = logits(model), model(IDS[:, :6], past_key_values=model.init_cache(3, 8)).past_key_values
    pairs = [(np.asarray(key), np.asarray(value)) for key, value in cache]
    second = model(IDS[:, 6:7], attention_mask=np.ones((3, 7)), past_key_values=tuple(pairs))
    assert [key.shape for key, _ in second.past_key_values] == [(3, 3, 7, 4)] * 2
    close(model(IDS[:, 7:], past_key_values=second.past_key_values).logits, whole[:, 7:])
    found, past = model(IDS[:, 6:], past=[np.stack(pair) for pair in pairs])
    close(found, whole[:, 6:])
    assert len(past) == 2 and np.array_equal(past[0][0][:, :, :6], pairs[0][0])
    made = model.generate(IDS, past_key_values=pairs, max_new_tokens=3)
    assert np.array_equal(made, model.generate(IDS, past_key_values=cache, max_new_tokens=3))
    with pytest.raises(TypeError, match="past is past_key_values under its old name; give one of the two"):
        model(IDS[:, 6:], past=pairs, past_key_values=pairs)
    with pytest.raises(InputError, match="layers, found list; pass it back as it is, or use init_cache"):
        model.module.apply({"params": model.params}, IDS[:, 6:], past_key_values=pairs)


@pytest.mark.parametrize("layout", ["plain", "scanned"])
def test_cross_attention_is_cached_too(layout, make):
    model, _ = make(SMALL.replace(add_cross_attention=True), **LAYOUTS[layout])
    states, mask = np.random.default_rng(0).normal(size=(3, 5, 12)), [[1] * 5, [1] * 3 + [0] * 2, [1] * 5]
    options = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    whole = logits(model, **options)
    past = model(IDS[:, :8], past_key_values=model.init_cache(3, 9), **options).past_key_values
    for given in (options, {"encoder_attention_mask": mask}):  # the states are in the cache
        close(model(IDS[:, 8:], past_key_values=past, **given).logits[:, 0], whole[:, 8])


def test_all_decode_steps_are_one_compilation(make, monkeypatch):
    from gpt2_multi.flax import model as module

    model, _ = make()
    whole, mask, past = logits(model), np.ones((3, 9), int), model.init_cache(3, 9)
    traces, bias = [], module.causal_bias
    monkeypatch.setattr(module, "causal_bias", lambda *args: traces.append(args) or bias(*args))
    for step in range(9):
        out = model(IDS[:, step : step + 1], attention_mask=mask[:, : step + 1], past_key_values=past)
        past = out.past_key_values
        close(out.logits[:, 0], whole[:, step])
    assert len(traces) == 1


def decode_step(model, traces):
    """One token's logits and the next cache, as a pure function, which notes that it is traced."""

    def step(cache, token):
        traces.append(token.shape)
        out = model.module.apply({"params": model.params}, token[:, None], past_key_values=cache)
        return out.past_key_values, out.logits[:, 0]

    return step


@pytest.mark.parametrize("layout", ["plain", "scanned"])
def test_a_decode_step_runs_in_scan_and_in_while_loop(layout, make):
    model, _ = make(**LAYOUTS[layout])
    whole, traces = logits(model), []
    step = decode_step(model, traces)
    cache, found = jax.jit(lambda cache, tokens: lax.scan(step, cache, tokens))(model.init_cache(3, 9), IDS.T)
    close(np.moveaxis(np.asarray(found), 0, 1), whole)
    assert cache.get_seq_length() == 9 and len(traces) == 1

    def once(carried):
        cache, _ = carried
        return step(cache, lax.dynamic_index_in_dim(jnp.asarray(IDS), cache.length, axis=1, keepdims=False))

    start = (model.init_cache(3, 9), jnp.zeros((3, 31)))
    cache, last = jax.jit(lambda start: lax.while_loop(lambda carried: carried[0].length < 9, once, start))(start)
    close(last, whole[:, 8])


def test_a_donated_cache_is_written_in_place(make):
    model, _ = make()
    whole, traces = logits(model), []
    step, cache = jax.jit(decode_step(model, traces), donate_argnums=0), model.init_cache(3, 9)
    for place in range(9):
        before = cache
        cache, found = step(cache, IDS[:, place])
        close(found, whole[:, place])
        assert before.layers[0][0].is_deleted()
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)]
)
@pytest.mark.parametrize("stored", ["float64", "bfloat16"])
def test_computing_and_storing_in_two_dtypes(dtype, stored, bound, make):
    model, arrays = make(dtype=dtype, param_dtype=stored)
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {stored}

    def total(params):
        out = model(IDS, params=params, output_hidden_states=True)
        return out.logits.astype(float).sum(), out

    grads, out = jax.grad(total, has_aux=True)(model.params)
    assert model.dtype == out.logits.dtype == out.hidden_states[1].dtype == dtype
    kept = {name: np.asarray(jnp.asarray(array, stored), np.float64) for name, array in arrays.items()}
    expected = reference.outputs(SMALL, kept, "lm", {"input_ids": IDS})["logits"]
    assert np.abs(np.asarray(out.logits, np.float64) - expected).max() <= bound * np.abs(expected).max()
    assert all(grad.dtype == stored and jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads))


def test_gradients_equal_the_recorded():
    recorded = fixtures.reference("lm")
    model = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype="float64")
    ids, labels = recorded["in.input_ids"], recorded["in.labels"]
    grads = rows(model, jax.grad(lambda params: model(ids, params=params, labels=labels).loss)(model.params))
    for weight in table(model.config, "lm"):
        expected = recorded[f"grad.{TRANSFORMERS.spell(weight)}"]
        assert np.abs(grads[weight.name] - expected).max() <= 1e-4 * np.abs(expected).max(), weight.name
    assert len(grads) == sum(key.startswith("grad.") for key in recorded) > 30


@pytest.mark.parametrize("layout", ["plain", "scanned remat"])
def test_twenty_steps_of_adamw_give_the_recorded_losses(layout):
    recorded = fixtures.reference("lm")
    model = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), **OFF, **LAYOUTS[layout])
    ids, labels = recorded["in.input_ids"], recorded["in.labels"]
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)

    @jax.jit
    def step(params, state):
        def loss(params):
            return model.module.apply({"params": params}, ids, labels=labels, train=True).loss

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    params, state, losses = model.params, optimizer.init(model.params), []
    for _ in range(20):
        value, params, state = step(params, state)
        losses.append(float(value))
    np.testing.assert_allclose(losses, recorded["train.losses"], rtol=1e-4)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "scanned"])
def fresh(request):
    """A model with its first parameters, large enough for statistics."""
    config = GPT2Config(vocab_size=2000, n_positions=512, n_embd=96, n_layer=4, n_head=4, initializer_range=0.05)
    return FlaxGPT2Model(config, scan_layers=request.param)


def check_deviations(model, params):
    found = rows(model, params)
    for weight in table(model.config, "base"):
        value = found[weight.name]
        if weight.kind in ("bias", "shift", "scale"):
            assert (value == (weight.kind == "scale")).all()
        else:
            expected = 0.05 / math.sqrt(8) if "c_proj" in weight.name else 0.05
            assert value.std() == pytest.approx(expected, rel=0.03) and abs(value.mean()) < 0.005, weight.name
    seen = {tuple(found[weight.name].flat[:4]) for weight in table(model.config, "base") if weight.std}
    assert len(seen) == 18  # no two layers start alike


def test_initialisation_has_the_stds_of_the_table(fresh):
    check_deviations(fresh, fresh.params)


def test_a_module_alone_starts_with_the_tree_and_the_stds_of_the_table(fresh):
    params = jax.jit(fresh.module.init)(KEY, IDS[:, :2])["params"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes == fresh.params_shape_tree
    assert shapes == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), fresh.params)
    check_deviations(fresh, params)


CLASSES = [*adapters.classes(flax).values()]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("scanned", [False, True])
def test_every_module_alone_has_the_tree_of_its_class(cls, scanned):
    config = SMALL.replace(add_cross_attention=cls.head == "lm", tie_word_embeddings=False)
    model = cls(config, scan_layers=scanned, _do_init=False, param_dtype="bfloat16")
    ids = IDS[None] if cls.head == "double_heads" else IDS
    states = {"encoder_hidden_states": np.zeros((3, 2, 12))} if cls.head == "lm" else {}
    options = {"attention_mask": np.ones_like(ids), **states}
    module = cls.module_class(config, param_dtype=jnp.bfloat16, scan_layers=scanned)
    assert jax.eval_shape(module.init, KEY, ids, **options)["params"] == model.params_shape_tree


@pytest.mark.parametrize("layout", ["plain", "scanned"])
def test_a_module_alone_computes_what_the_class_does(layout, make):
    model, _ = make(**LAYOUTS[layout])
    module = GPT2LMHeadModule(SMALL, jnp.float64, jnp.float64, **LAYOUTS[layout])
    mask = np.ones((3, 9), int)
    mask[1, :3] = 0
    expected, ids = logits(model, attention_mask=mask), jnp.asarray(IDS)
    close(jax.jit(module.apply)({"params": model.params}, ids, mask).logits, expected)
    each = jax.vmap(lambda ids, mask: module.apply({"params": model.params}, ids[None], mask[None]).logits[0])
    close(each(ids, jnp.asarray(mask)), expected)


def test_a_module_takes_the_flags_of_transformers_modules(make):
    """By name and by place, in `apply` and in `init`, which gives what the class makes."""
    model, _ = make(SMALL.replace(resid_pdrop=0.5))
    ids, params, key = jnp.asarray(IDS[:1, :3]), {"params": model.params}, {"dropout": KEY}
    given = (ids, jnp.ones_like(ids), jnp.arange(3)[None])
    apply, expected = model.module.apply, model(*given).logits
    drawn = apply(params, *given, train=True, rngs=key).logits
    flags = dict(init_cache=False, output_attentions=False, output_hidden_states=False, return_dict=True)
    close(apply(params, *given, deterministic=True, **flags).logits, expected)
    close(apply(params, *given, None, None, True, False, False, True).logits, expected)
    close(apply(params, *given, deterministic=False, rngs=key).logits, drawn)
    close(apply(params, *given, None, None, False, rngs=key).logits, drawn)
    assert (
        apply(params, *given, None, None, True, False, False, True).hidden_states and abs(drawn - expected).max() > 0.01
    )
    made = model.module.init({"params": KEY, **key}, *given, None, None, False, return_dict=False)["params"]
    jax.tree.map(close, made, model.module.init(KEY, ids, deterministic=True)["params"])
    for wrong, sentence in (
        (dict(deterministic=True, train=True), "deterministic: expected the opposite of train, found both True"),
        (dict(init_cache=True), r"init_cache: expected False .* past_key_values what the model's init_cache\("),
        (dict(return_dict=False), r"return_dict: expected True of a module, found another; call to_tuple\(\)"),
    ):
        with pytest.raises(InputError, match=sentence):
            apply(params, *given, **wrong)


def test_calls_are_mapped_over_parameters_and_differentiated(make):
    model, _ = make()
    other = jax.tree.map(lambda x: x * 1.5, model.params)
    both = jax.tree.map(lambda *x: jnp.stack(x), model.params, other)
    found = jax.jit(jax.vmap(lambda params: model(IDS, params=params).logits))(both)
    close(found, np.stack([logits(model), logits(model, params=other)]))
    grads = jax.grad(lambda embeds: model(inputs_embeds=embeds).logits[0, 3].sum())(jnp.ones((1, 9, 12)))
    assert (grads[0, :4] != 0).all() and (grads[0, 4:] == 0).all()


def test_double_precision_has_to_be_switched_on():
    code = """if True:
        import numpy as np
        from gpt2_multi.model.config import GPT2Config
        from gpt2_multi.flax import FlaxGPT2Model
        config = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=1, n_head=3)
        for call in (
            lambda: FlaxGPT2Model(config, param_dtype="float64", _do_init=False),
            lambda: FlaxGPT2Model(config, _do_init=False)(np.array([[2**32 + 3]])),
        ):
            try:
                call()
            except ValueError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    wide, large = done.stdout.splitlines() or [done.stderr] * 2
    assert wide == 'param_dtype: JAX computes in float64 only after jax.config.update("jax_enable_x64", True)'
    assert large.startswith("input_ids: the id 2147483647 is outside the vocabulary (0 to 30)")


def test_the_seed_decides_the_parameters_and_layers_that_are_scanned_start_alike():
    model, same, other = (FlaxGPT2LMHeadModel(SMALL, seed=seed) for seed in (3, 3, 4))
    scanned = FlaxGPT2LMHeadModel(SMALL, (1, 5), 3, scan_layers=True)
    equal = jax.tree.map(np.array_equal, model.params, same.params)
    assert jax.tree.all(equal)
    assert not np.array_equal(*(m.params["transformer"]["wte"]["embedding"] for m in (model, other)))
    alone, stacked = rows(model, model.params), rows(scanned, scanned.params)
    assert alone.keys() == stacked.keys() and all(np.array_equal(alone[name], stacked[name]) for name in alone)


def test_parameters_can_be_given_with_each_call(make):
    model, _ = make()
    bare = FlaxGPT2LMHeadModel(SMALL, (1, 1), 0, jnp.float64, _do_init=False, param_dtype=jnp.float64)
    close(logits(bare, params=model.params), logits(model))
    with pytest.raises(InputError, match="params: this model was made with _do_init=False and holds none"):
        bare(IDS)
    partial = {"transformer": {"wte": model.params["transformer"]["wte"]}}
    params = bare.init_weights(KEY, (1, 1), partial)
    assert np.array_equal(params["transformer"]["wte"]["embedding"], model.params["transformer"]["wte"]["embedding"])
    assert (np.asarray(params["transformer"]["ln_f"]["scale"]) == 1).all()
    with pytest.raises(InputError, match=r"params: transformer/wte/embeddings has shape .*no such parameter"):
        bare.init_weights(KEY, params={"transformer": {"wte": {"embeddings": np.ones(3)}}})
    bare.params = model.params
    close(logits(bare), logits(model))


WRONG = {
    "a list": (lambda params: [params], "params: expected a nested dict, found list"),
    "a missing leaf": (
        lambda params: {"transformer": {k: v for k, v in params["transformer"].items() if k != "ln_f"}},
        "params: transformer/ln_f/bias has shape none, it is missing, expected",
    ),
    "an extra leaf": (lambda params: {**params, "x": np.ones(2)}, r"params: x has shape \(2,\), expected no such"),
    "another shape": (
        lambda params: jax.tree.map(lambda x: x[:-1], params),
        r"params: transformer/h/0/attn/c_attn/bias has shape \(2, 3, 4\), expected \(3, 3, 4\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tree_of_parameters_is_one_sentence(name, make):
    model, _ = make()
    change, sentence = WRONG[name]
    with pytest.raises(InputError, match=sentence):
        model.params = change(model.params)
    with pytest.raises(InputError, match=sentence):
        model(IDS, params=change(model.params))


def test_parameters_are_cast_where_a_mask_says(make):
    model, _ = make(param_dtype="float32")
    for cast, dtype in ((model.to_bf16, "bfloat16"), (model.to_fp16, "float16")):
        assert {str(x.dtype) for x in jax.tree.leaves(cast())} == {dtype}
        back = model.to_fp32(cast())
        assert {str(x.dtype) for x in jax.tree.leaves(back)} == {"float32"}
    mask = jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", model.params)
    mixed = model.to_bf16(model.params, mask)
    assert mixed["transformer"]["ln_f"]["scale"].dtype == "float32"
    assert mixed["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"].dtype == "bfloat16"
    assert jax.tree.leaves(model.params)[0].dtype == "float32" and logits(model, params=mixed).dtype == "float32"


def test_a_changed_configuration_acts_on_the_next_call(make):
    model, _ = make()
    before = logits(model)
    model.config.layer_norm_epsilon = 0.5
    assert np.abs(logits(model) - before).max() > 1e-3
    model.config.layer_norm_epsilon = 1e-5
    assert np.array_equal(logits(model), before)


def test_tuples_flags_and_positions_of_outputs(make):
    model, _ = make(SMALL.replace(output_hidden_states=True))
    out = model(IDS)
    assert out.keys() == ["logits", "hidden_states"] and out[0] is out["logits"] is out.logits
    past = model.init_cache(3, 9)
    assert len(model(IDS, past_key_values=past, return_dict=False, output_attentions=True)) == 4
    with pytest.raises(KeyError, match="has no 'loss' here"):
        out["loss"]


def test_settings_of_the_outputs_are_honoured(make):
    model, _ = make(SMALL.replace(output_attentions=True, return_dict=False))
    found, attentions = model(IDS)
    assert found.shape == (3, 9, 31) and len(attentions) == 2 and attentions[0].shape == (3, 3, 9, 9)
    assert model(IDS, output_attentions=False, return_dict=True).keys() == ["logits"]


def test_logits_to_keep(make):
    model, _ = make()
    close(model(IDS, logits_to_keep=2).logits, logits(model)[:, -2:], 1e-12)
    with pytest.raises(InputError, match="logits_to_keep: expected a whole number from 0, found -1"):
        model(IDS, logits_to_keep=-1)


def test_no_rows_give_no_rows(make):
    model, _ = make()
    assert model(np.zeros((0, 5), int)).logits.shape == (0, 5, 31)


@pytest.mark.parametrize("kind", [lambda x: x.astype(np.int32), lambda x: x.tolist(), jnp.asarray, np.uint8])
def test_ids_of_any_kind_work(kind, make):
    model, _ = make()
    close(logits(model, kind(IDS)), logits(model), 1e-12)


def test_every_rank_of_head_mask_means_the_same(make):
    model, arrays = make()
    rows = np.array([[1.0, 0, 1], [1, 1, 0]])
    expected = reference.outputs(SMALL, arrays, "lm", {"input_ids": IDS, "head_mask": rows})["logits"]
    full = np.broadcast_to(rows[:, None, :, None, None], (2, 3, 3, 9, 9))
    for layout in ({}, {"scan_layers": True}):
        model, _ = make(**layout)
        for mask in (rows, full, full[:, :1, :, :1, :1]):
            close(logits(model, head_mask=mask), expected)
    close(logits(model, head_mask=rows[0]), logits(model, head_mask=rows[[0, 0]]))


BAD = {
    "too large an id": ((IDS + 25,), {}, r"input_ids: the id \d+ is outside the vocabulary \(0 to 30\)"),
    "a negative id": ((IDS - 31,), {}, r"input_ids: the id -\d+ is outside"),
    "too long": ((np.zeros((1, 25), int),), {}, "25 tokens are more than n_positions 24"),
    "types outside": ((IDS,), {"token_type_ids": IDS + 31}, "token_type_ids: the id"),
    "positions outside": ((IDS,), {"position_ids": IDS * 0 + 24}, "25 tokens are more than n_positions 24"),
    "negative positions": ((IDS,), {"position_ids": IDS * 0 - 1}, "position_ids: -1 is negative"),
    "neither": ((), {}, "expected one of input_ids and inputs_embeds, found neither"),
    "both": ((IDS,), {"inputs_embeds": np.zeros((3, 9, 12))}, "found both"),
    "one dimension": ((IDS[0],), {}, r"input_ids: expected shape \(any, any\), found \(9,\)"),
    "wide embeddings": ((), {"inputs_embeds": np.zeros((3, 9, 13))}, r"expected shape \(any, any, 12\)"),
    "a short mask": ((IDS,), {"attention_mask": np.ones((3, 8), int)}, r"attention_mask: expected shape \(3, 9\)"),
    "a number for a mask": ((IDS,), {"attention_mask": 1}, r"attention_mask: expected shape \(3, 9\)"),
    "a wrong rank-4 mask": ((IDS,), {"attention_mask": np.ones((3, 2, 9, 9), bool)}, "attention_mask: expected"),
    "an unasked encoder": ((IDS,), {"encoder_hidden_states": np.zeros((3, 4, 12))}, "has no cross-attention"),
    "an unasked mask": (
        (IDS,),
        {"encoder_attention_mask": np.zeros((2, 4))},
        r"encoder_attention_mask: expected shape",
    ),
    "a strange head_mask": ((IDS,), {"head_mask": np.ones((1, 1, 3))}, r"head_mask: expected shape \(2, 3\) or \(3,\)"),
    "a narrow head_mask": ((IDS,), {"head_mask": np.ones((2, 2))}, r"head_mask: expected shape \(2, 3\) or \(3,\)"),
    "labels of another shape": ((IDS,), {"labels": IDS[:, :5]}, r"labels: expected shape \(3, 9\)"),
    "strange types": ((IDS,), {"token_type_ids": IDS[:, :4]}, r"token_type_ids: expected shape \(3, 9\)"),
    "strange positions": ((IDS,), {"position_ids": IDS[:2] * 0}, r"position_ids: expected shape \(3, 9\)"),
    "floats for ids": ((IDS.astype(float),), {}, "input_ids: expected integers, found"),
    "booleans for ids": ((IDS > 3,), {}, "input_ids: expected integers, found bool"),
    "integers for embeddings": ((), {"inputs_embeds": np.zeros((3, 9, 12), int)}, "inputs_embeds: expected floats"),
    "rows of two lengths": (([[1, 2], [3]],), {}, "input_ids: expected rows of numbers, all of one length, found list"),
    "a text": (("hello",), {}, "input_ids: expected rows of numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, make):
    args, inputs, sentence = BAD[name]
    model, _ = make()
    with pytest.raises(InputError, match=sentence) as error:
        model(*args, **inputs)
    assert "\n" not in str(error.value)


def test_unknown_arguments_name_the_nearest(make):
    model, _ = make()
    with pytest.raises(TypeError, match=r"FlaxGPT2LMHeadModel\(\) has no argument 'lables'; did you mean 'labels'"):
        model(IDS, lables=IDS)
    with pytest.raises(TypeError, match=r"FlaxGPT2Model\(\) has no argument 'logits_to_keep'"):
        FlaxGPT2Model(SMALL, _do_init=False)(IDS, logits_to_keep=1)
    with pytest.raises(TypeError, match="has no argument 'return'"):
        model(IDS, **{"return": 1})


def test_bad_options_are_one_sentence():
    with pytest.raises(InputError, match="dtype: expected float64, float32, float16 or bfloat16, found 'int8'"):
        FlaxGPT2Model(SMALL, dtype="int8")
    with pytest.raises(InputError, match="param_dtype: expected float64, float32, float16 or bfloat16, found 'int4'"):
        FlaxGPT2Model(SMALL, param_dtype="int4")
    with pytest.raises(InputError, match=r"config: expected a GPT2Config, found a dict"):
        FlaxGPT2Model({})
