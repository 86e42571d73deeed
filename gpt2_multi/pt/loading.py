"""Between PyTorch's parameters and the table: initialisation, from_pretrained, save_pretrained, resizing, pruning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from gpt2_multi.errors import InputError
from gpt2_multi.files import arguments
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model import checkpoint, inputs
from gpt2_multi.model.config import GPT2Config, check_config
from gpt2_multi.model.spelling import TORCH
from gpt2_multi.model.weights import Weight
from gpt2_multi.pt.attention import check_implementation
from gpt2_multi.pt.layers import SCALED, as_dtype, replace_parameter
from gpt2_multi.pt.parameters import filling, initialising, placement, saving
from gpt2_multi.pt.parameters.quantization import follow, unpacked_numel
from gpt2_multi.pt.state import (
    check_changeable,
    check_meshed,
    check_present,
    cut_again,
    is_callers,
    is_split,
    own_shapes,
    register_hooks,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class GPT2PreTrainedModel(nn.Module):
    """What every GPT-2 class shares: a configuration, and the way to and from files.

    A class of your own, on this one or on one with a head, has its GPT2Model as `transformer`, and what else it wants.
    """

    head: ClassVar[str]
    config_class: ClassVar[type[GPT2Config]] = GPT2Config
    base_model_prefix: ClassVar[str] = "transformer"
    main_input_name: ClassVar[str] = "input_ids"
    framework: ClassVar[str] = "pt"
    supports_gradient_checkpointing: ClassVar[bool] = True
    _tied_weights_keys: ClassVar[dict[str, str] | None] = None  # PEFT asks what follows an adapted embedding
    accepts_loss_kwargs: ClassVar[bool] = False  # what transformers' Trainer and accelerate ask a model
    loss_type: ClassVar[str | None] = None
    _no_split_modules: ClassVar[list[str]] = ["GPT2Block"]
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    generation_config: GenerationConfig | None = None  # of the classes that generate

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.head = getattr(cls, "head", "base")  # what else a caller's class has, the table does not know

    def __init__(self, config: GPT2Config, dtype: torch.dtype | str | None = None) -> None:
        super().__init__()
        self.config = check_config(config)
        register_hooks(self)
        self.compute_dtype = as_dtype("dtype", dtype)
        self.name_or_path = config.name_or_path
        self._input_hook: Any = None
        self.model_tags: list[str] = []
        self.warnings_issued: dict[str, bool] = {}  # Trainer and TRL note here what they have said

    @property
    def body(self) -> Any:
        """The bare model inside, in whatever wraps it."""
        inside = getattr(self, "transformer", self)
        if isinstance(inside, GPT2PreTrainedModel):
            return inside
        found = next((part for part in inside.modules() if isinstance(part, GPT2PreTrainedModel)), None)
        if found is None:
            raise InputError(f"transformer: expected a GPT2Model, or a wrapper of one, found {type(inside).__name__}")
        return found

    def _inside(self) -> dict[str, GPT2PreTrainedModel]:
        """The GPT-2s inside this one, by their paths: its body, and more in a class of a caller's."""
        return {path: part for path, part in self.named_modules() if path and isinstance(part, GPT2PreTrainedModel)}

    @property
    def base_model(self) -> Any:
        """The model without its head, as it stands there."""
        return getattr(self, "transformer", self)

    def get_decoder(self) -> Any:
        """The model without its head: all of a GPT-2 is a decoder."""
        return self.base_model

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Arguments of a call, of some ids that every vocabulary has, (3, 5)."""
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]])}

    @property
    def num_labels(self) -> int:
        """The number of classes of a classifier."""
        return self.config.num_labels

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed while it trains."""
        return self.body.gradient_checkpointing

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Note tags, which `model_tags` has."""
        new = [tags] if isinstance(tags, str) else tags
        self.model_tags += [tag for tag in new if tag not in self.model_tags]

    def enable_input_require_grads(self) -> None:
        """Let the embeddings have a gradient, so that one reaches adapters through blocks that are recomputed."""
        self.disable_input_require_grads()
        give = lambda module, given, output: output.requires_grad_(True)  # noqa: E731
        self._input_hook = self.get_input_embeddings().register_forward_hook(give)

    def disable_input_require_grads(self) -> None:
        """Let the embeddings be as they were."""
        if self._input_hook is not None:
            self._input_hook.remove()
            self._input_hook = None

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.body.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are; of those that accelerate has offloaded, where it computes with them."""
        first = next(self.parameters()).device
        place = getattr(getattr(self.body.wte, "_hf_hook", None), "execution_device", None)
        return first if first.type != "meta" or place is None else torch.device(place)

    building = initialising.building
    post_init = initialising.post_init
    init_weights = initialising.init_weights
    _init_weights = initialising._init_weights

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        check_present(self, "cast or moved")  # hooks know tensors by addresses, which others would have then
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.config.quantizer == "torchao":
            follow(self, fn)
        return found

    def parameter(self, weight: Weight) -> nn.Parameter:
        """The parameter that a row of the table is; nn.Linear stores kernels as (out, in)."""
        return self.get_parameter(TORCH.spell(weight, self.base_model is not self))

    @classmethod
    def from_config(
        cls,
        config: GPT2Config,
        *,
        dtype: torch.dtype | str | None = None,
        param_dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> Self:
        """A new model of a configuration; see `from_pretrained` for what else it takes."""
        dtype, stored = checkpoint.two_dtypes(config, dtype, param_dtype, torch_dtype, dtype)
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=stored, attn_implementation=attn_implementation or "sdpa")
        options = arguments.sort(options)[1]
        if is_callers(cls) and not kinds.keys() <= signature(cls).parameters.keys():
            model = cls(config, **options)
            model._compute_in(as_dtype("dtype", dtype), kinds["attn_implementation"])
            return model if stored is None else model.to(as_dtype("param_dtype", stored))
        return cls(config, **kinds, **options)

    _from_config = from_config

    @classmethod
    def can_generate(cls) -> bool:
        """Whether it has `generate`."""
        return hasattr(cls, "generate")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers its parameters are; a tied head counts once."""
        embeddings = {id(table.weight) for table in (self.body.wte, self.body.wpe)} if exclude_embeddings else set()
        counted = [p for p in self.parameters() if id(p) not in embeddings and (p.requires_grad or not only_trainable)]
        return sum(unpacked_numel(p) for p in counted)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """How many bytes its parameters are; a tied head counts once."""
        held = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(x.numel() * x.element_size() for x in held)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: Any = None,
        state_dict: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | str | None = None,
        param_dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        device_map: Any = None,
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        quantization: str | None = None,
        quantization_config: Any = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        mmap: bool = False,
        mesh: DeviceMesh | None = None,
        rules: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> Self:
        """Load a model folder, a file of weights, the demo model ("demo"), or a model of the hub; in evaluation mode.

        `dtype`, alone, is what the parameters are stored in and what the model computes in: float32 by default, "auto"
        for what config.json names. `param_dtype` (transformers' old `torch_dtype`) says it of the parameters, where the
        two are not the same. Parameters are contiguous, which copies the kernels; with `mmap` those that need no other
        dtype stay views of the mapped file, so that a program that only reads starts at once. `device_map` is a device
        for the whole model, or "auto" for the fastest; a dict of parts, or "auto" with `max_memory` by device, spreads
        it over several and a disk, where `offload_folder` is: see docs/large.md. `quantization="int8"` makes the model
        a quantized one, which files of a quantized model are without it: see docs/numerics.md. `quantization_config`
        has bitsandbytes or torchao quantize it: see docs/large.md. With a `mesh` and `rules` of
        `pt.parameters.sharding` the model is cut over the processes of the mesh, all of which call this: each reads its
        own part of each tensor from the mapped file.

        `options` say where the files are and which of them are read (`revision`, `token`, `cache_dir`,
        `local_files_only`, `subfolder`, `variant`, `use_safetensors` and so on), and change settings of the
        configuration: with fewer words or positions than the files have, the rows beyond are cut. `prefix` chooses one
        of several models in a file by what stands before its names, and `drop` are patterns of tensors that are no part
        of it. `config` stands in the place of the files' own: a GPT2Config, its keys, or where it lies. So does
        `state_dict` in that of their weights; with both the name may be None. A task head that the files lack, and with
        `ignore_mismatched_sizes` what has another shape, is initialised anew, with a warning. What a class of your own
        has besides is read where the files have it, and is else as its __init__ made it; arguments that are no settings
        go to that __init__. With `output_loading_info` the answer is a pair: the model, and what was missing,
        unexpected and mismatched. Raises CheckpointError or ConfigError for anything that does not fit, InputError for
        an argument that cannot be honoured, and TypeError for one that does not exist.
        """
        read: Any = checkpoint.load
        if state_dict is not None or pretrained_model_name_or_path is None:
            read = partial(checkpoint.load_state, filling.arrays_of(state_dict or {}))
        check_meshed(
            mesh, rules, device_map=device_map, max_memory=max_memory, quantization=quantization,
            quantization_config=quantization_config,
        )  # fmt: skip
        device, divided = placement.wanted(device_map, max_memory, devices())
        given, options = filling.constructors(cls, options)
        made: list[Self] = []

        def shapes(config: GPT2Config) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
            made.append(initialising.unfilled(cls, config, given))
            return own_shapes(made[0])

        programs = checkpoint.Programs(checkpoint.said_by(quantization_config))
        found = read(
            pretrained_model_name_or_path, cls.head, config, options, quantization=quantization, programs=programs,
            ignore_mismatched_sizes=ignore_mismatched_sizes, own=shapes if is_callers(cls) else None,
        )  # fmt: skip
        dtype, stored = checkpoint.two_dtypes(found.config, dtype, param_dtype, torch_dtype, dtype)
        stored = as_dtype("param_dtype", stored) or torch.get_default_dtype()
        model = made[0] if made else initialising.unfilled(cls, found.config, {})
        model._compute_in(as_dtype("dtype", dtype), attn_implementation or "sdpa")
        if isinstance(device_map, Mapping):
            placement.check_map(model, device_map)
        check_meshed(mesh, rules, quantization_config=found.said)
        if mesh is not None:
            from gpt2_multi.pt.parameters.sharding import shard

            model = shard(model, mesh, rules or {})
        if found.said is not None:
            device, divided = placement.of_quantized(device_map, max_memory, devices()), False
        filling.fill(model, found, stored, mmap or divided, device)
        if model.generation_config is not None:
            model.generation_config = GenerationConfig.of_folder(found.folder, found.config, found.chosen)
        if divided:
            model = placement.divide(model.eval(), device_map, max_memory, offload_folder, mmap)
        else:
            model = model.eval() if device is None else model.eval().to(device)
        return cast(Self, (model, found.info)) if output_loading_info else model

    def _compute_in(self, dtype: torch.dtype | None, attn_implementation: str) -> None:
        self.compute_dtype = self.body.compute_dtype = dtype
        self.set_attn_implementation(attn_implementation)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Write config.json and model.safetensors (shards and an index beyond `max_shard_size`) as transformers does.

        Without `safe_serialization` it is pytorch_model.bin. Only the main process writes; a `variant` such as "fp16"
        stands in the files' names. `state_dict` has the parameters where they are not the model's own, quantized as
        those are. Of a model whose parameters are split over processes, all of these call it, and the first writes.
        With `push_to_hub` the same is uploaded: `options` are those of `push_to_hub`.

        The model's files are replaced together, other files of the folder stay: see `files.folders.replaced`.
        Raises CheckpointError, and leaves what was there, where a tensor is not what the configuration says.
        """
        wanted = arguments.sort_saving("save_pretrained", options)
        cut_again(self)
        tensors = [*(self.parameters() if state_dict is None else state_dict.values())]
        if not is_main_process and not any(map(is_split, tensors)):
            return
        found = saving.written(self, state_dict)
        writes = is_main_process and not (any(map(is_split, self.parameters())) and torch.distributed.get_rank())
        config = self.config.replace(architectures=[type(self).__name__.removeprefix("FSDP")], dtype=found.dtype)
        kind = "safetensors" if safe_serialization else "pytorch"
        head = "base" if self.base_model is self else "lm"  # with the root, whatever head a class of a caller's has

        def write(made: saving.Written) -> None:
            how = max_shard_size, kind, variant, made.beside, made.said
            if writes:
                checkpoint.save(save_directory, config, self.generation_config, made.sources, head, *how)

        found.together(tensors, write)
        if writes and push_to_hub:
            self.push_to_hub(
                **{"repo_id": Path(save_directory).name, **wanted}, max_shard_size=max_shard_size,
                safe_serialization=safe_serialization, variant=variant,
            )  # fmt: skip

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a model of the hub, and return the commit's address.

        `options` are those of `save_pretrained` for the weights, and of `files.hub.push`.
        """
        return checkpoint.upload(self.save_pretrained, repo_id, options)

    def tie_weights(self) -> None:
        """Let the language-model head be the token embedding, where the configuration ties them."""
        if self.config.tie_word_embeddings and hasattr(self, "lm_head"):
            self.lm_head.weight = self.body.wte.weight
            if hasattr(self.body.wte, SCALED):
                self.lm_head.weight_scale = self.body.wte.weight_scale

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.body.wte

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Use another token embedding; a tied head follows, and so does `vocab_size`."""
        check_changeable(self, "given other embeddings")
        self.body.wte = embedding
        self.config.vocab_size = len(embedding.weight)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, or None."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, head: nn.Linear) -> None:
        """Use another language-model head; unless its weight is the token embedding, the two are tied no more."""
        check_changeable(self, "given another head")
        self.lm_head = head
        self.config.tie_word_embeddings = head.weight is self.body.wte.weight

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give the vocabulary `new_num_tokens` ids; each new row is the mean of the old ones (Hewitt 2021).

        Returns the token embedding. A mean keeps the logits of a new token from drowning the others; without
        `mean_resizing` a new row is random, as in a new model. The number is rounded up to `pad_to_multiple_of`.
        """
        number = inputs.new_vocabulary(new_num_tokens, self.config.vocab_size, pad_to_multiple_of)
        std = None if mean_resizing else self.config.initializer_range
        if number is not None:
            check_changeable(self, "resized")
            self.config.vocab_size = number
            replace_parameter(self.body.wte, "weight", _resized(self.body.wte.weight, number, std))
            self.body.wte.num_embeddings = number
            if hasattr(self, "lm_head"):
                replace_parameter(self.lm_head, "weight", _resized(self.lm_head.weight, number, std))
                self.lm_head.out_features = number
            self.tie_weights()
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute the activations of every n-th block in the backward pass instead of keeping them.

        `gradient_checkpointing_kwargs` are options of torch.utils.checkpoint.checkpoint. With `offload`, what goes into
        those blocks waits in the memory of the CPU.
        """
        inputs.check_size("every_n_layers", every_n_layers, 1)
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.body.gradient_checkpointing, self.body.every_n_layers = True, every_n_layers
        self.body.checkpointing_options = {**options, "offload": offload}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same under its name of transformers 5."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.body.gradient_checkpointing = False

    def activation_checkpointing_disable(self) -> None:
        """The same under its name of transformers 5."""
        self.gradient_checkpointing_disable()

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Compute attention by "sdpa" (PyTorch's fused kernels, the default), "eager" (plain matrix products), or
        "flash_attention_2" (the package flash-attn, in half precision on CUDA).

        What flash-attn lacks, masks of rank 4, one new token, and probabilities, is computed as by the others.
        """
        check_implementation(attn_implementation)
        self.body.attn_implementation = attn_implementation
        if self.config._attn_implementation != attn_implementation:  # a default leaves no trace
            self.config._attn_implementation = attn_implementation

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Cut attention heads away: {layer: heads}, numbered as in the whole model; `config.pruned_heads` has them."""
        check_changeable(self, "pruned", ("gpt2-multi", "bitsandbytes", "torchao"))
        self.config.pruned_heads = self.config.pruned(heads_to_prune)
        for layer, heads in heads_to_prune.items():
            self.body.attentions()[layer].prune(heads)


def _resized(rows: Tensor, number: int, std: float | None) -> Tensor:
    new = rows.mean(0, keepdim=True).repeat(max(number - len(rows), 0), 1)
    return torch.cat([rows[:number], new if std is None else new.normal_(std=std)])


def devices() -> list[str]:
    """Where PyTorch can compute, the fastest kind first."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    return [*(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())), "cpu"]


def dtypes(device: str) -> list[str]:
    """The floating-point dtypes that a device computes in."""
    wide = [] if device.startswith("mps") else ["float64"]  # Apple's GPUs have none
    return [*wide, "float32", "bfloat16", "float16"]


def load_on(device: str, model_class: type[GPT2PreTrainedModel], name: Any, **options: Any) -> GPT2PreTrainedModel:
    """What `from_pretrained` of a class gives, for a program that does not change it; a device_map says it of parts."""
    model = model_class.from_pretrained(name, mmap=True, **options)
    return model if options.get("device_map") is not None else model.to(device)
