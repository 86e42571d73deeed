"""The Flax snippets of transformers' pages on GPT-2 (to 4.57), in our words: as there, but for imports and names.

What is shown is that they run; that the numbers are right is shown elsewhere.
"""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from gpt2_multi import (
    AutoTokenizer,
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxGPT2DoubleHeadsModel,
    FlaxGPT2LMHeadModel,
)

HELLO = "Hello, my dog is cute"


def test_the_bare_model(hub):
    tokenizer, model = AutoTokenizer.from_pretrained(hub["gpt2"]), FlaxAutoModel.from_pretrained(hub["gpt2"])
    inputs = tokenizer(HELLO, return_tensors="jax")
    outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert last_hidden_states.shape == (1, len(HELLO), 16)


def test_the_language_model(hub):
    tokenizer, model = AutoTokenizer.from_pretrained(hub["gpt2"]), FlaxAutoModelForCausalLM.from_pretrained(hub["gpt2"])
    inputs = tokenizer(HELLO, return_tensors="np")
    outputs = model(**inputs)
    next_token_logits = outputs.logits[:, -1]
    assert next_token_logits.shape == (1, 257)


def test_half_precision(hub):
    model = FlaxGPT2LMHeadModel.from_pretrained(hub["gpt2"], dtype=jax.numpy.bfloat16)
    model.params = model.to_bf16(model.params)
    assert model.params["transformer"]["wte"]["embedding"].dtype == jax.numpy.bfloat16


def test_the_double_heads(hub):
    """The page has it for the other two; the class is there for this one as well."""
    tokenizer = AutoTokenizer.from_pretrained(hub["gpt2"])
    model = FlaxGPT2DoubleHeadsModel.from_pretrained(hub["gpt2"])
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    model.resize_token_embeddings(len(tokenizer))
    choices = ["Hello, my dog is cute [CLS]", "Hello, my cat is cute [CLS]"]
    encoded_choices = [tokenizer.encode(s) for s in choices]
    cls_token_location = [tokens.index(tokenizer.cls_token_id) for tokens in encoded_choices]
    input_ids = jax.numpy.array(encoded_choices)[None]
    outputs = model(input_ids, mc_token_ids=jax.numpy.array([cls_token_location]))
    assert outputs.logits.shape == (1, 2, 23, 258) and outputs.mc_logits.shape == (1, 2)
