"""What each option of `generate` may be, and which options of transformers are not here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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

# Options of transformers that change the text and are not here, and the value with which each changes nothing.
UNSUPPORTED = {
    "begin_suppress_tokens": None, "constraints": None, "diversity_penalty": 0.0, "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None, "force_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "guidance_scale": 1.0, "max_time": None, "num_beam_groups": 1, "penalty_alpha": None,
    "remove_invalid_values": False, "renormalize_logits": False, "sequence_bias": None, "suppress_tokens": None,
    "token_healing": False, "top_h": None, "typical_p": 1.0, "watermarking_config": None,
}  # fmt: skip

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
    "prompt_lookup_num_tokens": _none_or(_from(1)),
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
    "cache_implementation": Field(
        lambda v: v is None or (isinstance(v, str) and v in ("static", "dynamic")),
        '"static", "dynamic" or None',
    ),
    "return_dict_in_generate": TRUTH,
    "output_scores": TRUTH,
    "output_logits": TRUTH,
    "bos_token_id": _none_or(_from(0)),
    "eos_token_id": Field(lambda v: v is None or _ids(v), "an id, a list of ids, or None"),
    "pad_token_id": _none_or(_from(0)),
}
