"""torchao quantizes our nn.Linears by its own configurations, or by transformers' around them."""

from functools import partial

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torchao import quantization as ao
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao

from gpt2_multi import pt
from gpt2_multi.errors import CheckpointError, InputError

IDS = torch.tensor([[1, 2, 3, 4, 5, 9, 8]])
HERE = {
    "Int8Tensor": ao.Int8WeightOnlyConfig,
    "rows": ao.Int8DynamicActivationInt8WeightConfig,
    "Float8Tensor": ao.Float8WeightOnlyConfig,
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("name", HERE)
def test_what_runs_on_a_cpu(name, base):
    load, config = pt.GPT2LMHeadModel.from_pretrained, HERE[name]()
    model, floats = load(base, quantization_config=config), load(base)
    assert type(model.transformer.h[0].attn.c_attn.weight).__name__ == ("Int8Tensor" if name == "rows" else name)
    assert model.lm_head.weight is model.transformer.wte.weight and type(model.lm_head.weight) is torch.nn.Parameter
    found, exact = model(IDS).logits, floats(IDS).logits
    assert (found - exact).abs().max() > 1e-4
    for path, layer in model.named_modules():
        if hasattr(getattr(layer, "weight", None), "dequantize") and type(layer.weight) is not torch.nn.Parameter:
            floats.get_submodule(path).weight.data = layer.weight.dequantize()
    torch.testing.assert_close(floats(IDS).logits, found, atol=0.3 if name == "rows" else 1e-4, rtol=0)
    torch.testing.assert_close(load(base, quantization_config=transformers.TorchAoConfig(config))(IDS).logits, found)
    assert model.generate(IDS, max_new_tokens=4).shape == (1, 11)
    half = load(base, quantization_config=config, dtype="bfloat16")(IDS).logits
    torch.testing.assert_close(half.float(), found, atol=0.3, rtol=0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HERE)
def test_files_are_those_that_torchao_and_transformers_write(name, dtype, base, tmp_path):
    load = pt.GPT2LMHeadModel.from_pretrained
    model = load(base, quantization_config=HERE[name](), param_dtype=dtype, dtype=dtype)
    model.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    again = load(tmp_path / "ours", dtype="auto")
    assert torch.equal(again(IDS).logits, model(IDS).logits) and again.dtype == model.dtype
    assert all(type(x) is type(y) for x, y in zip(again.parameters(), model.parameters(), strict=True))
    load(tmp_path / "ours", quantization_config=HERE[name]()).save_pretrained(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    assert is_metadata_torchao(metadata) and metadata["format"] == "pt"
    read, rest = unflatten_tensor_state_dict(tensors, metadata)
    known = load(tmp_path / "ours").state_dict()
    assert not rest and {key: type(x) for key, x in read.items()} == {key: type(x) for key, x in known.items()}
    tensors, metadata = flatten_tensor_state_dict(known)
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata)
    assert torch.equal(load(tmp_path / "one")(IDS).logits, load(tmp_path / "ours")(IDS).logits)


@pytest.mark.parametrize("name", HERE)
def test_a_model_is_cast_and_takes_over_a_state(name, base):
    load = partial(pt.GPT2LMHeadModel.from_pretrained, base, quantization_config=HERE[name]())
    model, other = load(), load()
    for x in other.parameters():
        if type(x) is torch.nn.Parameter:
            x.data.mul_(0.5)
    exact = other(IDS).logits
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(IDS).logits, exact)
    half = model.bfloat16()(IDS).logits
    assert half.dtype == torch.bfloat16 == model.transformer.h[0].attn.c_attn.weight.dtype
    torch.testing.assert_close(half.float(), exact, atol=0.3, rtol=0.3)


@pytest.mark.parametrize("name", HERE)
def test_what_a_state_has_is_what_is_saved(name, base, tmp_path, check_saved):
    load = partial(pt.GPT2LMHeadModel.from_pretrained, base, quantization_config=HERE[name]())
    model, floats = load(), pt.GPT2LMHeadModel.from_pretrained(base)
    other = load(state_dict={name: 0.5 * x for name, x in floats.state_dict().items()})
    own = model.state_dict()
    check_saved(model, other, IDS)
    path, kind = "transformer.h.0.attn.c_attn.weight", type(model.transformer.h[0].attn.c_attn.weight).__name__
    another = load(quantization_config=HERE["Int8Tensor" if name == "rows" else "rows"]()).state_dict()
    for holder, state, sentence in (
        (model, floats.state_dict(), rf"{path} is float32\[192, 64\], expected {kind}\[192, 64\]"),
        (model, {key: x for key, x in own.items() if key != path}, f"lacks {path}; give all"),
        (model, another, rf"{path} is .*Int8Tensor.*, expected .*{kind}.*, as in the model"),
        (floats, own, rf"{path} is {kind}\[192, 64\], expected floats, as in the model"),
    ):
        with pytest.raises(CheckpointError, match=f"^state_dict: {sentence}"):
            holder.save_pretrained(tmp_path / "own", state_dict=state)
    assert torch.equal(pt.GPT2LMHeadModel.from_pretrained(tmp_path / "own")(IDS).logits, model(IDS).logits)


