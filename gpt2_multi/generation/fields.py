"""What each option of `generate` may be, and which options of transformers are not here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Python's own numbers for NumPy's, also within lists."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any, least: float = -1e30, most: float = 1e30) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _from(least: int, optional: bool = False) -> tuple[Callable[[Any], bool], str]:
    expected = f"a whole number from {least}" + (", or None" if optional else "")
    return lambda v: (optional and v is None) or (_whole(v) and least <= v < 2**63), expected


def _ids(value: Any) -> bool:
    return all(_whole(v) and 0 <= v < 2**63 for v in (value if isinstance(value, (list, tuple)) else [value]))


def _phrase(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and _ids(value)


def _list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(fits(v) for v in value)


def _biases(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all((_phrase(ids) or (_whole(ids) and _ids(ids))) and _bias(bias) for ids, bias in value.items())
    return _list_of(value, lambda pair: isinstance(pair, (list, tuple)) and len(pair) == 2 and _biased(*pair))


def _biased(ids: Any, bias: Any) -> bool:
    return _phrase(ids) and _bias(bias)


def _bias(value: Any) -> bool:
    return _real(value) or value == -math.inf


def _seed(value: Any) -> bool:
    return _whole(value) and 0 <= value < 2**64


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _one_of(*known: Any) -> tuple[Callable[[Any], bool], str]:
    *others, last = (f'"{value}"' if isinstance(value, str) else str(value) for value in known)
    return lambda v: any(type(v) is type(value) and v == value for value in known), f"{', '.join(others)} or {last}"


TRUTH = _one_of(True, False)
POSITIVE = (lambda v: _real(v) and v > 0, "a number above 0")

# Options of transformers that change the text and are not here, and the value with which each changes nothing.
UNSUPPORTED = {
    "begin_suppress_tokens": None, "constraints": None, "diversity_penalty": 0.0, "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None, "force_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "guidance_scale": 1.0, "max_time": None, "num_beam_groups": 1, "penalty_alpha": None,
    "remove_invalid_values": False, "renormalize_logits": False, "sequence_bias": None, "suppress_tokens": None,
    "token_healing": False, "top_h": None, "typical_p": 1.0, "watermarking_config": None,
}  # fmt: skip

# What each option may be: a test, and the words for it.
OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _from(0, optional=True),
    "max_length": _from(1, optional=True),
    "min_new_tokens": _from(0, optional=True),
    "min_length": _from(0),
    "do_sample": TRUTH,
    "temperature": (lambda v: _real(v) and v >= 1e-9, "a number from 1e-9 (for greedy choice: do_sample=False)"),
    "top_k": _from(0, optional=True),
    "top_p": (lambda v: _real(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "min_p": (lambda v: v is None or (_real(v) and 0 <= v <= 1), "a number from 0 to 1, or None"),
    "repetition_penalty": POSITIVE,
    "no_repeat_ngram_size": _from(0),
    "bad_words_ids": (
        lambda v: v is None or _list_of(v, _phrase),
        "a list of lists of ids, none of them empty, or None",
    ),
    "logit_bias": (
        lambda v: v is None or _biases(v),
        "a mapping from ids (or tuples of ids) to numbers up to 1e30, or a list of (ids, number) pairs, or None",
    ),
    "num_beams": _from(1),
    "num_return_sequences": _from(1),
    "length_penalty": (lambda v: _real(v, -10, 10), "a number from -10 to 10"),
    "early_stopping": (
        lambda v: isinstance(v, bool) or (isinstance(v, str) and v == "never"),
        'True, False or "never"',
    ),
    "prompt_lookup_num_tokens": _from(1, optional=True),
    "max_matching_ngram_size": _from(1),
    "sliding_window": TRUTH,
    "seed": (
        lambda v: v is None or _seed(v) or (_list_of(v, _seed) and len(v) > 0),
        "a whole number from 0 to 2**64 - 1, a list of them, or None",
    ),
    "stop_strings": (
        lambda v: v is None or _text(v) or _list_of(v, _text),
        "a text, a list of texts, none of them empty, or None",
    ),
    "cache_implementation": (
        lambda v: v is None or (isinstance(v, str) and v in ("static", "dynamic")),
        '"static", "dynamic" or None',
    ),
    "return_dict_in_generate": TRUTH,
    "output_scores": TRUTH,
    "output_logits": TRUTH,
    "bos_token_id": _from(0, optional=True),
    "eos_token_id": (lambda v: v is None or _ids(v), "an id, a list of ids, or None"),
    "pad_token_id": _from(0, optional=True),
}
