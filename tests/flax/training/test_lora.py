"""LoRA in JAX: held to peft's in PyTorch, both ways through files; only adapters are trained, saved and restored."""

import functools
import json

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
from flax.traverse_util import flatten_dict

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.flax import FlaxGPT2ForSequenceClassification, FlaxGPT2LMHeadModel
from gpt2_multi.flax.parameters.sharding import FSDP, make_mesh
from gpt2_multi.flax.training import (
    LoraConfig,
    create_train_state,
    init_adapters,
    load_adapters,
    merge,
    optimizer,
    restore_state,
    save_adapters,
    save_state,
    train_step,
)
from gpt2_multi.model.config import GPT2Config

OFF = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
SMALL = GPT2Config(
    vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, eos_token_id=None, bos_token_id=None, pad_token_id=0
)
IDS = np.random.default_rng(5).integers(1, 31, (4, 9)).astype(np.int32)
BATCH = {"input_ids": IDS, "labels": IDS}
ADAMW = optimizer(1e-2)
LORA = LoraConfig(r=3, lora_alpha=12, target_modules=["c_attn", "mlp.c_proj"])
CLASSES = {"lm": FlaxGPT2LMHeadModel, "classifier": FlaxGPT2ForSequenceClassification}


@functools.cache
def model_of(kind="lm", scan_layers=False, **changes):
    """A randomised model in float64."""
    jax.config.update("jax_enable_x64", True)
    cls, rng = CLASSES[kind], np.random.default_rng(0)
    model = cls(SMALL.replace(**changes), scan_layers=scan_layers, param_dtype="float64", _do_init=False)
    model.params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape), model.params_shape_tree)
    return model


def random_adapters(model, lora=LORA):
    """Adapters whose update is not zero."""
    rng, first = np.random.default_rng(1), init_adapters(model, lora, jax.random.key(0), model.params)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape), first)


def in_pytorch(model, folder):
    """The same model in PyTorch."""
    pt = pytest.importorskip("gpt2_multi.pt")
    model.save_pretrained(folder)
    return getattr(pt, type(model).__name__.removeprefix("Flax")).from_pretrained(folder, param_dtype="float64")


def logits(model, params):
    """Those of IDS."""
    return np.asarray(model(IDS, np.ones_like(IDS), params=params).logits)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_peft_computes_with_an_adapter_of_jax(tmp_path, kind, scan_layers):
    model = model_of(kind, scan_layers and kind == "lm")
    adapters = random_adapters(model)
    save_adapters(tmp_path / "adapter", model, adapters, LORA)
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    other = peft.PeftModel.from_pretrained(
        in_pytorch(model, tmp_path / "model"), tmp_path / "adapter", autocast_adapter_dtype=False
    )
    with torch.no_grad():
        expected = other(torch.tensor(IDS), torch.ones(IDS.shape)).logits.numpy()
    found = logits(model, merge(model.params, adapters, LORA))
    assert np.abs(found - expected).max() < 1e-9 < np.abs(found - logits(model, None)).max()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": r".*\.1\.mlp\.c_fc"}])
def test_an_adapter_of_peft_computes_in_jax(tmp_path, options):
    model = model_of()
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=20, init_lora_weights=False, **options)
    other = peft.get_peft_model(in_pytorch(model, tmp_path / "model"), config, autocast_adapter_dtype=False)
    other.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = other(torch.tensor(IDS)).logits.numpy()
    adapters, lora = load_adapters(tmp_path / "adapter", model)
    found = np.asarray(model(IDS, params=merge(model.params, adapters, lora)).logits)
    assert np.abs(found - expected).max() < 1e-9 < np.abs(found - np.asarray(model(IDS).logits)).max()


def test_first_adapters_follow_the_law_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model, lora = model_of(), LoraConfig(r=64)
    flat = flatten_dict(init_adapters(model, lora, jax.random.key(3), model.params))
    ours = np.concatenate([x.ravel() for path, x in flat.items() if path[-1] == "lora_A"])
    other = peft.get_peft_model(in_pytorch(model, tmp_path), peft.LoraConfig(r=64, task_type="CAUSAL_LM"))
    theirs = np.concatenate([x.detach().numpy().ravel() for name, x in other.named_parameters() if "lora_A" in name])
    assert ours.shape == theirs.shape and not any(x.any() for path, x in flat.items() if path[-1] == "lora_B")
    for found in (ours, theirs):  # uniform within 1 / sqrt(in)
        np.testing.assert_allclose(np.quantile(found, [0, 0.25, 0.75, 1]) * 12**0.5, [-1, -0.5, 0.5, 1], atol=0.08)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_alone_are_trained_as_peft_trains_them(tmp_path, scan_layers):
    model, lora = model_of(scan_layers=scan_layers, **OFF), LoraConfig(r=3, lora_alpha=12)
    adapters = random_adapters(model, lora)
    state = create_train_state(model, optimizer(0.1), lora=lora, adapters=adapters)
    before, losses = jax.tree.map(np.asarray, state.base), []
    for _ in range(3):
        state, metrics = train_step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, state.base)))
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state)}
    assert shapes == {(), *(x.shape for x in jax.tree.leaves(state.params))}

    save_adapters(tmp_path / "adapter", model, adapters, lora)
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from gpt2_multi.pt.training import parameter_groups
    from gpt2_multi.pt.training import train_step as step_of_pytorch

    other = peft.PeftModel.from_pretrained(
        in_pytorch(model, tmp_path / "model"), tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False
    )
    adamw = torch.optim.AdamW(parameter_groups(other), 0.1)
    batch = {name: torch.tensor(x).long() for name, x in BATCH.items()}
    expected = [step_of_pytorch(other, adamw, [batch]) for _ in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-9)
    assert losses[0] - losses[2] > 1e-3


