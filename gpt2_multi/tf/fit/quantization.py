"""Quantization and LoRA: Keras' own, `model.quantize(mode)` and `model.enable_lora(rank)`, fitted to these models.

"int8" and "int4" take dense layers and embeddings, the tied head too, "float8" dense layers. "gptq" and "awq" take the
dense layers of the blocks, by what they see of texts::

    texts = ["...", ...]
    config = keras.quantizers.GPTQConfig(texts, tokenizer, sequence_length=128)
    model.quantize("gptq", config)

Embeddings, and so the tied head, other heads, and attention to an encoder, of which texts show nothing, stay as they
are. A quantized model is saved as .keras; its weights do not train, but LoRA on top of int8 and int4 does.

LoRA (Hu et al. 2021) in every block, and nothing else of the body trained::

    model.enable_lora(8)
    model.compile(AdamW(1e-4))

`save_pretrained` and .keras files hold the merged weights, so that what is loaded has no LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.quantized import check_not_quantized
from gpt2_multi.tf.layers import replace_variable

BLOCK_KERNELS = ("c_attn", "q_attn", "c_fc", "c_proj")
CALIBRATED = ("gptq", "awq")  # modes that look at texts first


def enable_lora(self: Any, rank: int, target_layer_names: Sequence[str] | None = None, **options: Any) -> None:
    """LoRA in every dense layer of the blocks, or in the layers that are named so; other weights of the body stay.

    A head for a task (a classifier, say) trains on as a whole. `options` are those of a layer's `enable_lora`, such as
    `lora_alpha`. Compile the model afterwards. Raises InputError for a rank that is no whole number from 1, TypeError
    for a name that no layer has, and CheckpointError for layers that "gptq" or "awq" quantized.
    """
    inputs.check_size("rank", rank, 1)
    check_not_quantized(self.config, self.name, "given LoRA")
    layers = self.owners()
    known = {name.rpartition(".")[2] for name, layer in layers.items() if hasattr(layer, "enable_lora")}
    names = known.intersection(BLOCK_KERNELS) if target_layer_names is None else list(target_layer_names)
    inputs.check_names("target_layer_names", list(names), sorted(known), "layer")
    chosen = [layer for name, layer in layers.items() if name.rpartition(".")[2] in names]
    if any(getattr(layer, "quantization_mode", None) in CALIBRATED for layer in chosen):
        raise CheckpointError(f"{self.name}: gptq and awq leave no place for LoRA; quantize to int8 or int4 instead")
    head = [v for name, layer in layers.items() if is_task_head(self, name) for v in layer.trainable_variables]
    for layer in chosen:
        layer.enable_lora(rank, **options)
        widen(layer)
    for variable in self.trainable_variables:
        variable.trainable = "lora" in variable.name or any(variable is kept for kept in head)
    self.forget_functions()


def widen(layer: Any) -> None:
    """Keras makes the matrices of LoRA in float32; beside float64 they are as wide."""
    for name in ("lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b"):
        if layer.variable_dtype == "float64" and (factor := vars(layer).get(name)) is not None:
            replace_variable(layer, name, tf.cast(factor.value, "float64"))


def is_task_head(model: Any, name: str) -> bool:
    """Whether a layer, by its name in the table, is of a head that is learnt for a task."""
    return name != "lm_head" and name not in model.body().owners()


def quantize(self: Any, mode: str | None = None, config: Any = None, filters: Any = None) -> None:
    """Keras' own: "int8", "int4", "float8", "gptq" or "awq"; see the text of this module for what each takes.

    `filters` chooses among these layers: a function of a layer, or patterns of names. The `dataset` of a configuration
    for "gptq" or "awq" is of texts, for its `tokenizer`, or of rows of ids. Raises InputError for calibration with more
    tokens than the model can read, and without any.
    """
    check_not_quantized(self.config, self.name, "quantized once more")
    mode = mode or getattr(config, "mode", config)
    if mode in CALIBRATED and hasattr(config, "dataset"):
        return calibrate(self, mode, config, filters)
    kinds: Any = keras.layers.Dense if mode == "float8" else (keras.layers.Dense, keras.layers.Embedding)
    keras.Model.quantize(self, mode, config, filters or (lambda layer: isinstance(layer, kinds)))


def calibrate(model: Any, mode: str, config: Any, filters: Any) -> None:
    """Quantize the dense layers of the blocks by what they see."""
    if any(getattr(layer, "lora_enabled", False) for layer in model._flatten_layers()):
        sentence = "a model with LoRA cannot be quantized so; save_pretrained merges its updates, load what it wrote"
        raise CheckpointError(f"{model.name}: {sentence}")
    config, is_chosen = with_ids(model, config), matching(filters)
    parts = [part for block in model.body().h for part in (block.attn, block.mlp)]
    dense = [layer for part in parts for layer in part._flatten_layers() if isinstance(layer, keras.layers.Dense)]
    chosen = {id(layer): layer for layer in dense if is_chosen(layer)}
    with seen(chosen.values()):
        keras.Model.quantize(model, mode, config, lambda layer: id(layer) in chosen)
    for layer in chosen.values():
        keep_zeros(layer)


@contextmanager
def seen(layers: Iterable[Any]) -> Iterator[None]:
    """Let Keras see what layers take: it listens to their `call`, and has switched to another function by then."""

    def listened(layer: Any) -> Callable[..., Any]:
        own = layer.quantized_call

        def call(*args: Any, **options: Any) -> Any:
            ready = getattr(layer, f"is_{layer.quantization_mode}_calibrated")
            return (own if ready else layer.call)(*args, **options)

        return call

    for layer in layers:
        layer.quantized_call = listened(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.quantized_call


def keep_zeros(layer: Any) -> None:
    """Let a file have a calibrated layer's zero points, which Keras reads and does not write."""
    layer._get_kernel_with_merged_lora = lambda: (None, None, layer.kernel_zero)


