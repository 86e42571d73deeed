"""GPT-2 in PyTorch beyond parity: masks, caches, dtypes, switches of the configuration, gradients, bad input."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from gpt2_multi.errors import InputError
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import table
from gpt2_multi.pt import GPT2LMHeadModel, GPT2Model, KVCache
from gpt2_multi.pt.model import GPT2Block
from gpt2_multi.pt.training import parameter_groups, train_step
from tests.support import fixtures
from tests.support.cases import CHANGES

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=3, n_head=3, eos_token_id=None, bos_token_id=None)
IDS = np.random.default_rng(5).integers(0, 31, (3, 9))


@pytest.fixture
def make(tmp_path):
    """A function that writes a randomised model of a configuration and loads it in float64."""

    def load(config=SMALL, cls=GPT2LMHeadModel, **options):
        arrays = fixtures.write_model(tmp_path / "m", config, cls.head)
        return cls.from_pretrained(tmp_path / "m", **{"param_dtype": "float64", **options}), arrays

    return load


def logits(model, ids=IDS, **inputs):
    inputs = {key: torch.as_tensor(value) for key, value in inputs.items()}
    with torch.no_grad():
        return model(torch.as_tensor(ids), **inputs).logits.numpy()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_setting_is_honoured_by_every_attention(change, attention, make):
    config = SMALL.replace(**{change.split("=")[0]: CHANGES[change]})
    model, arrays = make(config, attn_implementation=attention)
    expected = reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"]
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "change", [c for c in CHANGES if c not in ("reorder_and_upcast_attn", "activation_function=gelu_new")]
)
def test_the_settings_change_the_logits(change):
    """Otherwise the test above would prove nothing; upcasting changes nothing in float64, by design."""
    config = SMALL.replace(**{change.split("=")[0]: CHANGES[change]})

    def answer(config):
        arrays = {w.name: fixtures.randomised(w, np.random.default_rng(len(w.name))) for w in table(config)}
        return reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"]

    other_name = change in ("activation_function=gelu_fast", "activation_function=gelu_pytorch_tanh")  # of gelu_new
    assert (np.abs(answer(SMALL) - answer(config)).max() > 1e-4) != other_name


def test_upcasting_works_in_float32_whatever_the_dtype(make, monkeypatch):
    config = SMALL.replace(reorder_and_upcast_attn=True)
    model, arrays = make(config, param_dtype="bfloat16")
    seen = []
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim: seen.append(x.dtype) or softmax(x, dim))
    found = model(torch.as_tensor(IDS)).logits
    assert set(seen) == {torch.float32} and found.dtype == torch.bfloat16
    expected = reference.outputs(config, arrays, "lm", {"input_ids": IDS})["logits"]
    assert np.abs(found.detach().double().numpy() - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("field", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_dropout_acts_in_training_alone(field, attention, make):
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model, _ = make(SMALL.replace(**off | {field: 0.5}), attn_implementation=attention)
    still = logits(model)
    assert np.array_equal(still, logits(model))
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    assert np.abs(first - still).max() > 1e-3 and not np.array_equal(first, logits(model))


def test_eager_and_sdpa_agree_under_every_mask(make):
    left, right = np.ones((3, 9), int), np.ones((3, 9), int)
    left[1, :4], right[2, 5:] = 0, 0
    square = np.random.default_rng(1).random((3, 3, 9, 9)) > 0.3
    for mask in (None, left, right, square, square[:, :1], square.astype(int), np.where(square, 0.0, -1e4)):
        inputs = {} if mask is None else {"attention_mask": mask}
        sdpa, eager = (logits(make(attn_implementation=a)[0], **inputs) for a in ("sdpa", "eager"))
        np.testing.assert_allclose(sdpa, eager, rtol=0, atol=1e-9)


def test_rank_4_masks_mean_what_rank_2_masks_mean(make):
    model, _ = make()
    mask = np.ones((3, 9), int)
    mask[1, 6:] = 0
    four = np.tile(mask[:, None, None], (1, 1, 9, 1))
    flat = logits(model, attention_mask=mask)
    for each in (four, four.astype(bool), np.where(four, 0.0, -np.inf)):
        np.testing.assert_allclose(logits(model, attention_mask=each)[mask != 0], flat[mask != 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_what_it_gives_alone(side, make):
    model, _ = make()
    for length in range(1, 9):
        ids, mask = np.full((2, 9), 7), np.zeros((2, 9), int)
        where = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[0], mask[0] = IDS[0], 1
        ids[1, where], mask[1, where] = IDS[1, :length], 1
        alone = logits(model, IDS[1:2, :length])
        np.testing.assert_allclose(logits(model, ids, attention_mask=mask)[1, where], alone[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_that_is_all_padding_is_finite(dtype, attention, make):
    model, _ = make(param_dtype=dtype, attn_implementation=attention)
    mask = np.ones((3, 9), int)
    mask[0], mask[1, :8] = 0, 0
    out = model(torch.as_tensor(IDS), attention_mask=torch.as_tensor(mask)).logits
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("kind", ["grown", "preallocated", "tuples"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_passed_back_by_hand_gives_the_same_logits(kind, padded, make):
    model, _ = make()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = 0 if padded else 1
    whole = model(torch.as_tensor(IDS), attention_mask=mask).logits.detach()
    past = model.init_cache(3, 9) if kind == "preallocated" else None
    pieces = []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
        out = model(torch.as_tensor(IDS[:, start:end]), past, attention_mask=mask[:, :end], use_cache=True)
        past = tuple(out.past_key_values) if kind == "tuples" else out.past_key_values
        pieces.append(out.logits.detach())
    keep = mask.bool()
    assert (torch.cat(pieces, 1) - whole)[keep].abs().max() < 1e-9


def test_a_grown_cache_never_changes_and_can_branch(make):
    model, _ = make()
    past = model(torch.as_tensor(IDS[:, :4])).past_key_values
    one = model(torch.as_tensor(IDS[:, 4:6]), past)
    two = model(torch.as_tensor(IDS[:, 4:6]), past)
    assert past.get_seq_length() == 4 and one.past_key_values.get_seq_length() == 6
    assert torch.equal(one.logits, two.logits) and len(past) == 3 and past[0][0].shape == (3, 3, 4, 4)


def test_a_preallocated_cache_is_reused_after_reset_and_refuses_too_much(make):
    model, _ = make()
    cache = model.init_cache(3, 6)
    first = model(torch.as_tensor(IDS[:, :6]), cache).logits
    with pytest.raises(InputError, match="6 cached and 1 new tokens are more than the cache's max_length 6"):
        model(torch.as_tensor(IDS[:, 6:7]), cache)
    cache.reset()
    assert isinstance(cache, KVCache) and torch.equal(model(torch.as_tensor(IDS[:, :6]), cache).logits, first)


def test_cross_attention_is_cached_too(make):
    model, _ = make(SMALL.replace(add_cross_attention=True))
    states = torch.randn(3, 5, 12, dtype=torch.float64)
    options = {
        "encoder_hidden_states": states,
        "encoder_attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5]),
    }
    whole = model(torch.as_tensor(IDS), **options).logits
    past = model(torch.as_tensor(IDS[:, :8]), **options).past_key_values
    last = model(torch.as_tensor(IDS[:, 8:]), past, **options).logits
    assert (last[:, 0] - whole[:, 8]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)]
)
@pytest.mark.parametrize("stored", ["float64", "float32"])
def test_computing_and_storing_in_two_dtypes(dtype, stored, bound, make):
    model, arrays = make(dtype=dtype, param_dtype=stored)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, stored)}
    out = model(torch.as_tensor(IDS), output_hidden_states=True)
    assert model.dtype == out.logits.dtype == out.hidden_states[1].dtype == getattr(torch, dtype)
    kept = {name: array.astype(stored).astype(np.float64) for name, array in arrays.items()}
    expected = reference.outputs(SMALL, kept, "lm", {"input_ids": IDS})["logits"]
    assert np.abs(out.logits.detach().double().numpy() - expected).max() <= bound * np.abs(expected).max()
    out.logits.double().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_gradients_equal_the_recorded():
    recorded = fixtures.reference("lm")
    model = GPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype="float64")
    ids, labels = (torch.from_numpy(recorded[f"in.{name}"].copy()) for name in ("input_ids", "labels"))
    model(ids, labels=labels).loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        grad = parameter.grad.T if "c_" in name and name.endswith("weight") else parameter.grad
        expected = recorded[f"grad.{name}"]
        assert np.abs(grad.numpy() - expected).max() <= 1e-4 * np.abs(expected).max(), name
        compared += 1
    assert compared == sum(key.startswith("grad.") for key in recorded) > 30


@pytest.mark.parametrize("checkpointing", [False, True])
def test_twenty_steps_of_adamw_give_the_recorded_losses(checkpointing):
    recorded = fixtures.reference("lm")
    config = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = GPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), **config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, labels = (torch.from_numpy(recorded[f"in.{name}"].copy()) for name in ("input_ids", "labels"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = [train_step(model, optimizer, [{"input_ids": ids, "labels": labels}], max_norm=None) for _ in range(20)]
    np.testing.assert_allclose(losses, recorded["train.losses"], rtol=1e-4)


def test_a_cache_asked_for_while_checkpointing_is_refused_with_a_warning(make):
    model, _ = make()
    model.train().gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache is off"):
        assert model(torch.as_tensor(IDS), use_cache=True).past_key_values is None
    model.gradient_checkpointing_disable()
    assert model(torch.as_tensor(IDS), use_cache=True).past_key_values is not None


def test_blocks_in_a_checkpoint_wrapper_of_torch_give_the_gradients_of_all(make):
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    (model, _), (wrapped, _) = make(SMALL.replace(**off)), make(SMALL.replace(**off))
    apply_activation_checkpointing(wrapped, check_fn=lambda part: isinstance(part, GPT2Block))
    ids = torch.as_tensor(IDS)
    for one in (model, wrapped):
        one(ids, labels=ids).loss.backward()
    pairs = zip(model.parameters(), wrapped.parameters(), strict=True)
    assert all(torch.equal(left.grad, right.grad) for left, right in pairs)
    with torch.no_grad():
        assert wrapped(ids).past_key_values is not None
    with pytest.raises(InputError, match="past_key_values: cannot be used while gradient checkpointing"):
        wrapped(ids, past_key_values=model(ids).past_key_values)


def test_accumulated_gradients_are_those_of_the_batch(make):
    off = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    grads = []
    for parts in ([IDS[:2]], [IDS[:1], IDS[1:2]]):
        model, _ = make(SMALL.replace(**off))
        batches = [{"input_ids": torch.as_tensor(p), "labels": torch.as_tensor(p)} for p in parts]
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, max_norm=None)
        grads.append(model.transformer.wte.weight.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-12


def test_only_matrices_decay(make):
    model, _ = make()
    decayed, kept = parameter_groups(model)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_initialisation_has_the_stds_of_the_table():
    torch.manual_seed(0)
    model = GPT2Model(
        GPT2Config(vocab_size=2000, n_positions=512, n_embd=128, n_layer=4, n_head=4, initializer_range=0.05)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.05 / math.sqrt(8) if "c_proj" in name else 0.05
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.03), name


def test_tuples_flags_and_positions_of_outputs(make):
    model, _ = make(SMALL.replace(output_hidden_states=True, use_cache=False))
    out = model(torch.as_tensor(IDS))
    assert out.keys() == ["logits", "hidden_states"] and out[0] is out["logits"] is out.logits
    assert len(model(torch.as_tensor(IDS), return_dict=False, output_attentions=True, use_cache=True)) == 4
    with pytest.raises(KeyError, match="has no 'loss' here"):
        out["loss"]


def test_logits_to_keep(make):
    model, _ = make()
    ids = torch.as_tensor(IDS)
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_no_rows_give_no_rows(make):
    model, _ = make()
    assert model(torch.zeros(0, 5, dtype=torch.long)).logits.shape == (0, 5, 31)


def test_int32_ids_work(make):
    model, _ = make()
    assert np.array_equal(logits(model, IDS.astype(np.int32)), logits(model))


BAD = {
    "too large an id": ((IDS + 25,), {}, r"input_ids: the id \d+ is outside the vocabulary \(0 to 30\)"),
    "a negative id": ((IDS - 31,), {}, r"input_ids: the id -\d+ is outside"),
    "too long": ((np.zeros((1, 25), int),), {}, "25 tokens are more than n_positions 24"),
    "types outside": ((IDS,), {"token_type_ids": IDS + 31}, "token_type_ids: the id"),
    "positions outside": ((IDS,), {"position_ids": IDS * 0 + 24}, "25 tokens are more than n_positions 24"),
    "negative positions": ((IDS,), {"position_ids": IDS * 0 - 1}, "position_ids: -1 is negative"),
    "neither": ((), {}, "expected one of input_ids and inputs_embeds, found neither"),
    "both": ((IDS,), {"inputs_embeds": np.zeros((3, 9, 12))}, "found both"),
    "three dimensions": ((IDS[None],), {}, r"input_ids: expected shape \(any, any\), found \(1, 3, 9\)"),
    "wide embeddings": ((), {"inputs_embeds": np.zeros((3, 9, 13))}, r"expected shape \(any, any, 12\)"),
    "a short mask": ((IDS,), {"attention_mask": np.ones((3, 8), int)}, r"attention_mask: expected shape \(3, 9\)"),
    "a wrong rank-4 mask": ((IDS,), {"attention_mask": np.ones((3, 2, 9, 9), bool)}, "attention_mask: expected"),
    "an unasked encoder": ((IDS,), {"encoder_hidden_states": np.zeros((3, 4, 12))}, "has no cross-attention"),
    "a strange head_mask": ((IDS,), {"head_mask": np.ones((1, 1, 3))}, r"head_mask: expected shape \(3, 3\) or \(3,\)"),
    "a narrow head_mask": ((IDS,), {"head_mask": np.ones((3, 2))}, r"head_mask: expected shape \(3, 3\) or \(3,\)"),
    "labels of another shape": ((IDS,), {"labels": IDS[:, :5]}, r"labels: expected shape \(3, 9\)"),
    "strange types": ((IDS,), {"token_type_ids": IDS[:, :4]}, r"token_type_ids: expected shape \(3, 9\)"),
    "strange positions": ((IDS,), {"position_ids": IDS[:2] * 0}, r"position_ids: expected shape \(3, 9\)"),
    "floats for ids": ((IDS.astype(float),), {}, "input_ids: expected integers, found"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, make):
    ids, inputs, sentence = BAD[name]
    model, _ = make()
    with pytest.raises(InputError, match=sentence):
        model(*map(torch.as_tensor, ids), **{key: torch.as_tensor(value) for key, value in inputs.items()})


def test_bad_options_are_one_sentence():
    with pytest.raises(InputError, match='attn_implementation: expected "sdpa" or "eager", found \'flash\''):
        GPT2Model(SMALL, attn_implementation="flash")
    with pytest.raises(InputError, match="dtype: expected float64, float32, float16 or bfloat16, found 'int8'"):
        GPT2Model(SMALL, dtype="int8")


def test_export_and_compile_see_a_plain_forward(make):
    model, _ = make()
    ids = torch.as_tensor(IDS)
    exported = torch.export.export(model, (ids,)).module()(ids)
    assert torch.allclose(exported.logits, model(ids).logits)
    assert torch.allclose(exported.past_key_values[2][1], model(ids).past_key_values[2][1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask = torch.ones(3, 9, dtype=torch.long)
    assert torch.equal(compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
