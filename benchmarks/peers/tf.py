"""Peers in TensorFlow: this library, and the last transformers that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.calls import ADAMW, Process, as_ids, dtype_of


class Ours(Process):
    """This library."""

    package = "gpt2_multi"

    def load(self, folder: Path) -> None:
        import keras

        from gpt2_multi import GPT2Config
        from gpt2_multi.tf import TFGPT2LMHeadModel

        if "new" in self.modes:
            self.model = TFGPT2LMHeadModel(GPT2Config.from_pretrained(folder))
        else:
            self.model = TFGPT2LMHeadModel.from_pretrained(folder, **self.options())
        self.whole: Any = None  # the function of a step, where it is not Keras'
        if not {"int8", "bfloat16"}.intersection(self.modes):  # which only generate
            self.model.compile(keras.optimizers.AdamW(**ADAMW), jit_compile="xla" in self.modes or "auto")

    def options(self) -> dict[str, Any]:
        """How the folder is loaded."""
        if "int8" in self.modes:
            return {"quantization": "int8"}
        return {"dtype": "mixed_bfloat16"} if "autocast" in self.modes else {"param_dtype": dtype_of(self.modes)}

    def generate(self, ids: Any, new: int, options: Any) -> Any:
        chosen = {"do_sample": False, "eos_token_id": None, **options}
        return self.model.generate(as_ids(ids), max_new_tokens=new, **chosen)

    def loss(self, ids: Any) -> Any:
        return self.model({"input_ids": as_ids(ids), "labels": as_ids(ids)}).loss

    def train(self, ids: Any) -> Any:
        if "whole logits" not in self.modes:
            return self.model.train_on_batch({"input_ids": as_ids(ids), "labels": as_ids(ids)})
        if self.whole is None:
            self.whole = whole_step(self.model)
        return self.whole(as_ids(ids))


def whole_step(model: Any) -> Any:
    """A step that has all logits at once, and computes the loss of them itself."""
    import tensorflow as tf

    def step(ids: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model({"input_ids": ids}, training=True).logits
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.roll(ids, -1, 1), logits)  # (B, T)
            loss = tf.reduce_mean(losses[:, :-1])
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return tf.function(step, reduce_retracing=True)


class Transformers(Process):
    """transformers 4.57.6, which is on Keras 2."""

    package = "transformers"

    def load(self, folder: Path) -> None:
        import tensorflow as tf
        import tf_keras
        from safetensors.numpy import load_file
        from transformers import GPT2Config, TFGPT2LMHeadModel
        from transformers.modeling_tf_pytorch_utils import load_pytorch_state_dict_in_tf2_model

        self.model = TFGPT2LMHeadModel(GPT2Config.from_pretrained(folder))
        load_pytorch_state_dict_in_tf2_model(self.model, load_file(folder / "model.safetensors"))
        self.model.compile(tf_keras.optimizers.AdamW(**ADAMW), jit_compile="xla" in self.modes or None)
        compiled = tf.function(self.model.generate, jit_compile=True)
        self.run: Any = compiled if "xla" in self.modes else self.model.generate

    def generate(self, ids: Any, new: int, options: Any) -> Any:
        given, chosen = as_ids(ids), {"do_sample": False, **options}
        return self.run(given, attention_mask=np.ones_like(given), max_new_tokens=new, pad_token_id=0, **chosen)

    def train(self, ids: Any) -> Any:
        return self.model.train_on_batch({"input_ids": as_ids(ids), "labels": as_ids(ids)})
