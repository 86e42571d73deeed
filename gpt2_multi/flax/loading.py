"""Between Flax's parameters and the table: the drop-in classes, from_pretrained, save_pretrained, resizing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gpt2_multi.errors import InputError
from gpt2_multi.files import arguments
from gpt2_multi.flax.attention import KVCache, as_cache
from gpt2_multi.flax.layers import (
    as_array,
    as_dtype,
    as_flag,
    check_key,
    check_remat,
    facts,
    input_names,
    interceptors,
    is_concrete,
    is_traced,
    stock,
)
from gpt2_multi.flax.parameters import casting
from gpt2_multi.flax.parameters.axes import automatic
from gpt2_multi.flax.parameters.sharding import param_shardings
from gpt2_multi.flax.parameters.tree import (
    Tree,
    check_alive,
    check_tree,
    dtypes_of,
    initial,
    leaves,
    placed,
    pruned,
    resized,
    rows_of,
)
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model import checkpoint, inputs
from gpt2_multi.model.checkpoint.quantized import check_not_quantized, in_int8, quantize
from gpt2_multi.model.config import GPT2Config, check_config
from gpt2_multi.model.weights import table

# Which a call is compiled for.
FLAGS = ("train", "output_attentions", "output_hidden_states", "logits_to_keep", "skip_logits")


class FlaxGPT2PreTrainedModel:
    """What every GPT-2 class shares: a configuration, a linen module, its parameters, and the way to and from files.

    `dtype` is what it computes in, `param_dtype` what it stores; both may be names, and `dtype` is the other by
    default. `seed` decides the first parameters. With `_do_init=False` the model holds none, and each call is given
    them. `remat` is the name of a policy of `jax.checkpoint_policies`, `scan_layers` stacks the layers' parameters.
    """

    head: ClassVar[str]
    module_class: ClassVar[type[nn.Module]]
    base_model_prefix: ClassVar[str] = "transformer"
    main_input_name: ClassVar[str] = "input_ids"
    framework: ClassVar[str] = "flax"
    generation_config: GenerationConfig | None = None  # of the classes that generate
    _compiled: tuple[Any, Callable[..., Any]] | None = None

    def __init__(
        self,
        config: GPT2Config,
        input_shape: tuple[int, int] = (1, 1),
        seed: int = 0,
        dtype: Any = None,
        _do_init: bool = True,
        *,
        param_dtype: Any = jnp.float32,
        remat: str | None = None,
        scan_layers: bool = False,
    ) -> None:
        self.config, self.scan_layers = check_config(config), scan_layers
        self.name_or_path = config.name_or_path
        self.param_dtype = as_dtype("param_dtype", param_dtype)
        self.dtype = as_dtype("dtype", dtype) or self.param_dtype
        check_remat(remat)
        self.module: Any = self.module_class(self.config, self.dtype, self.param_dtype, remat, scan_layers)
        self.input_shape, self.key = input_shape, jax.random.key(seed)
        self._params = self.init_weights(self.key) if _do_init else None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.module.remat is not None

    @property
    def compiled(self) -> Callable[..., Any]:
        """What a call runs, of the model as it is now."""
        settings, found = self.settings(), self._compiled
        if found is None or found[0] != settings:
            applied = partial(self.module.apply)  # a new one each time: JAX keeps what it traced of equal functions
            found = self._compiled = (settings, jax.jit(applied, static_argnames=FLAGS))
        return found[1]

    def settings(self) -> tuple[Any, ...]:
        """What compiled functions depend on besides their arguments: they are made anew where it is not the same."""
        calls = type(self.module).__call__, type(self).__call__, *stock(), *interceptors()
        return repr(self.config), self.module, *calls

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled, which belongs to this object: a copy compiles its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_compiled", "_decoders")}

    def init_weights(self, rng: Array, input_shape: tuple[int, int] = (1, 1), params: Tree | None = None) -> Tree:
        """First parameters, as the table says; those that `params` has are kept."""
        tree = flatten_dict(initial(self.config, self.head, self.scan_layers, rng, self.param_dtype))
        whole = unflatten_dict({**tree, **flatten_dict(params or {})})
        check_tree(whole, self.config, self.head, self.scan_layers)
        return whole

    @property
    def params(self) -> Tree:
        """The parameters, as a nested dict."""
        if self._params is None:
            raise InputError(
                "params: this model was made with _do_init=False and holds none; give each call `params=`, or make "
                "them by init_weights(rng)"
            )
        return self._params

    @params.setter
    def params(self, params: Tree) -> None:
        check_tree(params, self.config, self.head, self.scan_layers)
        self._params = params

    @property
    def params_shape_tree(self) -> Tree:
        """The tree of shapes and dtypes."""
        found = leaves(self.config, self.head, self.scan_layers)
        kinds = {path: leaf.dtype(self.param_dtype) for path, leaf in found.items()}
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, kinds[path]) for path, leaf in found.items()}
        return unflatten_dict(shapes)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        params: Tree | None = None,
        past_key_values: Any = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """What the linen module gives, whose `__call__` says what the inputs are; `inputs` are its further ones.

        The call is compiled, once for each shape and each configuration; where methods of linen are intercepted, it
        runs operation by operation. `past_key_values` comes from `init_cache`, or from a call, or is a (key, value)
        pair for each layer; then the call returns pairs, which are longer, and compiles anew for them. Raises
        InputError for an id outside the vocabulary, a position beyond `n_positions`, shapes that do not fit, and
        `train` without `dropout_rng`; TypeError for an unknown input.
        """
        config, given = self.config, {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values, **others,
        }  # fmt: skip
        flags: dict[str, Any] = {name: given.pop(name) for name in ("logits_to_keep", "skip_logits") if name in given}
        inputs.check_kept(flags.get("logits_to_keep", 0))
        wanted = {"train": train, "output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        flags |= {name: as_flag(name, getattr(config, name) if x is None else x) for name, x in wanted.items()}
        arrays = self._arrays(given, flags)
        if flags["train"] and dropout_rng is None:
            raise InputError("dropout_rng: train=True draws dropout; give a key, such as jax.random.key(0)")
        if dropout_rng is not None:
            check_key("dropout_rng", dropout_rng)
        params = self.fitting(params)
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        if "labels" in arrays and "skip_logits" in input_names(self.module) and not is_traced((arrays, params)):
            flags.setdefault("skip_logits", False)  # all that is computed is given
        apply = self.module.apply if interceptors() else self.compiled
        output = apply({"params": params}, **arrays, **flags, rngs=rngs)
        output.unpacks = any(name in others for name in inputs.OLD_NAMES)
        if "past_key_values" in arrays and not isinstance(given.get("past", past_key_values), KVCache):
            output.past_key_values = output.past_key_values.pairs
        return output if (config.use_return_dict if return_dict is None else return_dict) else output.to_tuple()

    def fitting(self, params: Tree | None) -> Tree:
        """The parameters, the model's own or those given, which have to fit the configuration and to be there yet."""
        params = self.params if params is None else params
        check_tree(params, self.config, self.head, self.scan_layers)
        check_alive("params", params)
        return params

    def _arrays(self, given: Mapping[str, Any], flags: Iterable[str]) -> dict[str, Any]:
        given = inputs.renamed(call := f"{type(self).__name__}()", given)
        past = given.pop("past_key_values", None)
        arrays = {name: as_array(name, x) for name, x in given.items() if x is not None}
        if past is not None:
            arrays["past_key_values"] = as_cache(past, length_of(arrays), self.scan_layers)
        inputs.check_names(call, [*arrays, *flags], input_names(self.module))
        cache: Any = arrays.get("past_key_values")
        mask = arrays.get("attention_mask")
        if isinstance(cache, KVCache) and mask is not None and mask.ndim and mask.shape[-1] < cache.capacity:
            room = cache.capacity - mask.shape[-1]  # of tokens to come, which no query sees yet
            pad: Any = np.pad if is_concrete(mask) else jnp.pad  # NumPy compiles nothing while the mask grows
            arrays["attention_mask"] = jnp.asarray(pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, room)]))
        self.check(arrays)
        return arrays

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Look at what a call was given, before it is compiled: all has to fit the configuration and the others."""
        config, cache = self.config, arrays.get("past_key_values")
        found = {name: facts(x) for name, x in arrays.items() if x is not cache}
        batch, length = inputs.check_source(config, found).shape[:2]
        past = 0 if cache is None else self._check_cache(cache, batch, length)
        keys = length if cache is None else cache.capacity
        inputs.check_call(config, found, (config.vocab_size, config.n_positions), past, keys)

    def _check_cache(self, cache: KVCache, batch: int | None, length: int | None) -> int | None:
        """The tokens in a cache, which comes from `init_cache`, for as many rows, and has room for the new ones."""
        layers, stacked = self.config.n_layer, self.scan_layers
        if not isinstance(cache, KVCache) or len(cache) != layers or cache.stacked != stacked:
            raise InputError(
                f"past_key_values: expected a cache of {layers} layers from init_cache(batch_size, max_length) of "
                f"this model{' with scan_layers' if stacked else ''}, or what a call made of it, or a (key, value) "
                f"pair for each layer, found {type(cache).__name__}"
            )
        check_alive("past_key_values", cache)
        key = (cache.layers if cache.stacked else cache.layers[0])[0]
        inputs.check_cache(key.shape[-4], str(key.dtype), batch, str(jnp.dtype(self.dtype)))
        past = int(cache.length) if is_concrete(cache.length) else None
        inputs.check_room(length, past, cache.capacity)
        return past

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens of `batch_size` rows, in the dtype that it computes in."""
        inputs.check_size("batch_size", batch_size)
        inputs.check_size("max_length", max_length)
        inputs.check_positions(0, max_length - 1, self.config.n_positions)
        return KVCache.empty(self.config, batch_size, max_length, self.dtype, self.scan_layers)

    @classmethod
    def from_config(cls, config: GPT2Config, **options: Any) -> Self:
        """A new model of a configuration; `options` are of the constructor."""
        return cls(config, **arguments.sort(options)[1])

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has `generate`."""
        return hasattr(cls, "generate")

    def num_parameters(self) -> int:
        """How many numbers its parameters are; a tied head counts once."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params_shape_tree))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: Any = None,
        *,
        config: Any = None,
        param_dtype: Any = None,
        torch_dtype: Any = None,
        seed: int = 0,
        remat: str | None = None,
        scan_layers: bool = False,
        mesh: Mesh | None = None,
        rules: Mapping[str, str | None] | None = None,
        _do_init: bool = True,
        quantization: str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Load a model folder, a file of weights, the demo model ("demo"), or a model of the hub by its name.

        `param_dtype` (transformers' `torch_dtype`) is what the parameters are stored in: float32 by default, "auto" for
        what config.json names. `dtype` is what the model computes in, by default the same. With a `mesh` and `rules`
        (named axis -> mesh axis; see `sharding`) each shard is placed directly. With `_do_init=False` it returns the
        model and its parameters. `quantization="int8"` makes the model a quantized one, which files of a quantized
        model are without it: see docs/numerics.md.

        `options` say where the files are and which of them are read (`revision`, `token`, `cache_dir`,
        `local_files_only`, `subfolder`, `variant`, `use_safetensors` and so on), and change settings of the
        configuration: with fewer words or positions than the files have, the rows beyond are cut. `prefix` chooses one
        of several models in a file by what stands before its names, and `drop` are patterns of tensors that are no part
        of it. `config` stands in the place of the files' own: a GPT2Config, its keys, or where it lies. A task
        head that the files lack, and with `ignore_mismatched_sizes` what has another shape, is initialised anew, with a
        warning. With `output_loading_info` the answer has one more: what was missing, unexpected and mismatched. Raises
        CheckpointError or ConfigError for anything that does not fit, InputError for an argument that cannot be
        honoured, and TypeError for one that does not exist.
        """
        if rules and mesh is None:
            raise InputError("rules: expected a mesh beside them, found none; sharding.make_mesh makes one")
        found = checkpoint.load(
            pretrained_model_name_or_path, cls.head, config, options, quantization=quantization,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )  # fmt: skip
        dtype, stored = checkpoint.two_dtypes(found.config, dtype, param_dtype, torch_dtype)
        sizes: dict[str, Any] = {"seed": seed, "remat": remat, "scan_layers": scan_layers}
        model = cls(found.config, dtype=dtype, param_dtype=stored or "float32", _do_init=False, **sizes)
        params = model._assign({**found.arrays, **found.quantized}, mesh, rules or {})
        if model.generation_config is not None:
            model.generation_config = GenerationConfig.of_folder(found.folder, found.config, found.chosen)
        if _do_init:
            model.params = params
        answer = [model, *([] if _do_init else [params]), *([found.info] if output_loading_info else [])]
        return tuple(answer) if len(answer) > 1 else model

    def _assign(self, arrays: dict[str, Any], mesh: Mesh | None, rules: Mapping[str, str | None]) -> Tree:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(self.key)))
        for row in table(self.config, self.head):
            if row.name not in arrays:
                first = rng.normal(row.constant if not row.std else 0, row.std, row.shape)
                arrays[row.name] = quantize(row, first) if in_int8(self.config, row) else first
        shape: dict[str, Any] = {"head": self.head, "scan_layers": self.scan_layers}
        shardings = {} if mesh is None else flatten_dict(param_shardings(self.config, mesh, rules, **shape))
        return unflatten_dict(
            {
                path: placed(leaf, lambda row: arrays[row.name], leaf.dtype(self.param_dtype), shardings.get(path))
                for path, leaf in leaves(self.config, **shape).items()
            }
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        params: Tree | None = None,
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Write config.json and model.safetensors (shards and an index beyond `max_shard_size`) as transformers does.

        Without `safe_serialization` it is flax_model.msgpack. Only the main process writes; a `variant` such as "fp16"
        stands in the files' names. With `push_to_hub` the same is uploaded: `options` are those of `push_to_hub`.

        The parameters are gathered one after the other. On several hosts each has to call it, and the first one writes.
        The model's files are replaced together, other files of the folder stay: see `files.folders.replaced`. Raises
        CheckpointError, and leaves what was there, where a tensor is not what the configuration says.
        """
        wanted = arguments.sort_saving("save_pretrained", options)
        params = self.fitting(params)
        rows = rows_of(params, self.config, self.head, self.scan_layers)
        dtypes = dtypes_of(params, self.config, self.head, self.scan_layers)
        dtype = dtypes["wpe.weight"]
        config = self.config.replace(architectures=[type(self).__name__.removeprefix("Flax")], dtype=str(dtype))
        sources = [(row, dtypes[row.name], rows[row.name]) for row in table(config, self.head)]
        if jax.process_index() == 0 and is_main_process:
            kind = "safetensors" if safe_serialization else "flax-msgpack"
            checkpoint.save(
                save_directory, config, self.generation_config, sources, self.head, max_shard_size, kind, variant
            )
        else:
            for _, _, gather in sources:
                gather()
        if jax.process_count() > 1 and any(isinstance(x, Array) for x in jax.tree.leaves(params)):
            multihost_utils.sync_global_devices("saved")  # of NumPy's arrays the others need not know
        if push_to_hub:
            self.push_to_hub(
                **{"repo_id": Path(save_directory).name, **wanted}, params=params, max_shard_size=max_shard_size,
                safe_serialization=safe_serialization, variant=variant,
            )  # fmt: skip

    def push_to_hub(self, repo_id: str, params: Tree | None = None, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a model of the hub, and return the commit's address.

        `options` are those of `save_pretrained` for the weights, and of `files.hub.push`.
        """
        return checkpoint.upload(partial(self.save_pretrained, params=params), repo_id, options)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        params: Tree | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Tree:
        """Give the vocabulary `new_num_tokens` ids; each new row is the mean of the old ones (Hewitt 2021).

        Returns the parameters, the model's own or those given, so changed; a model that holds parameters holds these
        from now on. A mean keeps the logits of a new token from drowning the others; without `mean_resizing` a new row
        is random, as in a new model. The number is rounded up to `pad_to_multiple_of`.
        """
        params = self.fitting(params)
        number = inputs.new_vocabulary(new_num_tokens, self.config.vocab_size, pad_to_multiple_of)
        if number is None:
            return params
        found, flat = leaves(self.config, self.head, self.scan_layers), flatten_dict(params)
        check_not_quantized(self.config, type(self).__name__, "resized")
        config = self.config.replace(vocab_size=number)  # refuses what no vocabulary can have
        std = None if mean_resizing else self.config.initializer_range
        params = unflatten_dict(
            {
                path: automatic(resized, None, flat[path], leaf.axes, number, std, self.key)
                for path, leaf in found.items()
            }
        )
        return self._changed(config, params)

    def _changed(self, config: GPT2Config, params: Tree) -> Tree:
        """Go on with other sizes, in a configuration of its own: other models may share the one that it had."""
        self.config, self.module = config, self.module.clone(config=config)
        if self._params is not None:
            self.params = params
        return params

    def gradient_checkpointing_enable(self, policy: str = "nothing_saveable") -> None:
        """Compute in the backward pass again what a policy of `jax.checkpoint_policies` does not save of each block."""
        check_remat(policy)
        self.module = self.module.clone(remat=policy)

    enable_gradient_checkpointing = gradient_checkpointing_enable  # transformers' name, for Flax

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.module = self.module.clone(remat=None)

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]], params: Tree | None = None) -> Tree:
        """Cut attention heads away: {layer: heads}, numbered as in the whole model; `config.pruned_heads` has them.

        Returns the parameters, the model's own or those given, so cut; a model that holds parameters holds these from
        now on.
        """
        params = self.fitting(params)
        check_not_quantized(self.config, type(self).__name__, "pruned")
        config = self.config.replace(pruned_heads=self.config.pruned(heads_to_prune))
        found, flat = leaves(config, self.head, self.scan_layers), flatten_dict(params)
        kept = [[self.config.heads(i).index(head) for head in config.heads(i)] for i in range(config.n_layer)]
        params = unflatten_dict({path: automatic(pruned, None, flat[path], leaf, kept) for path, leaf in found.items()})
        return self._changed(config, params)

    to_bf16 = casting.to_bf16
    to_fp16 = casting.to_fp16
    to_fp32 = casting.to_fp32


def length_of(arrays: Mapping[str, Any]) -> int:
    """How many tokens a call reads: T of ids (..., T), or of embeddings (..., T, E)."""
    shapes = (arrays[name].shape for name in ("input_ids", "inputs_embeds") if name in arrays)
    shape = next(shapes, ())[: None if "input_ids" in arrays else -1]
    return shape[-1] if shape else 0


def devices() -> list[str]:
    """Where JAX can compute, the fastest kind first."""
    fast = [f"{device.platform}:{i}" for i, device in enumerate(jax.devices()) if device.platform != "cpu"]
    return [*fast, "cpu"]


def dtypes(device: str) -> list[str]:
    """The floating-point dtypes that a device computes in; float64 where the process has switched it on."""
    wide = jax.config.jax_enable_x64 and not device.startswith("tpu")  # type: ignore[attr-defined]
    return [*(["float64"] if wide else []), "float32", "bfloat16", "float16"]


def load_on(device: str, model_class: type[FlaxGPT2PreTrainedModel], name: Any, **options: Any) -> Any:
    """What `from_pretrained` of a class gives, on a device."""
    kind, _, number = device.partition(":")
    with jax.default_device(jax.devices(kind)[int(number or 0)]):
        return model_class.from_pretrained(name, **options)
