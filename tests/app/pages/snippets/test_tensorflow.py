"""The TensorFlow snippets of transformers' pages on GPT-2 (to 4.57), in our words: as there, but for imports and names.

What is shown is that they run; that the numbers are right is shown elsewhere.
"""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from gpt2_multi import (
    AutoTokenizer,
    GPT2Tokenizer,
    TFAutoModel,
    TFAutoModelForCausalLM,
    TFAutoModelForSequenceClassification,
    TFGPT2DoubleHeadsModel,
    TFGPT2ForSequenceClassification,
    TFGPT2LMHeadModel,
    TFGPT2Model,
    TFGPT2Tokenizer,
)

HELLO = "Hello, my dog is cute"


def test_the_bare_model(hub):
    tokenizer, model = AutoTokenizer.from_pretrained(hub["gpt2"]), TFAutoModel.from_pretrained(hub["gpt2"])
    inputs = tokenizer(HELLO, return_tensors="tf")
    outputs = model(inputs)
    last_hidden_states = outputs.last_hidden_state
    assert last_hidden_states.shape == (1, len(HELLO), 16)


def test_the_language_model(hub):
    tokenizer, model = AutoTokenizer.from_pretrained(hub["gpt2"]), TFAutoModelForCausalLM.from_pretrained(hub["gpt2"])
    inputs = tokenizer(HELLO, return_tensors="tf")
    outputs = model(inputs)
    assert outputs.logits.shape == (1, len(HELLO), 257)


def test_the_ways_to_give_inputs(hub):
    tokenizer, model = AutoTokenizer.from_pretrained(hub["gpt2"]), TFGPT2Model.from_pretrained(hub["gpt2"])
    encoded = tokenizer(HELLO, return_tensors="tf", return_token_type_ids=True)
    input_ids, attention_mask, token_type_ids = (
        encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    plain = model(input_ids).last_hidden_state
    assert np.array_equal(model([input_ids, attention_mask])[0], plain)
    typed = model([input_ids, attention_mask, token_type_ids])[0]
    assert np.array_equal(model({"input_ids": input_ids, "token_type_ids": token_type_ids})[0], typed)
    assert not np.array_equal(plain, typed)


def test_the_double_heads(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["gpt2"])
    model = TFGPT2DoubleHeadsModel.from_pretrained(hub["gpt2"])
    num_added_tokens = tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    embedding_layer = model.resize_token_embeddings(len(tokenizer))
    choices = ["Hello, my dog is cute [CLS]", "Hello, my cat is cute [CLS]"]
    encoded_choices = [tokenizer.encode(s) for s in choices]
    cls_token_location = [tokens.index(tokenizer.cls_token_id) for tokens in encoded_choices]
    input_ids = tf.constant(encoded_choices)[None, :]
    mc_token_ids = tf.constant([cls_token_location])
    outputs = model(input_ids, mc_token_ids=mc_token_ids)
    lm_prediction_scores, mc_prediction_scores = outputs[:2]
    assert num_added_tokens == 1 and embedding_layer is not None
    assert lm_prediction_scores.shape == (1, 2, 23, 258) and mc_prediction_scores.shape == (1, 2)


def test_sequence_classification(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["sequence_classification"])
    model = TFAutoModelForSequenceClassification.from_pretrained(hub["sequence_classification"])
    inputs = tokenizer(HELLO, return_tensors="tf")
    logits = model(**inputs).logits
    predicted_class_id = int(tf.math.argmax(logits, axis=-1)[0])
    num_labels = len(model.config.id2label)
    model = TFGPT2ForSequenceClassification.from_pretrained(hub["sequence_classification"], num_labels=num_labels)
    labels = tf.constant(1)
    loss = model(**inputs, labels=labels).loss
    assert predicted_class_id in (0, 1) and loss > 0


def test_the_tokenizer_in_the_graph(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub["gpt2"])
    made = TFGPT2Tokenizer.from_tokenizer(tokenizer)
    read = TFGPT2Tokenizer.from_pretrained(hub["gpt2"])
    assert read.settings == made.settings
    assert read([HELLO])["input_ids"].numpy().tolist() == [tokenizer(HELLO).input_ids]


def test_a_call_of_2020(hub):
    tokenizer, model = GPT2Tokenizer.from_pretrained(hub["gpt2"]), TFGPT2LMHeadModel.from_pretrained(hub["gpt2"])
    input_ids = tf.constant(tokenizer.encode(HELLO, add_special_tokens=True))[None, :]
    outputs = model(input_ids)
    assert outputs[0].shape == (1, len(HELLO), 257)
    past = [tf.stack(layer[:2]) for layer in outputs[1]]  # one tensor a layer, as they were then
    following = tf.constant([tokenizer.encode("r")])
    logits = model(following, past=past)[0]
    whole = model(tf.concat([input_ids, following], 1))[0]
    assert np.allclose(logits[:, -1], whole[:, -1], atol=1e-4)
