"""Between PyTorch's parameters and the table: initialisation, from_pretrained, save_pretrained, resizing, pruning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files.folders import replaced
from gpt2_multi.files.hub import resolve
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.checkpoint import is_model_file, read_config, read_weights, write_weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import TORCH, Weight, table

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NUMPY = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: _BFLOAT16,
}


def as_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by itself or by its name, such as "bfloat16"; None stays None."""
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in _NUMPY:
        raise InputError(f"{name}: expected float64, float32, float16 or bfloat16, found {dtype!r}")
    return found


def to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor on the array's memory, bfloat16 included."""
    if array.dtype == _BFLOAT16:  # which torch.from_numpy does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """An array with the tensor's values, bfloat16 included, on its memory where that is the CPU's."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


class GPT2PreTrainedModel(nn.Module):
    """What every GPT-2 class shares: a configuration, and the way to and from files."""

    head: ClassVar[str]
    generation_config: GenerationConfig | None = None  # of the classes that generate

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        given: object = config  # transformers has a class of the same name
        if not isinstance(given, GPT2Config):
            raise InputError(
                f"config: expected gpt2_multi.GPT2Config, found {type(given).__module__}.{type(given).__name__}; "
                "GPT2Config.from_dict(config.to_dict()) makes one"
            )
        self.config = config

    @property
    def body(self) -> Any:
        """The bare model inside."""
        return getattr(self, "transformer", self)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.body.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @contextmanager
    def building(self, param_dtype: torch.dtype | str | None) -> Iterator[None]:
        """Make parameters without memory, then allocate each once, in `param_dtype`, and initialise it by the table."""
        device = torch.get_default_device()
        with torch.device("meta"):
            yield
        self.to(dtype=as_dtype("param_dtype", param_dtype))
        if device.type != "meta":
            self._materialise(device)

    @torch.no_grad()
    def _materialise(self, device: torch.device) -> None:
        for module in self.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
        for weight in table(self.config, self.head):
            initialise(weight, self.parameter(weight))

    def parameter(self, weight: Weight) -> nn.Parameter:
        """The parameter that a row of the table is; nn.Linear stores kernels as (out, in)."""
        return self.get_parameter(TORCH.spell(weight, self.head != "base"))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str | None = None,
        param_dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str = "sdpa",
        **overrides: Any,
    ) -> Self:
        """Load a model folder, the demo model ("demo"), or a model of the hub by its name; in evaluation mode.

        `param_dtype` (transformers' `torch_dtype`) is what the parameters are stored in: float32 by default, "auto" for
        what config.json names. `dtype` is what the model computes in, by default the same. float32 files are not read
        but mapped into memory. `overrides` change settings of the configuration. A task head that the files lack is
        initialised anew, with a warning. Raises CheckpointError or ConfigError for anything that does not fit.
        """
        folder = resolve(
            name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        config = read_config(folder, **overrides)
        stored = torch_dtype if param_dtype is None else param_dtype
        stored = as_dtype("param_dtype", config.dtype if stored == "auto" else stored) or torch.get_default_dtype()
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=stored, attn_implementation=attn_implementation)
        with torch.device("meta"):
            model = cls(config, **options)
        model._assign(read_weights(folder, config, cls.head), stored, str(folder))
        if model.generation_config is not None:
            model.generation_config = GenerationConfig.from_pretrained(folder, config)
        return model.eval()

    def _assign(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtype: torch.dtype, source: str) -> None:
        tensors, fresh = {}, []
        for weight in table(self.config, self.head):
            if weight.name in arrays:
                tensor = TORCH.layout(weight, to_torch(arrays[weight.name]).to(dtype))
            else:
                tensor = initialise(weight, torch.empty(weight.shape, dtype=dtype, device="cpu"))
                fresh.append(weight.name)
            tensors[TORCH.spell(weight, self.head != "base")] = tensor
        if fresh:
            names = " and ".join(fresh)
            warnings.warn(f"{source} has no {names}: initialised anew; train the model before you use it", stacklevel=3)
        self.load_state_dict(tensors, strict=False, assign=True)  # every row is there; a tied lm_head is not
        self.tie_weights()

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and model.safetensors (shards and an index beyond `max_shard_size`) as transformers does.

        The model's files are replaced together, other files of the folder stay: see `files.folders.replaced`.
        Raises CheckpointError, and leaves what was there, where a tensor is not what the configuration says.
        """
        self._check_tie()
        config = self.config.replace(
            architectures=[type(self).__name__], dtype=str(self.parameter(table(self.config, self.head)[0]).dtype)
        )
        with replaced(folder, is_model_file) as stage:
            config.save_pretrained(stage)
            if self.generation_config is not None:
                self.generation_config.save_pretrained(stage)
            write_weights(stage, map(self._source, table(config, self.head)), self.head, max_shard_size=max_shard_size)

    def _check_tie(self) -> None:
        if not self.config.tie_word_embeddings or not hasattr(self, "lm_head"):
            return
        head, embedding = self.lm_head.weight, self.body.wte.weight
        if head is not embedding and not torch.equal(head, embedding):
            raise CheckpointError(
                "lm_head.weight differs from wte.weight although config.tie_word_embeddings is true, and a file would "
                "lose it; set tie_word_embeddings to False, or call tie_weights()"
            )

    def _source(self, weight: Weight) -> Any:
        parameter = self.parameter(weight)
        return weight, _NUMPY[parameter.dtype], lambda: TORCH.layout(weight, to_numpy(parameter))

    def tie_weights(self) -> None:
        """Let the language-model head be the token embedding, where the configuration ties them."""
        if self.config.tie_word_embeddings and hasattr(self, "lm_head"):
            self.lm_head.weight = self.body.wte.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.body.wte

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Use another token embedding; a tied head follows, and so does `vocab_size`."""
        self.body.wte = embedding
        self.config.vocab_size = embedding.num_embeddings
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, or None."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, head: nn.Linear) -> None:
        """Use another language-model head; unless its weight is the token embedding, the two are tied no more."""
        self.lm_head = head
        self.config.tie_word_embeddings = head.weight is self.body.wte.weight

    @torch.no_grad()
    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Give the vocabulary `new_num_tokens` ids; each new row is the mean of the old ones (Hewitt 2021).

        Returns the token embedding. A mean keeps the logits of a new token from drowning the others.
        """
        if new_num_tokens is not None:
            self.config.vocab_size = new_num_tokens
            replace_parameter(self.body.wte, "weight", _resized(self.body.wte.weight, new_num_tokens))
            self.body.wte.num_embeddings = new_num_tokens
            if hasattr(self, "lm_head"):
                replace_parameter(self.lm_head, "weight", _resized(self.lm_head.weight, new_num_tokens))
                self.lm_head.out_features = new_num_tokens
            self.tie_weights()
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them.

        `gradient_checkpointing_kwargs` are options of torch.utils.checkpoint.checkpoint.
        """
        self.body.gradient_checkpointing = True
        self.body.checkpointing_options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.body.gradient_checkpointing = False

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Compute attention by "sdpa" (PyTorch's fused kernels, the default) or "eager" (plain matrix products)."""
        if attn_implementation not in ("sdpa", "eager"):
            raise InputError(f'attn_implementation: expected "sdpa" or "eager", found {attn_implementation!r}')
        self.body.attn_implementation = attn_implementation

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Cut attention heads away: {layer: heads}, numbered as in the whole model; `config.pruned_heads` has them."""
        gone = {layer: set(heads) for layer, heads in self.config.pruned_heads.items()}
        for layer, heads in heads_to_prune.items():
            gone[layer] = gone.get(layer, set()) | set(heads)
        self.config.pruned_heads = {layer: sorted(heads) for layer, heads in gone.items() if heads}
        for layer, heads in heads_to_prune.items():
            self.body.h[layer].attn.prune(heads)


def initialise(weight: Weight, tensor: Tensor) -> Tensor:
    """Fill a new tensor as the table says."""
    return tensor.normal_(std=weight.std) if weight.std else tensor.fill_(weight.constant)


def _resized(rows: Tensor, number: int) -> Tensor:
    extra = max(number - len(rows), 0)
    return torch.cat([rows[:number], rows.mean(0, keepdim=True).expand(extra, -1)])


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter another value and shape; a frozen one stays frozen."""
    setattr(module, name, nn.Parameter(value, getattr(module, name).requires_grad))


def load_tf_weights_in_gpt2(
    model: GPT2PreTrainedModel, path: Any, gpt2_checkpoint_path: str | os.PathLike[str] | None = None
) -> GPT2PreTrainedModel:
    """Fill a model from OpenAI's TensorFlow checkpoint, a prefix or a folder; TensorFlow is not needed.

    The old function of transformers. It was given a configuration before the path: of three arguments the second is not
    looked at, since the model's own configuration counts. Raises CheckpointError for what does not fit.
    """
    where = os.fspath(path if gpt2_checkpoint_path is None else gpt2_checkpoint_path)
    arrays = read_weights(where, model.config, model.head)
    model._assign(arrays, next(model.parameters()).dtype, where)
    return model


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
    """What `from_pretrained` of a class gives, on a device."""
    return model_class.from_pretrained(name, **options).to(device)
