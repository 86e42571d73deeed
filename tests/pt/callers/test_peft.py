"""PEFT on our classes: its adapters compute, and generate, what they do on transformers' class; trained on either."""

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from gpt2_multi import pt
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|config file in|vocabulary was not modified)"),
    pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|weights tied|tie_word_embeddings|tied)"),
    pytest.mark.filterwarnings("ignore:.*(Position ids are not supported|embedding layers found|Unsupported layer)"),
]
LM = {"task_type": "CAUSAL_LM"}
PROMPT = {"num_virtual_tokens": 3}
SMALL = GPT2Config(
    vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None,
    initializer_range=0.3, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
)  # fmt: skip
IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
ADAPTERS = {
    "prompt": lambda **task: peft.PromptTuningConfig(**PROMPT, **task),
    "p-tuning": lambda **task: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=8, **task),
    "prefix": lambda **task: peft.PrefixTuningConfig(**PROMPT, **task),
    "projected prefix": lambda **task: peft.PrefixTuningConfig(
        **PROMPT, prefix_projection=True, encoder_hidden_size=8, **task
    ),
    "lora": lambda **task: peft.LoraConfig(**task),
    "lora of all": lambda **task: peft.LoraConfig(target_modules=["wte", "c_attn", "c_proj", "c_fc"], **task),
    "dora": lambda **task: peft.LoraConfig(target_modules=["c_attn", "c_proj"], use_dora=True, **task),
    "ia3": lambda **task: peft.IA3Config(**task),
    "tokens": lambda **task: peft.LoraConfig(trainable_token_indices=[1, 2], **task),
    "whole modules": lambda **task: peft.LoraConfig(modules_to_save=["ln_f", "wpe"], **task),
}
PROMPTS = list(ADAPTERS)[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, every one of them."""
    torch.manual_seed(0)
    model = pt.GPT2LMHeadModel(SMALL.replace())
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    path = tmp_path_factory.mktemp("peft") / "model"
    model.save_pretrained(path)
    return path


def adapted(cls, folder, config):
    """A model of a class with a random adapter."""
    model = peft.get_peft_model(cls.from_pretrained(folder), config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("trained_on", [transformers.GPT2LMHeadModel, pt.GPT2LMHeadModel], ids=["theirs", "ours"])
def test_an_adapter_of_one_class_is_one_of_the_other(name, trained_on, folder, tmp_path):
    """Its logits, its loss, and the tokens that are made with it, greedily and by beams."""
    other = {transformers.GPT2LMHeadModel: pt.GPT2LMHeadModel}.get(trained_on, transformers.GPT2LMHeadModel)
    model = adapted(trained_on, folder, ADAPTERS[name](**LM))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(other.from_pretrained(folder), tmp_path).eval()
    found, expected = (each(input_ids=IDS, labels=IDS) for each in (again, model))
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)
    plain = trained_on.from_pretrained(folder)(IDS).logits
    assert not torch.allclose(expected.logits[:, -IDS.shape[1] :], plain, atol=0.1)
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "pad_token_id": 0}
    for beams in (1, 3):
        made = [each.generate(**options, do_sample=False, num_beams=beams) for each in (again, model)]
        assert torch.equal(*made)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_and_padding_changes_nothing(name, folder):
    model = adapted(pt.GPT2LMHeadModel, folder, ADAPTERS[name](**LM))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]).repeat(2, 1)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    alone = model.generate(input_ids=IDS, max_new_tokens=6)[:, 6:]
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=6)[:, 9:], alone)
    model.train()(input_ids=padded, attention_mask=mask, labels=padded).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "tokens", "whole modules"])
def test_a_merged_adapter_computes_the_same_and_survives_a_file(name, folder, tmp_path):
    model = adapted(pt.GPT2LMHeadModel, folder, ADAPTERS[name](**LM))
    expected = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    assert type(merged) is pt.GPT2LMHeadModel and torch.allclose(merged(IDS).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.allclose(pt.GPT2LMHeadModel.from_pretrained(tmp_path)(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", *PROMPTS])
@pytest.mark.parametrize(
    ("task", "head", "labels"),
    [
        ("SEQ_CLS", pt.GPT2ForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        ("TOKEN_CLS", pt.GPT2ForTokenClassification, {"labels": IDS % 2}),
        (
            "QUESTION_ANS",
            pt.GPT2ForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])},
        ),
        ("FEATURE_EXTRACTION", pt.GPT2Model, {}),
    ],
)
def test_the_other_heads_take_adapters(name, task, head, labels):
    model = peft.get_peft_model(head(SMALL.replace(pad_token_id=0)), ADAPTERS[name](task_type=task)).eval()
    if task == "TOKEN_CLS" and name in PROMPTS[:2]:
        labels = {}  # PEFT gives none to the tokens that it puts in front
    output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **labels)
    loss = output.loss if labels else output[0].sum()
    loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_prompt_that_an_adapter_makes_too_long_is_one_sentence(folder):
    model = adapted(pt.GPT2LMHeadModel, folder, ADAPTERS["prefix"](**LM))
    assert model.generate(input_ids=IDS, max_new_tokens=23).shape == (2, 29)
    with pytest.raises(InputError, match="9 prompt tokens and 24 new ones are more than n_positions 32"):
        model.generate(input_ids=IDS, max_new_tokens=24)
    assert model.generate(input_ids=IDS, max_new_tokens=40, sliding_window=True).shape == (2, 46)


@pytest.mark.parametrize("name", PROMPTS)
def test_guidance_leads_away_from_the_model_without_the_prompt(name, folder):
    """As in transformers: what an adapter puts before the text is before the rows alone, at every step."""
    theirs, ours = (adapted(lib.GPT2LMHeadModel, folder, ADAPTERS[name](**LM)) for lib in (transformers, pt))
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "guidance_scale": 1.5, "max_new_tokens": 8}
    expected = theirs.generate(**given, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(**given), expected)
    assert not torch.equal(ours.generate(**{**given, "guidance_scale": 1.0}), expected)
    several = ours.generate(**given, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(several, expected.repeat_interleave(2, 0))


def test_a_subclass_steers_what_generation_reads(folder):
    """By the arguments that transformers gives it: the ids so far, their mask, and the cache."""

    class Typed(pt.GPT2LMHeadModel):
        def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **more):
            given = super().prepare_inputs_for_generation(
                input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **more
            )
            return given | {"token_type_ids": torch.full_like(given["input_ids"], 7)}

    model, ids = Typed.from_pretrained(folder), IDS
    for _ in range(5):
        logits = model(ids, token_type_ids=torch.full_like(ids, 7), use_cache=False).logits[:, -1:]
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    assert torch.equal(model.generate(IDS, max_new_tokens=5), ids)
    assert not torch.equal(pt.GPT2LMHeadModel.from_pretrained(folder).generate(IDS, max_new_tokens=5), ids)