def test_damaged_files_are_a_sentence(base, tmp_path):
    load = pt.GPT2LMHeadModel.from_pretrained
    load(base, quantization_config=ao.Int8WeightOnlyConfig()).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "transformer.h.0.attn.c_attn"
    with safe_open(path, framework="pt") as file:
        whole, says = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    said, scale, values = f"{name}.weight", f"{name}._weight_scale", f"{name}._weight_qdata"
    for tensors, metadata in (
        ({key: x for key, x in whole.items() if key != scale}, says),
        (whole | {scale: whole[scale][:5].clone()}, says),
        (whole | {values: whole[values][:64].clone()}, says),
        (whole | {f"{name}._weight_more": whole[scale].clone()}, says),
        (whole, says | {said: says[said].replace("Int8Tensor", "os.system")}),
        (whole, says | {said: says[said][:30]}),
        (whole, says | {said: "[]"}),
        (whole, says | {said: says[said].replace('"float32"', '"load"')}),
        (whole, {key: x for key, x in says.items() if key != said}),
        (whole, {"format": "pt"}),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(CheckpointError, match=rf"{said}(: not what torchao writes|: torchao has|, as torchao)"):
            load(tmp_path)


def test_what_it_cannot_do_is_a_sentence(base, tmp_path):
    load = pt.GPT2LMHeadModel.from_pretrained
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"torchao cannot make Int4WeightOnlyConfig of a weight .* on cpu: "):
            load(base, quantization_config=ao.Int4WeightOnlyConfig(group_size=32))
    model = load(base, quantization_config=ao.Int8WeightOnlyConfig())
    with pytest.raises(InputError, match=r"state_dict: transformer.h.0.* is a Int8Tensor of torchao"):
        load(base, state_dict=model.state_dict())
    with pytest.raises(CheckpointError, match=r"load_state_dict: .*c_attn.weight is not quantized as the model's is"):
        model.load_state_dict(load(base).state_dict())
    with pytest.raises(InputError, match="safe_serialization: expected True for a quantized model"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="quantization_config: the files have quant_type="):
        load(tmp_path, quantization_config=ao.Float8WeightOnlyConfig())
    wrong = {"quant_method": "torchao", "quant_type": {"default": {"_type": "none", "_version": 1, "_data": {}}}}
    with pytest.raises(InputError, match="torchao knows no such quant_type"):
        load(base, quantization_config=wrong)


def test_what_somebody_quantized_by_hand_computes_and_is_not_saved(base, tmp_path):
    model = pt.GPT2LMHeadModel.from_pretrained(base)
    exact = model(IDS).logits
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    assert 1e-4 < (model(IDS).logits - exact).abs().max() < 0.3 * exact.abs().max()
    with pytest.raises(CheckpointError, match=r"save_pretrained: \S+ is Int8Tensor\[\d+, \d+\], of which config.json"):
        model.save_pretrained(tmp_path / "by hand")
    assert not (tmp_path / "by hand").exists()
    part = pt.GPT2LMHeadModel.from_pretrained(base, quantization_config=ao.Int8WeightOnlyConfig())
    ao.quantize_(part, ao.Int8WeightOnlyConfig(), lambda layer, name: name == "lm_head")
    with pytest.raises(CheckpointError, match=r"save_pretrained: lm_head.weight is Int8Tensor"):
        part.save_pretrained(tmp_path / "by hand")


def test_adapters_train_on_top(base):
    torch.manual_seed(0)  # of the adapters' first values
    model = pt.GPT2LMHeadModel.from_pretrained(base, quantization_config=ao.Int8WeightOnlyConfig())
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).train()
    optimizer = torch.optim.AdamW([x for x in adapted.parameters() if x.requires_grad], lr=1e-2)
    losses = [pt.train_step(adapted, optimizer, [{"input_ids": IDS, "labels": IDS}]) for _ in range(6)]
    assert losses[-1] < losses[0]
    before = adapted.eval()(IDS).logits
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, before, atol=0.2, rtol=0)
