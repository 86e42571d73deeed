"""The PyTorch snippets of transformers' pages on GPT-2 (4.57 and 5), in our words: as there, but for imports and names.

What is shown is that they run; that the numbers are right is shown elsewhere.
"""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")

from gpt2_multi import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
    GPT2TokenizerFast,
    InputError,
    pipeline,
)

HELLO = "Hello, my dog is cute"


def test_the_pipeline(hub):
    generator = pipeline(task="text-generation", model=hub["gpt2"], device=-1)
    (answer,) = generator("Hello, I'm a language model")
    assert answer["generated_text"].startswith("Hello, I'm a language model")
    assert len(generator("Hello, I'm a language model,", max_length=40, num_return_sequences=2, do_sample=True)) == 2


def test_the_auto_classes(hub):
    model = AutoModelForCausalLM.from_pretrained(hub["gpt2"], device_map="auto", attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(hub["gpt2"])
    inputs = tokenizer("Hello, I'm a language model", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, cache_implementation="static", max_new_tokens=5)
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith("Hello, I'm a language model")


def test_generation_of_samples(hub):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hub["gpt2"]), AutoTokenizer.from_pretrained(hub["gpt2"])
    input_ids = tokenizer("GPT2 is a model developed by OpenAI.", return_tensors="pt").input_ids
    tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=50)
    assert tokenizer.batch_decode(tokens)[0].startswith("GPT2 is a model")


def test_one_text_in_a_list_and_a_dtype(hub):
    model = AutoModelForCausalLM.from_pretrained(hub["gpt2"], torch_dtype=torch.float16, attn_implementation="sdpa")
    tokenizer, device = AutoTokenizer.from_pretrained(hub["gpt2"]), "cpu"
    model_inputs = tokenizer(["def hello_world():"], return_tensors="pt").to(device)
    model.to(device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=5, do_sample=True)
    assert model.dtype == torch.float16 and tokenizer.batch_decode(generated_ids)[0].startswith("def hello_world():")


def test_flash_attention_is_a_sentence(hub):
    with pytest.raises(InputError, match=r"attn_implementation: .*sdpa"):
        AutoModelForCausalLM.from_pretrained(
            hub["gpt2"], torch_dtype=torch.float16, attn_implementation="flash_attention_2"
        )


def test_quantization_without_its_program_is_a_sentence(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float16", bnb_4bit_use_double_quant=True
    )
    with pytest.raises(InputError, match="quantization_config: needs bitsandbytes: pip install"):
        AutoModelForCausalLM.from_pretrained(hub["gpt2"], quantization_config=config, device_map="auto")


def test_a_configuration():
    configuration = GPT2Config(n_layer=1, vocab_size=100)  # the page's has the sizes of GPT-2
    model = GPT2Model(configuration)
    assert model.config is configuration


def test_a_new_model_of_a_configuration(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["gpt2"], use_fast=True)
    config = AutoConfig.from_pretrained(
        hub["gpt2"], vocab_size=len(tokenizer), n_ctx=64, bos_token_id=tokenizer.bos_token_id
    )
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16, trust_remote_code=False)
    assert type(model) is GPT2LMHeadModel and model.dtype == torch.bfloat16 and model.config.n_positions == 64
    assert AutoConfig.for_model("gpt2", n_layer=2) == GPT2Config(n_layer=2)


def test_tokenizers(hub):
    for kind in (GPT2Tokenizer, GPT2TokenizerFast):
        if kind is GPT2TokenizerFast:
            pytest.importorskip("gigatoken")
        tokenizer = kind.from_pretrained(hub["gpt2"])
        assert tokenizer("Hello world")["input_ids"] != tokenizer(" Hello world")["input_ids"]


def test_the_bare_model(hub):
    tokenizer, model = AutoTokenizer.from_pretrained(hub["gpt2"]), AutoModel.from_pretrained(hub["gpt2"])
    inputs = tokenizer(HELLO, return_tensors="pt")
    outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert last_hidden_states.shape == (1, len(HELLO), 16)


