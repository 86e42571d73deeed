"""Every format, in the order in which a folder is tried; and files of other names, the last one first."""

from __future__ import annotations

from collections.abc import Mapping

from gpt2_multi.model.formats import keras, lens, llmc, mingpt, nanogpt, openai, transformers
from gpt2_multi.model.formats.format import Format

FORMATS: Mapping[str, Format] = {
    "safetensors": transformers.SAFETENSORS,
    "torch-safetensors": transformers.TORCH_SAFETENSORS,
    "tf-safetensors": transformers.TF_SAFETENSORS,
    "pytorch": transformers.PYTORCH,
    "torch-pickle": transformers.TORCH_PICKLE,
    "tf-h5": transformers.TF_H5,
    "flax-msgpack": transformers.FLAX_MSGPACK,
    "openai": openai.OPENAI,
    "nanogpt": nanogpt.NANOGPT,
    "build-nanogpt": nanogpt.BUILD_NANOGPT,
    "mingpt": mingpt.MINGPT,
    "mingpt-2020": mingpt.MINGPT_2020,
    "transformer-lens": lens.TRANSFORMER_LENS,
    "transformer-bridge": lens.TRANSFORMER_BRIDGE,
    "llmc": llmc.LLMC,
    "keras-hub": keras.KERAS_HUB,
    "keras-weights": keras.KERAS_WEIGHTS,
}
