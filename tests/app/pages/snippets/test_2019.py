"""The snippets of pytorch-transformers' pages of 2019, and of transformers 2, in our words, with our imports."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")

from gpt2_multi import (
    GPT2_PRETRAINED_CONFIG_ARCHIVE_MAP,
    GPT2_PRETRAINED_MODEL_ARCHIVE_MAP,
    AutoModelWithLMHead,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
)

HELLO = "Hello, my dog is cute"


def test_the_next_word(hub):
    tokenizer = GPT2Tokenizer.from_pretrained(hub["gpt2"])
    indexed_tokens = tokenizer.encode("Who was Jim Henson ? Jim Henson was a")
    tokens_tensor = torch.tensor([indexed_tokens])
    model = GPT2LMHeadModel.from_pretrained(hub["gpt2"])
    model.eval()
    with torch.no_grad():
        outputs = model(tokens_tensor)
        predictions = outputs[0]
    predicted_index = torch.argmax(predictions[0, -1, :]).item()
    predicted_text = tokenizer.decode([*indexed_tokens, predicted_index])
    assert predicted_text.startswith("Who was Jim Henson ? Jim Henson was a")


def test_the_past(hub):
    tokenizer, model = GPT2Tokenizer.from_pretrained(hub["gpt2"]), AutoModelWithLMHead.from_pretrained(hub["gpt2"])
    generated = tokenizer.encode("The Manhattan bridge")
    context, past = torch.tensor([generated]), None
    for _ in range(10):
        output, past = model(context, past=past)
        token = torch.argmax(output[..., -1, :])
        generated += [token.tolist()]
        context = token.unsqueeze(0)
    sequence = tokenizer.decode(generated)
    prompt = torch.tensor([tokenizer.encode("The Manhattan bridge")])
    assert generated == model.generate(prompt, max_new_tokens=10, eos_token_id=None)[0].tolist()
    assert sequence.startswith("The Manhattan bridge")


def test_the_bare_model(hub):
    tokenizer, model = GPT2Tokenizer.from_pretrained(hub["gpt2"]), GPT2Model.from_pretrained(hub["gpt2"])
    input_ids = torch.tensor(tokenizer.encode(HELLO, add_special_tokens=True)).unsqueeze(0)
    outputs = model(input_ids)
    assert outputs[0].shape == (1, len(HELLO), 16)


def test_every_state_and_attention(hub):
    model = GPT2Model.from_pretrained(hub["gpt2"], output_hidden_states=True, output_attentions=True)
    input_ids = torch.tensor([GPT2Tokenizer.from_pretrained(hub["gpt2"]).encode("Let's see all hidden-states")])
    all_hidden_states, all_attentions = model(input_ids)[-2:]
    assert len(all_hidden_states) == 3 and len(all_attentions) == 2


def test_the_loss_under_both_names(hub):
    tokenizer, model = GPT2Tokenizer.from_pretrained(hub["gpt2"]), GPT2LMHeadModel.from_pretrained(hub["gpt2"])
    input_ids = torch.tensor(tokenizer.encode(HELLO)).unsqueeze(0)
    loss, logits = model(input_ids, labels=input_ids)[:2]
    old, old_logits, _ = model(input_ids, lm_labels=input_ids)
    assert torch.equal(old, loss) and torch.equal(old_logits, logits)


def test_the_double_heads(hub):
    tokenizer = GPT2Tokenizer.from_pretrained(hub["gpt2"])
    model = GPT2DoubleHeadsModel.from_pretrained(hub["gpt2"])
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    model.resize_token_embeddings(len(tokenizer))
    assert (tokenizer.cls_token_id, len(tokenizer)) == (257, 258)
    choices = ["Hello, my dog is cute [CLS]", "Hello, my cat is cute [CLS]"]
    encoded_choices = [tokenizer.encode(s) for s in choices]
    cls_token_location = [tokens.index(tokenizer.cls_token_id) for tokens in encoded_choices]
    input_ids = torch.tensor(encoded_choices).unsqueeze(0)
    mc_token_ids = torch.tensor([cls_token_location])
    outputs = model(input_ids, mc_token_ids=mc_token_ids)
    lm_prediction_scores, mc_prediction_scores = outputs[:2]
    assert lm_prediction_scores.shape == (1, 2, 23, 258) and mc_prediction_scores.shape == (1, 2)
    outputs = model(input_ids, mc_token_ids=mc_token_ids, lm_labels=input_ids, mc_labels=torch.tensor([1]))
    lm_loss, mc_loss = outputs[:2]
    assert lm_loss > 0 and mc_loss >= 0


def test_texts_are_cut_and_filled(hub):
    tokenizer = GPT2Tokenizer.from_pretrained(hub["gpt2"], pad_token="<|endoftext|>")
    batch = tokenizer.batch_encode_plus([HELLO, "Hi"], max_length=24, pad_to_max_length=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 24) and batch["attention_mask"].sum(-1).tolist() == [21, 2]
    assert len(tokenizer.encode(HELLO, max_length=8, truncation_strategy="only_first")) == 8
    assert tokenizer.num_added_tokens() == 0 and tokenizer.max_len == 1024
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(HELLO))
    assert tokenizer.build_inputs_with_special_tokens(ids) == tokenizer.encode(HELLO)


def test_saving_and_loading(hub, tmp_path):
    model, tokenizer = GPT2Model.from_pretrained(hub["gpt2"]), GPT2Tokenizer.from_pretrained(hub["gpt2"])
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    model, tokenizer = GPT2Model.from_pretrained(str(tmp_path)), GPT2Tokenizer.from_pretrained(str(tmp_path))
    assert model(torch.tensor([tokenizer.encode(HELLO)]))[0].shape == (1, len(HELLO), 16)


def test_names_of_the_archive():
    assert {"gpt2", "gpt2-medium", "gpt2-large"} <= GPT2_PRETRAINED_MODEL_ARCHIVE_MAP.keys()
    assert GPT2_PRETRAINED_CONFIG_ARCHIVE_MAP["gpt2"].endswith("/gpt2/resolve/main/config.json")
    config = GPT2Config(vocab_size=50257, n_positions=1024, n_ctx=1024, n_embd=768, n_layer=12, n_head=12)
    assert config == GPT2Config()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(hub):
    model = GPT2LMHeadModel.from_pretrained(hub["gpt2"], torchscript=True)
    input_ids = torch.tensor([GPT2Tokenizer.from_pretrained(hub["gpt2"]).encode("Let's see")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced_model = torch.jit.trace(model, (input_ids,))
    assert torch.allclose(traced_model(input_ids)[0], model(input_ids)[0], atol=1e-5)
