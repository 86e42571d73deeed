"""What each option of `generate` may be, and what becomes of those of transformers that are not here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpt2_multi.errors import InputError
from gpt2_multi.model.fields import Field, is_real, is_whole, optional


def plain(value: Any) -> Any:
    """Python's own numbers for NumPy's, also within lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def _real(value: Any) -> bool:
    return is_real(value, -1e30, 1e30)


def _from(least: int) -> Field:
    return Field(lambda v: is_whole(v, least, 2**63 - 1), f"a whole number from {least}")


def _none_or(field: Field) -> Field:
    return optional(field, ", or None")


def _ids(value: Any) -> bool:
    return all(is_whole(v, 0, 2**63 - 1) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _phrase(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and _ids(value)


def _list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(fits(v) for v in value)


def _biases(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all((_phrase(ids) or (is_whole(ids) and _ids(ids))) and _bias(bias) for ids, bias in value.items())
    return _list_of(value, lambda pair: isinstance(pair, (list, tuple)) and len(pair) == 2 and _biased(*pair))


def _biased(ids: Any, bias: Any) -> bool:
    return _phrase(ids) and _bias(bias)


def _bias(value: Any) -> bool:
    return _real(value) or value == -math.inf


def _seed(value: Any) -> bool:
    return is_whole(value, 0, 2**64 - 1)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


TRUTH = Field(lambda v: isinstance(v, bool), "True or False")

# Options of transformers that change the text and are not here: the value with which each changes nothing, and what
# to do instead.
_ON_LOGITS = "give a logits_processor that does it"
UNSUPPORTED: Mapping[str, tuple[Any, str]] = {
    "assistant_early_exit": (None, "give an assistant_model of fewer layers"),
    "assistant_tokenizer": (None, "give an assistant_model of the same vocabulary"),
    "begin_suppress_tokens": (None, _ON_LOGITS),
    "constraints": (None, "give a prefix_allowed_tokens_fn or a logits_processor"),
    "custom_generate": (None, "call that function instead"),
    "diversity_penalty": (0.0, "use num_beams with do_sample=True"),
    "dola_layers": (None, _ON_LOGITS),
    "encoder_no_repeat_ngram_size": (0, _ON_LOGITS),
    "encoder_repetition_penalty": (1.0, _ON_LOGITS),
    "epsilon_cutoff": (0.0, "use min_p"),
    "eta_cutoff": (0.0, "use typical_p or min_p"),
    "exponential_decay_length_penalty": (None, _ON_LOGITS),
    "force_words_ids": (None, "give a prefix_allowed_tokens_fn or a logits_processor"),
    "forced_bos_token_id": (None, "give a prefix_allowed_tokens_fn"),
    "forced_eos_token_id": (None, "append it"),
    "num_beam_groups": (1, "use num_beams with do_sample=True"),
    "penalty_alpha": (None, "use do_sample=True with top_k, or repetition_penalty"),
    "prng_key": (None, "give a seed, which is a number"),
    "remove_invalid_values": (False, _ON_LOGITS),
    "renormalize_logits": (False, _ON_LOGITS),
    "token_healing": (False, "leave a space at a prompt's end out"),
    "top_h": (None, "use min_p"),
    "watermarking_config": (None, _ON_LOGITS),
}
# Options of transformers that say how, and not what: with any value the text is the same.
WITHOUT_EFFECT = {
    "assistant_confidence_threshold", "assistant_lookbehind", "cache_config", "compile_config", "disable_compile",
    "is_assistant", "logits_to_keep", "low_memory", "num_assistant_tokens_schedule", "prefill_chunk_size",
    "return_legacy_cache", "synced_gpus", "target_lookbehind", "trace", "transformers_version", "trust_remote_code",
    "use_cache", "use_model_defaults",
}  # fmt: skip
# Arguments of a model's call that `generate` has none of, and why.
OF_CALLS = {
    "labels": "generate() computes no loss; leave it out, or call the model itself",
    "position_ids": "generate() counts positions by attention_mask; leave it out",
}
RENAMED = ("sequence_bias", "suppress_tokens")  # options of transformers that have another name here

# What each option may be: in the language of model/fields.py.
OPTIONS: Mapping[str, Field] = {
    "max_new_tokens": _none_or(_from(0)),
    "max_length": _none_or(_from(1)),
    "min_new_tokens": _none_or(_from(0)),
    "min_length": _from(0),
    "do_sample": TRUTH,
    "temperature": Field(lambda v: _real(v) and v >= 1e-9, "a number from 1e-9 (for greedy choice: do_sample=False)"),
    "top_k": _none_or(_from(0)),
    "top_p": Field(lambda v: _real(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "min_p": _none_or(Field(lambda v: is_real(v, 0, 1), "a number from 0 to 1")),
    "typical_p": _none_or(Field(lambda v: _real(v) and 0 < v <= 1, "a number above 0, up to 1")),
    "repetition_penalty": Field(lambda v: _real(v) and v > 0, "a number above 0"),
    "no_repeat_ngram_size": _from(0),
    "bad_words_ids": _none_or(Field(lambda v: _list_of(v, _phrase), "a list of lists of ids, none of them empty")),
    "logit_bias": Field(
        lambda v: v is None or _biases(v),
        "a mapping from ids (or tuples of ids) to numbers up to 1e30, or a list of (ids, number) pairs, or None",
    ),
    "num_beams": _from(1),
    "num_return_sequences": _from(1),
    "length_penalty": Field(lambda v: is_real(v, -10, 10), "a number from -10 to 10"),
    "early_stopping": Field(
        lambda v: isinstance(v, bool) or (isinstance(v, str) and v == "never"),
        'True, False or "never"',
    ),
    "guidance_scale": _none_or(Field(lambda v: _real(v) and v > 0, "a number above 0")),
    "prompt_lookup_num_tokens": _none_or(_from(1)),
    "num_assistant_tokens": _from(1),
    "max_matching_ngram_size": _from(1),
    "sliding_window": TRUTH,
    "seed": Field(
        lambda v: v is None or _seed(v) or (_list_of(v, _seed) and len(v) > 0),
        "a whole number from 0 to 2**64 - 1, a list of them, or None",
    ),
    "stop_strings": Field(
        lambda v: v is None or _text(v) or _list_of(v, _text),
        "a text, a list of texts, none of them empty, or None",
    ),
    "max_time": _none_or(Field(lambda v: _real(v) and v >= 0, "a number of seconds from 0")),
    "cache_implementation": Field(
        lambda v: v is None or (isinstance(v, str) and v in ("static", "dynamic")),
        '"static", "dynamic" or None',
    ),
    "return_dict_in_generate": TRUTH,
    "output_scores": TRUTH,
    "output_logits": TRUTH,
    "output_hidden_states": TRUTH,
    "output_attentions": TRUTH,
    "bos_token_id": _none_or(_from(0)),
    "eos_token_id": Field(lambda v: v is None or _ids(v), "an id, a list of ids, or None"),
    "pad_token_id": _none_or(_from(0)),
}

IDLE = {**dict.fromkeys(WITHOUT_EFFECT), **{name: idle for name, (idle, _) in UNSUPPORTED.items()}}
NAMES = {*OPTIONS, *RENAMED, *IDLE}  # what a caller may say


def is_unsupported(name: str, value: Any) -> bool:
    """Whether an option of transformers that is not here would change something."""
    return name in UNSUPPORTED and value is not None and value != UNSUPPORTED[name][0]


def supported(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those of transformers that change nothing; InputError for one that would, and is not here."""
    for name, value in options.items():
        if is_unsupported(name, value):
            raise InputError(f"{name}: is not an option here; leave it out, and {UNSUPPORTED[name][1]}")
    return {name: value for name, value in options.items() if name not in WITHOUT_EFFECT and name not in UNSUPPORTED}


def renamed(options: Mapping[str, Any], bad_words: Any = None) -> dict[str, Any]:
    """Options under the names that they have here, where `bad_words` are ruled out already."""
    own = {name: value for name, value in options.items() if name not in RENAMED}
    bias, gone = (options.get(name) for name in RENAMED)
    if bias is not None and own.get("logit_bias") is not None:
        raise InputError("sequence_bias: is another name of logit_bias; give one of the two")
    if bias is not None:
        own["logit_bias"] = bias
    if gone is not None:
        if not _list_of(gone, lambda token: is_whole(token, 0)):
            raise InputError(f"suppress_tokens: expected a list of ids, or None, found {gone!r}")
        own["bad_words_ids"] = [*(own.get("bad_words_ids", bad_words) or ()), *([int(token)] for token in gone)]
    return own
