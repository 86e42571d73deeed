"""Between Keras' variables and the table: initialisation, from_pretrained, save_pretrained, resizing, pruning."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import keras
import numpy as np
import tensorflow as tf

from gpt2_multi.errors import InputError
from gpt2_multi.files import arguments
from gpt2_multi.generation.config import GenerationConfig, as_generation_config
from gpt2_multi.model import checkpoint, inputs
from gpt2_multi.model.checkpoint.quantized import DTYPE, in_int8
from gpt2_multi.model.config import GPT2Config, check_config
from gpt2_multi.model.outputs import Output
from gpt2_multi.model.spelling import KERAS
from gpt2_multi.model.weights import Weight, table
from gpt2_multi.tf.fit import data, exporting, fitting, quantization
from gpt2_multi.tf.fit.arguments import as_keywords, is_old, signature_of
from gpt2_multi.tf.fit.policies import Policy, policy_of
from gpt2_multi.tf.layers import (
    assign_quantized,
    initial,
    integers,
    made,
    quantized_of,
    replace_layer,
    replace_variable,
)

_READING = ContextVar("_READING", default=False)  # a file's values will follow: random ones would cost half the time


class TFGPT2PreTrainedModel(keras.Model):
    """What every GPT-2 class shares: a configuration, the call's conventions, and the way to and from files.

    The first argument of a call may be the ids, a list of tensors in the order of the arguments, or a mapping.
    """

    head: ClassVar[str]
    output_class: ClassVar[type[Output]]
    label_names: ClassVar[tuple[str, ...]] = ("labels",)  # inputs of the loss, in the order of their logits
    logit_names: ClassVar[tuple[str, ...]] = ("logits",)  # outputs that a loss or a metric of `compile` sees
    logit_axes: ClassVar[str] = "BTV"  # of the first of them, in the letters of the glossary
    base_model_prefix: ClassVar[str] = "transformer"
    main_input_name: ClassVar[str] = "input_ids"
    framework: ClassVar[str] = "tf"
    generation_config: GenerationConfig | None = None  # of the classes that generate
    _default_save_signature: ClassVar[None] = None  # Keras' own takes ids for floats

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: Policy = None,
        param_dtype: Any = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        policy = policy_of(dtype, param_dtype)
        super().__init__(dtype=policy, name=name, autocast=False, **options)  # or labels would lose digits
        self._call_signature = signature_of(type(self))
        self.config = check_config(config)
        self.name_or_path = config.name_or_path

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return bool(self.body().gradient_checkpointing)

    def initialise(self) -> None:
        """Give layers and variables their paths, and first values as the table says, unless the body did that."""
        for weight in table(self.config, self.head):
            variable = self.parameter(weight)
            variable._path = f"{self.name}/{KERAS.spell(weight, self.head != 'base').replace('.', '/')}"
            self.owner(weight)._path = variable._path.rpartition("/")[0]  # `quantize` tells layers apart by it
            if not _READING.get() and (self.head == "base" or not weight.in_body):
                self._give(weight, None)
        if self.config.quantization is not None:  # integers do not train, and so the rest of the body does not
            for variable in self.body().trainable_variables:
                variable.trainable = False
        made(self, *[None] * (3 if "C" in self.logit_axes else 2))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(**as_keywords(type(self), args, kwargs))
        if isinstance(output, Output) and is_old(args, kwargs):
            output.unpacks = True
        return output

    def body(self) -> Any:  # no property, or Keras would look into it for weights to save
        """The bare model inside."""
        return getattr(self, "transformer", self)

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The shape of its logits, for `summary`."""
        known = {"E": self.config.n_embd, "V": self.config.vocab_size, "L": self.config.num_labels}
        return tuple(known.get(axis) for axis in self.logit_axes)

    def owner(self, weight: Weight) -> keras.layers.Layer:
        """The layer that a row of the table belongs to."""
        place: Any = self.body() if weight.in_body else self
        for part in weight.path.split("."):
            place = place[int(part)] if part.isdigit() else getattr(place, part)
        return place

    def owners(self) -> dict[str, keras.layers.Layer]:
        """Every layer that has weights, by its name in the table."""
        return {weight.path: self.owner(weight) for weight in table(self.config, self.head)}

    def parameter(self, weight: Weight) -> Any:
        """The variable that a row of the table is; with LoRA, its value with the update merged in."""
        return getattr(self.owner(weight), KERAS.leaves[weight.kind])

    prepare_tf_dataset = data.prepare_tf_dataset
    fit = data.weighing(keras.Model.fit)
    evaluate = data.weighing(keras.Model.evaluate)
    train_on_batch = data.weighing(keras.Model.train_on_batch)
    test_on_batch = data.weighing(keras.Model.test_on_batch)
    compile = fitting.compile
    compile_from_config = fitting.compile_from_config
    _maybe_symbolic_build = fitting.build_compiled
    train_step = fitting.train_step
    test_step = fitting.test_step
    predict_step = fitting.predict_step
    predict = fitting.predict
    predict_on_batch = fitting.predict_on_batch
    compute_loss = fitting.compute_loss
    hf_compute_loss = fitting.hf_compute_loss
    compute_metrics = fitting.compute_metrics
    export = exporting.export
    enable_lora = quantization.enable_lora
    quantize = quantization.quantize
    get_quantization_layer_structure = quantization.get_quantization_layer_structure
    load_weights = quantization.load_weights

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same model from."""
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        keys = {"config": self.config.to_dict(), "name": self.name, "trainable": self.trainable, "dtype": policy}
        if self.generation_config is not None:
            keys["generation_config"] = asdict(as_generation_config(self.generation_config))
        modes = quantization.modes(self)
        return {**keys, "quantized": modes} if modes else keys

    @classmethod
    def from_config(cls, config: GPT2Config | Mapping[str, Any], **options: Any) -> Self:
        """A new model of a configuration: a GPT2Config, the keys of one, or what `get_config` gave."""
        if not isinstance(config, Mapping):
            return cls(config, **arguments.sort(options)[1])
        if "config" not in config:
            return cls(GPT2Config.from_dict(config), **options)
        keys = {**config, **options}
        generation, modes = keys.pop("generation_config", None), keys.pop("quantized", {})
        model = cls(GPT2Config.from_dict(keys.pop("config")), **keys)
        if generation is not None:
            model.generation_config = GenerationConfig(**generation)
        quantization.restore(model, modes)
        return model

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has `generate`."""
        return hasattr(cls, "generate")

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers its variables are; a tied head counts once."""
        return sum(math.prod(x.shape) for x in (self.trainable_weights if only_trainable else self.weights))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: Any = None,
        dtype: Policy = None,
        param_dtype: Any = None,
        torch_dtype: Any = None,
        name: str | None = None,
        quantization: str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self:
        """Load a model folder, a file of weights, the demo model ("demo"), or a model of the hub by its name.

        `param_dtype` (transformers' `torch_dtype`) is what the variables are stored in: by default what Keras' global
        policy says (float32), "auto" for what config.json names. `dtype` is what the model computes in, by default the
        same; it may be a Keras policy such as "mixed_bfloat16". `quantization="int8"` makes the model a quantized one,
        which files of a quantized model are without it: see docs/numerics.md.

        `options` say where the files are and which of them are read (`revision`, `token`, `cache_dir`,
        `local_files_only`, `subfolder`, `variant`, `use_safetensors` and so on), and change settings of the
        configuration: with fewer words or positions than the files have, the rows beyond are cut. `prefix` chooses one
        of several models in a file by what stands before its names, and `drop` are patterns of tensors that are no part
        of it. `config` stands in the place of the files' own: a GPT2Config, its keys, or where it lies. A task
        head that the files lack, and with `ignore_mismatched_sizes` what has another shape, is initialised anew, with a
        warning. With `output_loading_info` the answer is a pair: the model, and what was missing, unexpected and
        mismatched. Raises CheckpointError or ConfigError for anything that does not fit, InputError for an argument
        that cannot be honoured, and TypeError for one that does not exist.
        """
        found = checkpoint.load(
            pretrained_model_name_or_path, cls.head, config, options, quantization=quantization,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )  # fmt: skip
        dtype, stored = checkpoint.two_dtypes(found.config, dtype, param_dtype, torch_dtype)
        reading = _READING.set(True)
        try:
            model = cls(found.config, dtype=dtype, param_dtype=stored, name=name)
        finally:
            _READING.reset(reading)
        model._assign({**found.arrays, **found.quantized})
        if model.generation_config is not None:
            model.generation_config = GenerationConfig.of_folder(found.folder, found.config, found.chosen)
        return cast(Self, (model, found.info)) if output_loading_info else model

    def _assign(self, arrays: Mapping[str, Any]) -> None:
        for weight in table(self.config, self.head):
            self._give(weight, arrays.get(weight.name))

    def _give(self, weight: Weight, found: Any) -> None:
        """Assign a row, in the table's layout or in int8, or its first value."""
        if in_int8(self.config, weight):
            assign_quantized(self.owner(weight), weight, found or integers(weight))
        elif found is None:
            self.parameter(weight).assign(initial(weight, self.variable_dtype))
        else:
            self.parameter(weight).assign(KERAS.layout(weight, found))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Write config.json and model.safetensors (shards and an index beyond `max_shard_size`) as transformers does.

        Without `safe_serialization` it is tf_model.h5. Only the main process writes; a `variant` such as "fp16"
        stands in the files' names. With `push_to_hub` the same is uploaded: `options` are those of `push_to_hub`.

        The model's files are replaced together, other files of the folder stay: see `files.folders.replaced`. LoRA's
        updates are merged in. Raises CheckpointError, and leaves what was there, where a tensor is not what the
        configuration says, or the model is quantized.
        """
        wanted = arguments.sort_saving("save_pretrained", options)
        if not is_main_process:
            return
        quantization.refuse_quantized(
            self, "saved as safetensors; save it as .keras, or save it before you quantize it"
        )
        config = self.config.replace(architectures=[type(self).__name__.removeprefix("TF")], dtype=self.variable_dtype)
        sources = map(self._source, table(config, self.head))
        kind = "safetensors" if safe_serialization else "tf-h5"
        checkpoint.save(
            save_directory, config, self.generation_config, sources, self.head, max_shard_size, kind, variant
        )
        if push_to_hub:
            self.push_to_hub(
                **{"repo_id": Path(save_directory).name, **wanted}, max_shard_size=max_shard_size,
                safe_serialization=safe_serialization, variant=variant,
            )  # fmt: skip

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a model of the hub, and return the commit's address.

        `options` are those of `save_pretrained` for the weights, and of `files.hub.push`.
        """
        return checkpoint.upload(self.save_pretrained, repo_id, options)

    def _source(self, weight: Weight) -> Any:
        value = self.parameter(weight)
        if in_int8(self.config, weight):
            return weight, DTYPE, lambda: quantized_of(self.owner(weight), weight)
        dtype = tf.as_dtype(keras.backend.standardize_dtype(value.dtype)).as_numpy_dtype
        return weight, np.dtype(dtype), lambda: KERAS.layout(weight, tf.convert_to_tensor(value).numpy())

    def get_input_embeddings(self) -> keras.layers.Embedding:
        """The token embedding."""
        return self.body().wte

    def set_input_embeddings(self, embedding: Any) -> None:
        """Use another token embedding; a tied head and `vocab_size` follow.

        A ReversibleEmbedding, as `get_input_embeddings` gives it, is used itself, so that two models may share one; of
        another Embedding, or of an array (V, E), the values are copied. Compile the model again before you train it
        further: the optimizer has to forget the old variable.
        """
        quantization.refuse_adapted(self, "given other embeddings")
        body, layer = self.body(), embedding
        if not isinstance(layer, keras.layers.ReversibleEmbedding):
            values = tf.convert_to_tensor(getattr(layer, "embeddings", layer))
            inputs.check_shape("embedding", tuple(values.shape), (None, self.config.n_embd))
            layer = keras.layers.ReversibleEmbedding(*values.shape, name="wte", dtype=body.dtype_policy)
            layer.build((None, None))
            layer.embeddings.assign(values)
        check_layer("embedding", layer, "embeddings", (None, self.config.n_embd), self.compute_dtype)
        replace_layer(body, "wte", layer)
        self.config.vocab_size = layer.input_dim
        self.forget_functions()

    def get_output_embeddings(self) -> keras.layers.Layer | None:
        """The language-model head: a Dense layer, the token embedding where they are tied, or None."""
        if self.head not in ("lm", "double_heads"):
            return None
        return self.body().wte if self.config.tie_word_embeddings else self.lm_head

    def set_output_embeddings(self, head: Any) -> None:
        """Use another language-model head: a Dense layer without bias, or the token embedding.

        The token embedding ties the head to it; another embedding takes its place, as in `set_input_embeddings`.
        """
        if self.get_output_embeddings() is None:
            raise InputError(f"set_output_embeddings: {type(self).__name__} has no language-model head")
        quantization.refuse_adapted(self, "given another head")
        is_own = isinstance(head, keras.layers.Dense)
        if is_own:
            check_layer("head", head, "kernel", (self.config.n_embd, None), self.compute_dtype)
        elif head is not self.body().wte:
            self.set_input_embeddings(head)
        replace_layer(self, "lm_head", head if is_own else None)
        self.config.tie_word_embeddings = not is_own
        self.forget_functions()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> keras.layers.Embedding:
        """Give the vocabulary `new_num_tokens` ids; each new row is the mean of the old ones (Hewitt 2021).

        Returns the token embedding. A mean keeps the logits of a new token from drowning the others; without
        `mean_resizing` a new row is random, as in a new model. The number is rounded up to `pad_to_multiple_of`.
        Compile the model again before you train it further: the optimizer has to forget the old variable.
        """
        number = inputs.new_vocabulary(new_num_tokens, self.config.vocab_size, pad_to_multiple_of)
        std = None if mean_resizing else self.config.initializer_range
        if number is None:
            return self.get_input_embeddings()
        quantization.refuse_adapted(self, "resized")
        self.config.vocab_size = number
        wte = self.body().wte
        replace_variable(wte, "embeddings", _resized(wte.embeddings, number, std))
        wte.input_dim = number
        head = self.get_output_embeddings()
        if head not in (None, wte):
            replace_variable(head, "kernel", tf.transpose(_resized(tf.transpose(head.kernel), number, std)))
            head.units = number
        self.forget_functions()
        return wte

    def gradient_checkpointing_enable(self, every_n_layers: int = 1) -> None:
        """Compute the activations of every n-th block again in the backward pass instead of keeping them."""
        inputs.check_size("every_n_layers", every_n_layers, 1)
        self.body().gradient_checkpointing, self.body().every_n_layers = True, every_n_layers
        self.forget_functions()

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.body().gradient_checkpointing = False
        self.forget_functions()

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Cut attention heads away: {layer: heads}, numbered as in the whole model; `config.pruned_heads` has them."""
        quantization.refuse_adapted(self, "pruned")
        self.config.pruned_heads = self.config.pruned(heads_to_prune)
        for layer, heads in heads_to_prune.items():
            self.body().h[layer].attn.prune(heads)
        self.forget_functions()

    def forget_functions(self) -> None:
        """Forget what was traced with variables that are no more."""
        self.train_function = self.test_function = self.predict_function = None


def _resized(rows: tf.Tensor, number: int, std: float | None) -> tf.Tensor:
    new = tf.repeat(tf.reduce_mean(rows, 0, keepdims=True), max(number - rows.shape[0], 0), 0)
    return tf.concat([rows[:number], new if std is None else keras.random.normal(new.shape, 0, std, new.dtype.name)], 0)


def check_layer(name: str, layer: Any, leaf: str, shape: tuple[int | None, ...], dtype: str) -> None:
    """A layer that takes a place in the model has a variable of the right shape, no bias, and computes in its dtype."""
    found = tuple(getattr(layer, leaf).shape) if layer.built else ()
    inputs.check_shape(f"{name}.{leaf}", found, shape)
    if getattr(layer, "bias", None) is not None or layer.compute_dtype != dtype:
        raise InputError(
            f"{name}: expected a layer without bias that computes in {dtype}, found {layer.compute_dtype}; give it "
            f"use_bias=False, and dtype=model.dtype_policy"
        )


def devices() -> list[str]:
    """Where TensorFlow can compute, the fastest kind first."""
    return [*(f"gpu:{i}" for i in range(len(tf.config.list_physical_devices("GPU")))), "cpu"]


def dtypes(device: str) -> list[str]:
    """The floating-point dtypes that a device computes in."""
    return ["float64", "float32", "bfloat16", "float16"]


def load_on(device: str, model_class: type[TFGPT2PreTrainedModel], name: Any, **options: Any) -> TFGPT2PreTrainedModel:
    """What `from_pretrained` of a class gives, on a device."""
    with tf.device(device):
        return model_class.from_pretrained(name, **options)