def test_a_run_goes_on_bit_by_bit_and_only_onto_its_own_model(tmp_path):
    model = model_of()

    def new(**options):
        return create_train_state(model, ADAMW, seed=1, lora=LORA, **options)

    state, losses = new(), []
    for step in range(4):
        if step == 2:
            save_state(tmp_path, state)
        state, metrics = train_step(state, BATCH)
        losses.append(float(metrics["loss"]))
    again = restore_state(tmp_path, new())
    for step in (2, 3):
        again, metrics = train_step(again, BATCH)
        assert float(metrics["loss"]) == losses[step]
    assert (
        sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 150_000
    )  # no parameter of theirs
    other = jax.tree.map(np.asarray, model.params)
    scale = other["transformer"]["h"]["1"]["ln_2"]["scale"]
    other["transformer"]["h"]["1"]["ln_2"]["scale"] = np.nextafter(scale, 1)
    with pytest.raises(CheckpointError, match="adapters of other parameters than the model's"):
        restore_state(tmp_path, new(params=other))


def test_what_is_merged_is_a_model(tmp_path):
    model = model_of()
    state = create_train_state(model, ADAMW, lora=LORA, adapters=random_adapters(model))
    model.save_pretrained(tmp_path, state.merged())
    plain = FlaxGPT2LMHeadModel.from_pretrained(tmp_path, param_dtype="float64")
    assert np.array_equal(logits(plain, None), logits(model, state.merged()))
    assert not np.allclose(logits(plain, None), logits(model, None))


def test_a_mesh_gives_what_one_device_gives():
    mesh = make_mesh(f"fsdp={jax.device_count()}")
    one, many = model_of(), FlaxGPT2LMHeadModel(SMALL, param_dtype="float64", _do_init=False)
    from gpt2_multi.flax.parameters.sharding import shard_params

    many.params = shard_params(one.params, SMALL, mesh, FSDP)
    states = [create_train_state(model, ADAMW, lora=LORA, seed=4) for model in (one, many)]
    found = [train_step(state, BATCH)[1]["loss"] for state in states]
    assert float(found[0]) == pytest.approx(float(found[1]), abs=1e-12)


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        (lambda: LoraConfig(r=0), "r: expected"),
        (lambda: LoraConfig(target_modules="c_.*"), "target_modules: expected names such as"),
        (lambda: LoraConfig(target_modules=["c_atn"]), "did you mean 'c_attn'"),
        (lambda: LoraConfig(target_modules=["wte"]), "expected names of kernels"),
        (lambda: LoraConfig(target_modules=["h.1.attn.c_attn"]), "make the model without scan_layers"),
        (lambda: LoraConfig(lora_dropout=0.1), "lora_dropout: expected 0, found 0.1"),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence(lora, sentence):
    with pytest.raises(InputError, match=sentence):
        create_train_state(model_of(scan_layers=True), ADAMW, lora=lora())


def damaged(change):
    def write(folder):
        fields = json.loads((folder / "adapter_config.json").read_text())
        change(fields)
        (folder / "adapter_config.json").write_text(json.dumps(fields))

    return write


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damaged(lambda fields: fields.update(use_dora=True)), "use_dora: expected none, found True"),
        (damaged(lambda fields: fields.update(bias="all")), "bias: expected one of none, found all"),
        (damaged(lambda fields: fields.update(alpha_pattern={"c_attn": 3})), "alpha_pattern: expected none"),
        (damaged(lambda fields: fields.update(r=4)), r"lora_A.weight to be \(4, 12\), found \(3, 12\)"),
        (damaged(lambda fields: fields.update(target_modules=["c_attn"])), "to be absent, found"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 40), "not a whole safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "there is no such file"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_sentence(tmp_path, damage, sentence):
    save_adapters(tmp_path, model_of(), random_adapters(model_of()), LORA)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        load_adapters(tmp_path, model_of())
