"""Let xgrammar keep a text to a JSON schema: its own processor in PyTorch, its masks in JAX and TensorFlow."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
import xgrammar as xgr
from xgrammar.contrib.hf import LogitsProcessor

from gpt2_multi import FlaxGPT2LMHeadModel, GPT2LMHeadModel, GPT2Tokenizer, TFGPT2LMHeadModel

SCHEMA = {
    "type": "object",
    "properties": {"king": {"enum": ["Richard", "Henry", "Edward"]}, "year": {"enum": [1399, 1413, 1483]}},
    "required": ["king", "year"],
    "additionalProperties": False,
}
tokenizer = GPT2Tokenizer.from_pretrained("demo")
model = GPT2LMHeadModel.from_pretrained("demo")
size = model.config.vocab_size

info = xgr.TokenizerInfo(
    tokenizer.convert_ids_to_tokens(range(size)),
    xgr.VocabType.BYTE_LEVEL,
    vocab_size=size,
    stop_token_ids=[tokenizer.eos_token_id],
)
grammar = xgr.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)

texts = ["KING:\n", "The king and his year:\n"]
prompts = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
arrays = tokenizer(texts, padding=True, padding_side="left", return_tensors="np")
length = prompts["input_ids"].shape[1]


def allowed(ids, end):
    """Which tokens may follow the new ones of each row: (R, V), in NumPy."""
    masks = xgr.allocate_token_bitmask(len(ids), size)
    for row, new in enumerate(np.asarray(ids)[:, length : int(end)].tolist()):
        matcher = xgr.GrammarMatcher(grammar)
        if all(matcher.is_terminated() or matcher.accept_token(token) for token in new) and not matcher.is_terminated():
            matcher.fill_next_token_bitmask(masks, row)
    return np.unpackbits(masks.numpy().view(np.uint8), axis=1, bitorder="little")[:, :size].astype(bool)


def in_jax(ids, logits, end):
    """A compiled loop asks Python by a callback."""
    may_follow = jax.pure_callback(allowed, jax.ShapeDtypeStruct(logits.shape, bool), ids, end)
    return jnp.where(may_follow, logits, -jnp.inf)


def in_tensorflow(ids, logits, end):
    """So does a graph, though none that XLA compiles."""
    may_follow = tf.ensure_shape(tf.numpy_function(allowed, [ids, end], tf.bool), logits.shape)
    return tf.where(may_follow, logits, -np.inf)


def check(ids):
    """Each text is of the schema."""
    for text in tokenizer.batch_decode(np.asarray(ids)[:, length:].tolist(), skip_special_tokens=True):
        print(text)
        found = json.loads(text)
        assert found["king"] in ("Richard", "Henry", "Edward") and found["year"] in (1399, 1413, 1483)


compiled, keras = FlaxGPT2LMHeadModel.from_pretrained("demo"), TFGPT2LMHeadModel.from_pretrained("demo")
for options in ({"max_new_tokens": 64}, {"max_new_tokens": 64, "do_sample": True, "seed": 7}):
    ids = model.generate(**prompts, logits_processor=[LogitsProcessor(grammar)], **options)
    check(ids)
    for made in (
        compiled.generate(**arrays, logits_processor=[in_jax], **options),
        keras.generate(**arrays, logits_processor=[in_tensorflow], jit_compile=False, **options),
    ):
        assert np.array_equal(made, ids)
