"""A lesson in Keras, from raw strings to tokens on a device: fit with LoRA, int8, SavedModels, LiteRT's interpreter."""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from gpt2_multi.tf import KVCache, TFGPT2LMHeadModel, TFGPT2Tokenizer

keras.utils.set_random_seed(0)

# Raw strings, and the layer that makes ids of them
LINES = [
    "Shall I compare thee to a summer's day?",
    "Thou art more lovely and more temperate:",
    "Rough winds do shake the darling buds of May,",
    "And summer's lease hath all too short a date;",
]
tokenize = TFGPT2Tokenizer.from_pretrained("demo", max_length=24, padding="max_length")


def with_labels(texts):
    batch = tokenize(texts)
    return {**batch, "labels": batch["input_ids"]}


lines = tf.data.Dataset.from_tensor_slices(LINES * 8).shuffle(32, seed=0).batch(8).map(with_labels)
held_out = tf.data.Dataset.from_tensor_slices(LINES).batch(4).map(with_labels)

# A model, and what is in it
model = TFGPT2LMHeadModel.from_pretrained("demo")
model.summary(expand_nested=True)

# LoRA: the lines are learnt by heart, by one weight in thirty
model.enable_lora(4)
print(f"{model.num_parameters(only_trainable=True):,} of {model.num_parameters():,} numbers are trained")
model.compile(keras.optimizers.AdamW(1e-2), metrics=["accuracy"])
before = model.evaluate(held_out, return_dict=True)
history = model.fit(
    lines,
    validation_data=held_out,
    epochs=12,
    callbacks=[
        keras.callbacks.EarlyStopping("val_accuracy", patience=3, mode="max", restore_best_weights=True),
        keras.callbacks.ModelCheckpoint("best.keras", "val_accuracy", mode="max", save_best_only=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=2),
        keras.callbacks.CSVLogger("history.csv"),
        keras.callbacks.TerminateOnNaN(),
    ],
)
after = model.evaluate(held_out, return_dict=True)
print(before, after)
assert before["accuracy"] < 0.5 and after["accuracy"] > 0.95
start = tokenize(["Shall I"])["input_ids"][:, :3]
made = model.generate(start, max_new_tokens=16)
print(tokenize.detokenize(made).numpy()[0].decode())

# The updates are merged in what is saved; int8 is near it
model.save_pretrained("learnt")
learnt = TFGPT2LMHeadModel.from_pretrained("learnt")
assert np.allclose(learnt(made).logits, model(made).logits, atol=1e-3)
small = TFGPT2LMHeadModel.from_pretrained("learnt")
small.quantize("int8")
small.compile(metrics=["accuracy"])
assert abs(small.evaluate(held_out, return_dict=True)["accuracy"] - after["accuracy"]) < 0.05
small.save("small.keras")
print({name: Path(name).stat().st_size for name in ("learnt/model.safetensors", "small.keras")})
assert Path("small.keras").stat().st_size < 0.4 * Path("learnt/model.safetensors").stat().st_size

# SavedModels: logits of ids, and texts of texts
learnt.export("served", verbose=False)
served = tf.saved_model.load("served")
ids, mask = (tokenize(LINES)[name] for name in ("input_ids", "attention_mask"))
found = served.serve({"input_ids": ids, "attention_mask": mask})["logits"]
assert np.allclose(found, learnt(ids, attention_mask=mask).logits, atol=1e-3)
learnt.export_saved_model("texts", tokenizer=tokenize, max_new_tokens=16)
texts = tf.saved_model.load("texts")
print(texts.generate(["Shall I"])["text"].numpy()[0].decode())

# LiteRT: a function for a prompt of 8 tokens, one for each token after it, and a cache for 48
n_layer = learnt.config.n_layer


def named(cache):
    return {f"{name}_{i}": pair[j] for i, pair in enumerate(cache.layers) for j, name in enumerate(("key", "value"))}


def read(input_ids, cache):
    out = learnt(input_ids, past_key_values=cache, use_cache=True)
    return {"logits": out.logits, **named(out.past_key_values)}


def prefill(input_ids):
    return read(input_ids, learnt.init_cache(1, 48))


def step(input_ids, length, cache):
    pairs = tuple((cache[f"key_{i}"], cache[f"value_{i}"]) for i in range(n_layer))
    return read(input_ids, KVCache(pairs, filled=length))


prompt, token = (tf.TensorSpec((1, size), tf.int32, "input_ids") for size in (8, 1))
caches = {name: tf.TensorSpec(x.shape, x.dtype, name) for name, x in named(learnt.init_cache(1, 48)).items()}
archive = keras.export.ExportArchive()
archive.track(learnt)
archive.add_endpoint("prefill", prefill, [prompt])
archive.add_endpoint("step", step, [token, tf.TensorSpec((), tf.int32, "length"), caches])
archive.write_out("for-devices", verbose=False)
signatures = {"signature_keys": ["prefill", "step"]}
Path("gpt2.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model("for-devices", **signatures).convert())

device = Interpreter("gpt2.tflite")
first, following = device.get_signature_runner("prefill"), device.get_signature_runner("step")
row = start.numpy()[0].tolist()
answer = first(input_ids=np.array([row + [0] * (8 - len(row))], np.int32))
logits = answer.pop("logits")[0, len(row) - 1]
for _ in range(16):
    row.append(int(np.argmax(logits)))
    answer = following(input_ids=np.array([row[-1:]], np.int32), length=np.int32(len(row) - 1), **answer)
    logits = answer.pop("logits")[0, 0]
print(tokenize.detokenize(tf.constant([row])).numpy()[0].decode())
assert row == learnt.generate(start, max_new_tokens=16).numpy()[0].tolist()
assert np.allclose(logits, learnt(tf.constant([row])).logits[0, -1], atol=1e-3)
