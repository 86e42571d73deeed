"""A language for what a field may hold, which the options of generation speak too, and the configuration's fields."""

from __future__ import annotations

import copy
import math
import numbers
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from gpt2_multi.errors import ConfigError, InputError, shortened

ACTIVATIONS = {  # the spellings of a file, and the function that each names
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "tanh": "tanh", "gelu_new": "tanh_gelu",
    "gelu_fast": "tanh_gelu", "gelu_pytorch_tanh": "tanh_gelu", "quick_gelu": "quick_gelu",
}  # fmt: skip
SUMMARY_TYPES = ("last", "first", "mean", "cls_index")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# What configurations of transformers hold besides, of no meaning for the model: it is kept, and written back.
ELSEWHERE = frozenset({
    "_attn_implementation", "_commit_hash", "_name_or_path", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "classifier_dropout", "cls_token_id",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_ids", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "is_encoder_decoder",
    "length_penalty", "loss_type", "mask_token_id", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_past", "output_scores", "predict_special_tokens",
    "prefix", "quantization_config", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "transformers_version", "typical_p", "use_bfloat16",
})  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32", "float64")


def wrong(name: str, expected: str, found: object) -> ConfigError:
    """The error of a field that holds the wrong thing."""
    return ConfigError(f"{shortened(name)} must be {expected}; found {shortened(repr(found))}")


def _same(_: str, value: Any) -> Any:
    return value


class Field(NamedTuple):
    """What a field may hold: a test, the words for it, and how a value is kept, which may find more that is wrong."""

    fits: Callable[[Any], bool]
    words: str
    keep: Callable[[str, Any], Any] = _same

    def __call__(self, name: str, value: Any) -> Any:
        """The value as it is kept; ConfigError where it does not fit."""
        if not self.fits(value):
            raise wrong(name, self.words, value)
        return self.keep(name, value)


