"""torchao quantizes our nn.Linears by its own configurations, or by transformers' around them."""

import peft
import pytest
import torch
import transformers
from torchao import quantization as ao

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


def test_what_it_cannot_do_is_a_sentence(base, tmp_path):
    load = pt.GPT2LMHeadModel.from_pretrained
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"torchao cannot make Int4WeightOnlyConfig of a weight .* on cpu: "):
            load(base, quantization_config=ao.Int4WeightOnlyConfig(group_size=32))
    with pytest.raises(CheckpointError, match=r"save_pretrained: the weights .* are torchao's, which no file"):
        load(base, quantization_config=ao.Int8WeightOnlyConfig()).save_pretrained(tmp_path)
    wrong = {"quant_method": "torchao", "quant_type": {"default": {"_type": "none", "_version": 1, "_data": {}}}}
    with pytest.raises(InputError, match="torchao knows no such quant_type"):
        load(base, quantization_config=wrong)


def test_adapters_train_on_top(base):
    model = pt.GPT2LMHeadModel.from_pretrained(base, quantization_config=ao.Int8WeightOnlyConfig())
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).train()
    optimizer = torch.optim.AdamW([x for x in adapted.parameters() if x.requires_grad], lr=1e-2)
    losses = [pt.train_step(adapted, optimizer, [{"input_ids": IDS, "labels": IDS}]) for _ in range(6)]
    assert losses[-1] < losses[0]
