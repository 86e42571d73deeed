"""Quantization and LoRA: Keras' own, `model.quantize("int8")` and `layer.enable_lora(rank)`, fitted to these models.

LoRA (Hu et al. 2021) in every block, and nothing else trained::

    for block in model.transformer.h:
        block.attn.c_attn.enable_lora(8)
    for variable in model.variables:
        variable.trainable = variable.trainable and "lora" in variable.name
    model.compile(AdamW(1e-4))

`save_pretrained` and .keras files hold the merged weights, so that what is loaded has no LoRA. A quantized model is
saved as .keras; its weights do not train, but LoRA on top of them does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from gpt2_multi.errors import CheckpointError


def quantize(self: Any, mode: str | None = None, config: Any = None, filters: Any = None) -> None:
    """Keras' own: "int8", "int4" or "float8", of dense layers and, but for float8, embeddings; the tied head follows.

    `filters` chooses layers: a function of a layer, or patterns of names.
    """
    kinds: Any = keras.layers.Dense if mode == "float8" else (keras.layers.Dense, keras.layers.Embedding)
    keras.Model.quantize(self, mode, config, filters or (lambda layer: isinstance(layer, kinds)))


def modes(model: Any) -> dict[str, tuple[str, Any]]:
    """How each quantized layer is quantized, by the layer's name in the table."""
    layers = {name: layer for name, layer in model.owners().items() if getattr(layer, "quantization_mode", None)}
    return {
        name: (layer.quantization_mode, keras.saving.serialize_keras_object(layer.quantization_config))
        for name, layer in layers.items()
    }


def restore(model: Any, given: Mapping[str, Any]) -> None:
    """Quantize a new model's layers as `modes` had it, so that weights of a file can be read into them."""
    layers = model.owners()
    for name, (mode, config) in given.items():
        layers[name].quantize(mode, config=keras.saving.deserialize_keras_object(config))


def load_weights(self: Any, filepath: Any, skip_mismatch: bool = False, **options: Any) -> None:
    """Keras' own, of a .weights.h5 file. The file's weights are merged: LoRA starts anew on top of them.

    Keras sets both factors of LoRA to zero, where neither has a gradient; here the first is random.
    """
    keras.Model.load_weights(self, filepath, skip_mismatch, **options)
    for layer in self.owners().values():
        if getattr(layer, "lora_enabled", False):
            first = layer.lora_kernel_a if hasattr(layer, "lora_kernel_a") else layer.lora_embeddings_a
            first.assign(keras.initializers.HeUniform()(first.shape))


def refuse_quantized(model: keras.Model, what: str) -> None:
    """Quantized variables are not what the table says."""
    if any(getattr(layer, "quantization_mode", None) for layer in model._flatten_layers()):
        raise CheckpointError(f"{model.name}: a quantized model cannot be {what}")


def refuse_adapted(model: keras.Model, what: str) -> None:
    """LoRA's updates have the shapes that the variables had."""
    refuse_quantized(model, f"{what}; do it before you quantize the model")
    if any(getattr(layer, "lora_enabled", False) for layer in model._flatten_layers()):
        raise CheckpointError(f"{model.name}: a model with LoRA cannot be {what}; save_pretrained merges its updates")