def test_the_language_model(hub):
    tokenizer, model = AutoTokenizer.from_pretrained(hub["gpt2"]), GPT2LMHeadModel.from_pretrained(hub["gpt2"])
    inputs = tokenizer(HELLO, return_tensors="pt")
    outputs = model(**inputs, labels=inputs["input_ids"])
    loss, logits = outputs.loss, outputs.logits
    assert loss > 0 and logits.shape == (1, len(HELLO), 257)


def test_the_double_heads(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["gpt2"])
    model = GPT2DoubleHeadsModel.from_pretrained(hub["gpt2"])
    num_added_tokens = tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    embedding_layer = model.resize_token_embeddings(len(tokenizer))
    choices = ["Hello, my dog is cute [CLS]", "Hello, my cat is cute [CLS]"]
    encoded_choices = [tokenizer.encode(s) for s in choices]
    cls_token_location = [tokens.index(tokenizer.cls_token_id) for tokens in encoded_choices]
    input_ids = torch.tensor(encoded_choices).unsqueeze(0)
    mc_token_ids = torch.tensor([cls_token_location])
    outputs = model(input_ids, mc_token_ids=mc_token_ids)
    lm_logits, mc_logits = outputs.logits, outputs.mc_logits
    assert num_added_tokens == 1 and embedding_layer.weight.shape[0] == 258
    assert lm_logits.shape == (1, 2, 23, 258) and mc_logits.shape == (1, 2)


def test_sequence_classification(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["sequence_classification"])
    model = AutoModelForSequenceClassification.from_pretrained(hub["sequence_classification"])
    inputs = tokenizer(HELLO, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_id = logits.argmax().item()
    num_labels = len(model.config.id2label)
    model = GPT2ForSequenceClassification.from_pretrained(hub["sequence_classification"], num_labels=num_labels)
    loss = model(**inputs, labels=torch.tensor([1])).loss
    assert predicted_class_id in (0, 1) and loss > 0


def test_classification_by_several_labels(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["sequence_classification"])
    options = {"problem_type": "multi_label_classification"}
    model = GPT2ForSequenceClassification.from_pretrained(hub["sequence_classification"], **options)
    inputs = tokenizer(HELLO, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]
    num_labels = len(model.config.id2label)
    model = GPT2ForSequenceClassification.from_pretrained(
        hub["sequence_classification"], num_labels=num_labels, **options
    )
    labels = torch.sum(
        torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
    ).to(torch.float)
    assert model(**inputs, labels=labels).loss > 0


def test_token_classification(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["token_classification"])
    model = AutoModelForTokenClassification.from_pretrained(hub["token_classification"])
    text = "HuggingFace is a company based in Paris and New York"
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_token_class_ids = logits.argmax(-1)
    predicted_tokens_classes = [model.config.id2label[t.item()] for t in predicted_token_class_ids[0]]
    loss = model(**inputs, labels=predicted_token_class_ids).loss
    assert len(predicted_tokens_classes) == len(text) and round(loss.item(), 2) >= 0


def test_question_answering(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["question_answering"])
    model = AutoModelForQuestionAnswering.from_pretrained(hub["question_answering"])
    question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"
    inputs = tokenizer(question, text, return_tensors="pt")
    assert torch.equal(inputs.input_ids, tokenizer(text=question, text_pair=text, return_tensors="pt").input_ids)
    with torch.no_grad():
        outputs = model(**inputs)
    answer_start_index, answer_end_index = outputs.start_logits.argmax(), outputs.end_logits.argmax()
    predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
    assert tokenizer.decode(predict_answer_tokens, skip_special_tokens=True) in question + text
    target_start_index, target_end_index = torch.tensor([14]), torch.tensor([15])
    assert model(**inputs, start_positions=target_start_index, end_positions=target_end_index).loss > 0
