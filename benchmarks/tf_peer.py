"""One peer of the TensorFlow benchmarks, run by the Python of an environment of its own.

`python -m benchmarks.tf_peer NAME FOLDER plain|xla` loads the model of the folder, prints the package and its version,
and then answers each line of its input, a call like ["generate", ids, 64], by a line with the result: all JSON. It
imports nothing of this library but for the peer that is this library.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Ids = np.ndarray[Any, Any]
OPTIMIZER = {"learning_rate": 1e-4, "weight_decay": 0.01}


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


class KerasHub:
    """KerasHub, which takes sequences of their final length and labels that are shifted already."""

    package = "keras-hub"

    def __init__(self, folder: Path, xla: bool) -> None:
        import keras
        from keras_hub.models import GPT2CausalLM

        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
        self.model = GPT2CausalLM.from_preset(str(folder), preprocessor=None)
        optimizer = keras.optimizers.AdamW(**OPTIMIZER)
        self.model.compile(optimizer, loss, weighted_metrics=[], sampler="greedy", jit_compile=xla or "auto")

    def generate(self, ids: Ids, new: int) -> Any:
        room = ((0, 0), (0, new))
        inputs = {"token_ids": np.pad(ids, room), "padding_mask": np.pad(np.ones_like(ids), room)}
        return self.model.generate(inputs, stop_token_ids=None)["token_ids"]

    def train(self, ids: Ids) -> Any:
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        counted = np.ones(ids.shape, np.float32)
        counted[:, -1] = 0
        return self.model.train_on_batch(inputs, np.roll(ids, -1, 1), counted)


PEERS = {"gpt2_multi": Ours, "transformers": Transformers, "kerashub": KerasHub}


def main(name: str, folder: str, mode: str) -> None:
    """Answer calls until the input ends; whatever the frameworks print goes to stderr."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        peer = PEERS[name](Path(folder), mode == "xla")
        print(json.dumps(f"{peer.package} {metadata.version(peer.package)}"), file=answers, flush=True)
        for line in sys.stdin:
            what, ids, *rest = json.loads(line)
            result = getattr(peer, what)(np.array(ids, np.int32), *rest)
            print(json.dumps(np.asarray(result).tolist()), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