def is_whole(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether this is an integer between these, NumPy's too; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and least <= int(value) <= most


def is_real(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether this is a finite number between these, NumPy's too; a bool is none."""
    try:
        fits = isinstance(value, numbers.Real) and math.isfinite(value) and least <= float(value) <= most
    except OverflowError:  # a whole number beyond every float
        return False
    return fits and not isinstance(value, bool)


def one_of(choices: Collection[str]) -> Field:
    """One of these texts."""
    return Field(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


def optional(field: Field, words: str = "") -> Field:
    """What a field may hold, or None; `words` are added for it."""
    return Field(
        lambda value: value is None or field.fits(value),
        field.words + words,
        lambda name, value: None if value is None else field.keep(name, value),
    )


def float_name(name: str, dtype: Any) -> str:
    """The name of a floating-point dtype of any framework, given by itself or by its name."""
    found = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", str(dtype)))
    if (found := str(found).removeprefix("torch.")) not in DTYPES:
        raise InputError(f"{name}: expected float64, float32, float16 or bfloat16, found {dtype!r}")
    return found


def _size(name: str, value: Any) -> int:
    if value < 1:
        raise wrong(name, "at least 1", value)
    if value >= 1 << 63:
        raise wrong(name, "a size that a tensor can have", value)
    return int(value)


def _end_tokens(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [INTEGER(f"{name}[{i}]", token) for i, token in enumerate(value)]
    return INTEGER(name, value)


def _key(name: str, key: Any) -> int:
    """An integer key, which JSON can only spell as a string."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        return int(key)
    return int(INTEGER(f"a key of {name}", key))


def _id2label(name: str, value: Any) -> dict[int, str]:
    if not value:
        raise wrong(name, "a mapping from each class number to its label, with at least one", value)
    STRINGS(f"the labels of {name}", list(value.values()))
    return {_key(name, key): label for key, label in value.items()}


def _label2id(name: str, value: Any) -> dict[str, int]:
    STRINGS(f"the keys of {name}", list(value))
    return {label: INTEGER(f"{name}[{label!r}]", i) for label, i in value.items()}


def _pruned_heads(name: str, value: Any) -> dict[int, list[int]]:
    pruned = {}
    for layer, heads in value.items():
        if not isinstance(heads, (list, tuple, set)):
            raise wrong(f"{name}[{layer!r}]", "a list of heads", heads)
        pruned[_key(name, layer)] = sorted({INTEGER(f"{name}[{layer!r}]", head) for head in heads})
    return pruned


def _extra(name: str, value: Any) -> dict[str, Any]:
    STRINGS(f"the keys of {name}", list(value))
    return copy.deepcopy(dict(value))


def _number(words: str, fits: Callable[[float], bool]) -> Field:
    keep = lambda _, value: value if isinstance(value, int) else float(value)  # noqa: E731
    return Field(lambda value: is_real(value) and fits(value), words, keep)


def _mapping(keep: Callable[[str, Any], Any]) -> Field:
    return Field(lambda value: isinstance(value, Mapping), "a mapping", keep)


def _anything(keep: Callable[[str, Any], Any]) -> Field:
    return Field(lambda _: True, "", keep)


def _are_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


INTEGER = Field(is_whole, "an integer", lambda _, value: int(value))
COUNT = Field(is_whole, "an integer", _size)
FLAG = Field(lambda value: isinstance(value, bool), "true or false")
STRINGS = Field(_are_strings, "a list of strings", lambda _, value: list(value))
_DTYPE = _anything(lambda name, value: one_of(DTYPES)(name, str(value).removeprefix("torch.")))  # NumPy's by their text

FIELDS: dict[str, Field] = {
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), COUNT),
    "n_inner": optional(COUNT),
    "activation_function": one_of(ACTIVATIONS),
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"),
        _number("a probability, 0 <= p < 1", lambda p: 0 <= p < 1),
    ),
    "layer_norm_epsilon": _number("a positive number", lambda x: x > 0),
    "initializer_range": _number("a number from 0 up", lambda x: x >= 0),
    "summary_type": one_of(SUMMARY_TYPES),
    "summary_activation": optional(one_of(ACTIVATIONS)),
    **dict.fromkeys(
        (
            "summary_use_proj", "summary_proj_to_labels", "scale_attn_weights", "use_cache",
            "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention", "is_decoder",
            "tie_word_embeddings", "output_hidden_states", "output_attentions", "return_dict", "torchscript",
        ),
        FLAG,
    ),
    # Special ids may lie outside the vocabulary: a small model often keeps the default 50256. Who uses one checks it.
    **dict.fromkeys(("bos_token_id", "pad_token_id"), optional(INTEGER)),
    "eos_token_id": optional(_anything(_end_tokens)),
    "id2label": _mapping(_id2label),
    "label2id": _mapping(_label2id),
    "problem_type": optional(one_of(PROBLEM_TYPES)),
    "pruned_heads": _mapping(_pruned_heads),
    "architectures": optional(STRINGS),
    "dtype": optional(_DTYPE),
    "extra": _mapping(_extra),
    "from_file": _anything(lambda _, value: frozenset(value)),
    "name_or_path": Field(
        lambda value: isinstance(value, (str, os.PathLike)), "a name or a path", lambda _, value: os.fspath(value)
    ),
}  # fmt: skip


def check_together(values: Mapping[str, Any]) -> None:
    """Check what no field can tell alone."""
    n_embd, n_head, n_layer = values["n_embd"], values["n_head"], values["n_layer"]
    if n_embd % n_head:
        raise ConfigError(
            f"n_embd must be a multiple of n_head; found n_embd {n_embd} and n_head {n_head} "
            "(to change both at once: config.replace(n_embd=..., n_head=...))"
        )
    for layer, heads in values["pruned_heads"].items():
        if layer not in range(n_layer) or any(head not in range(n_head) for head in heads):
            raise wrong("pruned_heads", f"heads 0 to {n_head - 1} of layers 0 to {n_layer - 1}", {layer: heads})
        if len(heads) == n_head:
            raise ConfigError(f"pruned_heads must leave each layer a head; found all {n_head} of layer {layer}")
