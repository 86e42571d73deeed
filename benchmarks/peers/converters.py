"""What the frameworks do to get a checkpoint into safetensors; run by the Python of a peer's environment.

`python -m benchmarks.peers.converters FORMAT FOLDER TARGET` loads the checkpoint as its framework does, and writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path


def tf_h5(folder: Path, target: Path) -> None:
    """transformers 4.57, TensorFlow."""
    from transformers import TFGPT2LMHeadModel

    TFGPT2LMHeadModel.from_pretrained(folder).save_pretrained(target, safe_serialization=True)


def flax_msgpack(folder: Path, target: Path) -> None:
    """transformers 4.57, Flax."""
    from transformers import FlaxGPT2LMHeadModel

    FlaxGPT2LMHeadModel.from_pretrained(folder).save_pretrained(target, safe_serialization=True)


def openai(folder: Path, target: Path) -> None:
    """TensorFlow's reader, and safetensors' writer."""
    import tensorflow as tf
    from safetensors.numpy import save_file

    reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors")


PEERS = {"tf-h5": tf_h5, "flax-msgpack": flax_msgpack, "openai": openai}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
