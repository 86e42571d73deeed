"""bitsandbytes quantizes our classes as it does transformers', whose files are the same; adapters train on top."""

import copy
from functools import partial

import peft
import pytest
import torch
import transformers

import gpt2_multi
from gpt2_multi import BitsAndBytesConfig, GPT2Tokenizer, pt
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.pt.parameters.sharding import FSDP, cuts

IDS = torch.tensor([[1, 2, 3, 4, 5, 9, 8], [7, 3, 99, 0, 1, 2, 50]])
STEPS = {"max_new_tokens": 8, "do_sample": False}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "nf4": NF4,
    "twice": NF4 | {"bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "bfloat16": NF4 | {"bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
    "some": NF4 | {"llm_int8_skip_modules": ["c_fc", "lm_head"]},
}
OTHERS = {  # what is wrong with weights in FP4, or, for those in int8, in NF4
    "nf4": "lacks {}.weight.quant_state.bitsandbytes__nf4; give all",
    "twice": "{}.weight.absmax is float32.*, expected uint8",
    "int8": "{}.weight is uint8.*, expected int8",
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def plain(model):
    """A model of theirs whose weights are not packed anew, with scales in bfloat16, on processors that could."""
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def near(x, y):
    torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_files_are_those_of_transformers(kind, base, tmp_path):
    theirs_config = transformers.BitsAndBytesConfig(**KINDS[kind])
    theirs = plain(transformers.GPT2LMHeadModel.from_pretrained(base, quantization_config=theirs_config))
    model = pt.GPT2LMHeadModel.from_pretrained(base, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    near(logits(model), logits(theirs))
    for same in (theirs_config, theirs_config.to_dict()):
        other = pt.GPT2LMHeadModel.from_pretrained(base, quantization_config=same)
        assert torch.equal(logits(other), logits(model))
    floats = logits(pt.GPT2LMHeadModel.from_pretrained(base))
    assert 1e-3 < (logits(model) - floats).abs().max() < 0.5 * floats.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(pt.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")), logits(model))
    near(logits(pt.GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")), logits(model))
    near(logits(plain(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours"))), logits(model))


def test_what_is_quantized_and_what_stays(base):
    model = pt.GPT2LMHeadModel.from_pretrained(base, quantization_config=NF4 | {"llm_int8_skip_modules": ["mlp"]})
    block, floats = model.transformer.h[0], pt.GPT2LMHeadModel.from_pretrained(base).state_dict()
    assert [type(x).__name__ for x in (block.attn.c_attn, block.mlp.c_fc)] == ["Linear4bit", "Linear"]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.num_parameters() == pt.GPT2LMHeadModel.from_pretrained(base).num_parameters()  # two in a byte
    own = {name: x for name, x in model.state_dict().items() if name in floats and x.is_floating_point()}
    assert len(own) == len(floats) - 4 and all(torch.equal(x, floats[name]) for name, x in own.items())


def test_it_writes_and_measures_texts_and_is_copied(base):
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    model = pt.GPT2LMHeadModel.from_pretrained("demo", quantization_config=BitsAndBytesConfig(**NF4))
    text = model.generate("ROMEO:", tokenizer=tokenizer, **STEPS)
    assert "ROMEO:" + "".join(model.stream("ROMEO:", tokenizer=tokenizer, **STEPS)) == text
    assert copy.deepcopy(model).generate("ROMEO:", tokenizer=tokenizer, **STEPS) == text
    assert gpt2_multi.pipeline(model=model, tokenizer=tokenizer)("ROMEO:", **STEPS)[0]["generated_text"] == text
    floats = pt.GPT2LMHeadModel.from_pretrained("demo").score(text, tokenizer=tokenizer).perplexity
    assert model.score(text, tokenizer=tokenizer).perplexity == pytest.approx(floats, rel=0.2)
    assert model.half()(IDS).logits.dtype == torch.float16
    model.float().resize_token_embeddings(1030)
    assert model(IDS).logits.shape[-1] == 1030


@pytest.mark.parametrize("kind", ["twice", "int8"])
def test_adapters_train_on_top(kind):
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    model = pt.GPT2LMHeadModel.from_pretrained("demo", quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.tensor([tokenizer.encode("To be, or not to be, that is the question:")])
    targets = ["c_attn", "c_proj", "c_fc"]
    adapted = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(model), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    ).train()
    assert type(adapted.base_model.model.transformer.h[0].attn.c_attn).__module__ == "peft.tuners.lora.bnb"
    optimizer = torch.optim.AdamW([x for x in adapted.parameters() if x.requires_grad], lr=1e-2)
    losses = [pt.train_step(adapted, optimizer, [{"input_ids": ids, "labels": ids}]) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5
    plain_names = {name.replace(".base_layer", ""): x for name, x in adapted.base_model.model.state_dict().items()}
    assert all(torch.equal(plain_names[name], x) for name, x in kept.items())


def test_what_it_cannot_do_is_a_sentence(base, tmp_path):
    load = pt.GPT2LMHeadModel.from_pretrained
    model = load(base, quantization_config=BitsAndBytesConfig(**NF4)).train()
    with pytest.raises(InputError, match="found one that bitsandbytes has quantized, whose weights are frozen"):
        model(IDS, labels=IDS).loss.backward()
    with pytest.raises(CheckpointError, match="a quantized model cannot be pruned"):
        model.prune_heads({0: [0]})
    with pytest.raises(InputError, match="rules: expected none for a quantized model"):
        cuts(model.config, FSDP)
    with pytest.raises(InputError, match="safe_serialization: expected True for a quantized model"):
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    model.save_pretrained(tmp_path / "saved")
    for given, sentence in (
        ({"quantization": "int8"}, "bitsandbytes has quantized, of which"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "the files have load_in_8bit=False"),
        ({"device_map": {"": "cpu", "lm_head": "disk"}}, "expected one place for the whole model"),
        ({"device_map": "auto", "max_memory": {"cpu": "1GB"}}, "max_memory: expected None for a quantized model"),
    ):
        with pytest.raises((InputError, CheckpointError), match=sentence):
            load(tmp_path / "saved", **given)


@pytest.mark.parametrize("kind", ["twice", "int8"])
def test_it_takes_over_a_state_that_is_quantized_alike(kind, base):
    load = partial(pt.GPT2LMHeadModel.from_pretrained, base, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    floats = pt.GPT2LMHeadModel.from_pretrained(base)
    other, model = load(state_dict={name: 0.5 * x for name, x in floats.state_dict().items()}), load()
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))
    for state in (floats.state_dict(), load(quantization_config=BitsAndBytesConfig(load_in_4bit=True)).state_dict()):
        with pytest.raises(CheckpointError, match=r"load_state_dict: .* is not quantized as the model's is, by bits"):
            model.load_state_dict(state)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_a_state_has_is_what_is_saved(kind, base, tmp_path, check_saved):
    load = partial(pt.GPT2LMHeadModel.from_pretrained, base, quantization_config=BitsAndBytesConfig(**KINDS[kind]))
    model, floats = load(), pt.GPT2LMHeadModel.from_pretrained(base)
    other = load(state_dict={name: 0.5 * x for name, x in floats.state_dict().items()})
    own = model.state_dict()
    check_saved(model, other, IDS)
    path, scales = "transformer.h.0.attn.c_attn", ".SCB" if kind == "int8" else ".weight.absmax"
    another = load(quantization_config=BitsAndBytesConfig(**KINDS["nf4" if kind == "int8" else "fp4"])).state_dict()
    for holder, state, sentence in (
        (model, floats.state_dict(), rf"{path}.weight is float32\[192, 64\], expected u?int8\["),
        (model, {name: x for name, x in own.items() if name != path + ".weight"}, f"lacks {path}.weight; give all"),
        (model, {name: x for name, x in own.items() if name != path + scales}, f"lacks {path}{scales}; give all"),
        (model, own | {path + scales: own[path + scales][:5]}, rf"{path}{scales} is .*\[5\], expected "),
        (model, another, OTHERS[kind].format(path)),
        (floats, own, rf"{path}.weight is u?int8\[.*\], expected floats, as in the model; give what its state_dict"),
    ):
        with pytest.raises(CheckpointError, match=f"^state_dict: {sentence}"):
            holder.save_pretrained(tmp_path / "own", state_dict=state)
    assert torch.equal(logits(pt.GPT2LMHeadModel.from_pretrained(tmp_path / "own")), logits(model))


def test_damaged_files_are_a_sentence(base, tmp_path):
    from safetensors.numpy import load_file, save_file

    pt.GPT2LMHeadModel.from_pretrained(base, quantization_config=NF4).save_pretrained(tmp_path)
    whole, name = load_file(tmp_path / "model.safetensors"), "transformer.h.0.attn.c_attn.weight"
    for damaged in (
        {key: x for key, x in whole.items() if key != f"{name}.absmax"},
        whole | {f"{name}.quant_state.bitsandbytes__nf4": whole[f"{name}.quant_state.bitsandbytes__nf4"][:20]},
        whole | {name: whole[name][:8]},
    ):
        save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"c_attn.weight: (not what bitsandbytes writes|bitsandbytes has)"):
            pt.GPT2LMHeadModel.from_pretrained(tmp_path)