def matching(filters: Any) -> Callable[[Any], bool]:
    """Keras' `filters` as a function of a layer."""
    if filters is None or callable(filters):
        return filters or (lambda layer: True)
    patterns = [filters] if isinstance(filters, str) else filters
    return lambda layer: any(re.search(pattern, layer.name) for pattern in patterns)


def with_ids(model: Any, config: Any) -> Any:
    """A configuration whose texts are ids, which are checked before any layer is changed."""
    if config.dataset is None or config.tokenizer is None:
        return config  # which Keras refuses
    body, rows = model.body(), [ids_of(config.tokenizer, row) for row in config.dataset]
    if config.sequence_length > (longest := body.wpe.input_dim):
        raise InputError(f"sequence_length: expected at most n_positions {longest}, found {config.sequence_length}")
    ids = np.concatenate([np.zeros(0, np.int64), *rows])
    if not ids.size:
        raise InputError("dataset: expected texts, or rows of ids, found no token in it; give what the model will read")
    inputs.check_vocabulary("dataset", int(ids.min()), int(ids.max()), body.wte.input_dim)
    given = {"dataset": rows, "quantization_layer_structure": config.quantization_layer_structure}
    if config.mode == "awq" and config.group_size == -1:  # one group: Keras 3.15 spoils square kernels so
        given["group_size"] = max(body.config.n_embd, body.h[0].mlp.c_fc.units)
    return type(config)(**config.get_config() | {"tokenizer": config.tokenizer} | given)


def ids_of(tokenizer: Any, row: Any) -> np.ndarray[Any, Any]:
    """A text, or ids, as ids (T,)."""
    if isinstance(row, str):
        row = tokenizer(row)
        row = row["input_ids"] if hasattr(row, "keys") else row
    return np.reshape(row, -1)


def get_quantization_layer_structure(self: Any, mode: str | None = None) -> dict[str, list[Any]] | None:
    """What "gptq" and "awq" ask for: what makes of ids (B, T) what the first block takes, (B, T, E), and the blocks."""
    body = self.body()

    def embed(ids: tf.Tensor) -> tf.Tensor:
        return body.embed(ids, tf.range(ids.shape[1])[None])

    return {"pre_block_layers": [embed], "sequential_blocks": list(body.h)} if mode in CALIBRATED else None


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
        if mode in CALIBRATED:
            del layers[name]._kernel  # as Keras does after calibration
            keep_zeros(layers[name])


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


def refuse_adapted(model: Any, what: str) -> None:
    """LoRA's updates have the shapes that the variables had."""
    check_not_quantized(model.config, model.name, what)  # by `quantization`, not by Keras
    refuse_quantized(model, f"{what}; do it before you quantize the model")
    if any(getattr(layer, "lora_enabled", False) for layer in model._flatten_layers()):
        raise CheckpointError(f"{model.name}: a model with LoRA cannot be {what}; save_pretrained merges its updates")
