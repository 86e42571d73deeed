"""The peers of the TensorFlow benchmarks; see `benchmarks.peers`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import OPTIMIZER, Ids, KerasHub, serve


class Ours:
    """This library."""

    package = "gpt2_multi"

    def __init__(self, folder: Path, xla: bool) -> None:
        import keras

        from gpt2_multi.tf import TFGPT2LMHeadModel

        self.model = TFGPT2LMHeadModel.from_pretrained(folder)
        self.model.compile(keras.optimizers.AdamW(**OPTIMIZER), jit_compile=xla or "auto")

    def generate(self, ids: Ids, new: int) -> Any:
        return self.model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)

    def train(self, ids: Ids) -> Any:
        return self.model.train_on_batch({"input_ids": ids, "labels": ids})


class Transformers:
    """The last transformers that has TensorFlow, which is on Keras 2."""

    package = "transformers"

    def __init__(self, folder: Path, xla: bool) -> None:
        import tensorflow as tf
        import tf_keras
        from safetensors.numpy import load_file
        from transformers import GPT2Config, TFGPT2LMHeadModel
        from transformers.modeling_tf_pytorch_utils import load_pytorch_state_dict_in_tf2_model

        self.model = TFGPT2LMHeadModel(GPT2Config.from_pretrained(folder))
        load_pytorch_state_dict_in_tf2_model(self.model, load_file(folder / "model.safetensors"))
        self.model.compile(tf_keras.optimizers.AdamW(**OPTIMIZER), jit_compile=xla or None)
        compiled = tf.function(self.model.generate, jit_compile=True)
        self.run: Callable[..., Any] = compiled if xla else self.model.generate

    def generate(self, ids: Ids, new: int) -> Any:
        mask = np.ones_like(ids)
        return self.run(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

    def train(self, ids: Ids) -> Any:
        return self.model.train_on_batch({"input_ids": ids, "labels": ids})


PEERS = {"gpt2_multi": Ours, "transformers": Transformers, "kerashub": KerasHub}

if __name__ == "__main__":
    serve(PEERS, *sys.argv[1:])
