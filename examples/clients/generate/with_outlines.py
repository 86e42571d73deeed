"""Let outlines keep a model to a regular expression: its automaton over tokens is a table that every loop can read."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
import torch
from outlines_core import Index, Vocabulary

from gpt2_multi import FlaxGPT2LMHeadModel, GPT2LMHeadModel, GPT2Tokenizer, TFGPT2LMHeadModel

PATTERN = r"(ROMEO|JULIET): [a-z]{2,8}(, [a-z]{2,8}){1,3}\."
tokenizer = GPT2Tokenizer.from_pretrained("demo")
words = {tokenizer.decode_bytes([token]): [token] for token in range(len(tokenizer)) if token != tokenizer.eos_token_id}
index = Index(PATTERN, Vocabulary(tokenizer.eos_token_id, words))
moves = index.get_transitions()
states = dict.fromkeys(
    [index.get_initial_state(), *moves, *(after for steps in moves.values() for after in steps.values())]
)
number = {state: place for place, state in enumerate(states)}
NONE = len(states)  # the state after what may not follow
table = np.full((NONE + 1, len(tokenizer)), NONE, np.int32)  # the state after each token in each state
for state, steps in moves.items():
    table[number[state], [*steps]] = [number[after] for after in steps.values()]
start = tokenizer("Enter ").input_ids


def in_torch(ids, logits):
    """PyTorch's loop is Python."""
    state = torch.zeros(len(ids), dtype=torch.int32)
    for column in ids[:, len(start) :].T:
        state = torch.from_numpy(table)[state, column]
    return logits.masked_fill(torch.from_numpy(table)[state] == NONE, -torch.inf)


def in_jax(ids, logits, length):
    """Nothing leaves the compiled loop."""
    after, first = jnp.asarray(table), jnp.zeros(len(ids), jnp.int32)
    state = jax.lax.fori_loop(len(start), length, lambda i, state: after[state, ids[:, i]], first)
    return jnp.where(after[state] == NONE, -jnp.inf, logits)


def in_tensorflow(ids, logits, length):
    """The same, for XLA and without it."""

    def step(i, state):
        return i + 1, tf.gather_nd(table, tf.stack([state, ids[:, i]], 1))

    first = len(start), tf.zeros_like(ids[:, 0])
    _, state = tf.while_loop(lambda i, _: i < length, step, first)
    return tf.where(tf.gather(table, state) == NONE, -np.inf, logits)


def text_of(found):
    """What follows the prompt, which has to be what the pattern says."""
    text = tokenizer.decode(np.asarray(found)[0, len(start) :].tolist(), skip_special_tokens=True)
    assert re.fullmatch(PATTERN, text), text
    print(text)
    return text


options = {"max_new_tokens": 60, "do_sample": True, "seed": 5}
ours = GPT2LMHeadModel.from_pretrained("demo")
one = text_of(ours.generate(torch.tensor([start]), logits_processor=[in_torch], **options))
compiled = FlaxGPT2LMHeadModel.from_pretrained("demo")
assert text_of(compiled.generate([start], logits_processor=[in_jax], **options)) == one
keras = TFGPT2LMHeadModel.from_pretrained("demo")
assert text_of(keras.generate([start], logits_processor=[in_tensorflow], **options)) == one
