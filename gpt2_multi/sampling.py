"""The specification of generation: its options, its noise, and its rules on logits, in NumPy.

Each backend carries these rules out on its own tensors and is held to the functions here. A sample is the argmax of
logits + Gumbel noise (Maddison et al. 2014), and the noise comes from a counter: threefry2x32 with 20 rounds (Salmon
et al. 2011) under the key `seed + row` at (step, token). It needs no state, is the same in every framework, and a row's
text depends neither on the other rows nor on how they are batched.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from gpt2_multi.checkpoint import read_json, write_json
from gpt2_multi.config import GPT2Config
from gpt2_multi.errors import InputError

Array = np.ndarray[Any, Any]
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


@dataclass
class GenerationConfig:
    """The options of `generate`, with the defaults of transformers 4.57.

    Without `max_new_tokens` and `max_length` (prompt included), 20 new tokens are made. `top_k` 0 and `top_p` 1.0 are
    off; `top_k` is 50 unless it is set. `seed` plus the row's number decides every sample. Ids in `eos_token_id` end a
    row, which is then filled with `pad_token_id` (the end token where that is None).
    Raises InputError for a value that cannot be used and TypeError for an unknown option.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    seed: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # keys of a file that are not options here

    def __post_init__(self) -> None:
        for name, (fits, expected) in OPTIONS.items():
            if not fits(getattr(self, name)):
                raise InputError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        if self.num_return_sequences > 1 and not self.do_sample:
            raise InputError("num_return_sequences: greedy choice gives one text only; set do_sample=True, or 1")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens: none, one or several."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, (list, tuple)) else (self.eos_token_id,)  # type: ignore[return-value]

    @property
    def fill_token_id(self) -> int:
        """What a finished row is filled with."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    def with_options(self, options: dict[str, Any]) -> Self:
        """A copy with these options changed; TypeError, with the nearest name, for one that does not exist."""
        known = [f.name for f in fields(self) if f.name != "extra"]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise TypeError(f"generate() has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return replace(self, **options)

    def total_length(self, prompt: int) -> int:
        """How long the longest row may become from a prompt of this length, in tokens."""
        if self.max_new_tokens is None and self.max_length is not None:
            if self.max_length <= prompt:
                raise InputError(f"max_length: {self.max_length} leaves no room after {prompt} prompt tokens; raise it")
            return self.max_length
        return prompt + (20 if self.max_new_tokens is None else self.max_new_tokens)

    def longest_minimum(self) -> int:
        """From this step on no row is too short to end, however much of the prompt is padding."""
        return max(self.min_length, self.min_new_tokens or 0)

    @classmethod
    def of(cls, config: GPT2Config) -> Self:
        """The defaults, with the special tokens of a model."""
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(**{name: token for name, token in tokens.items() if token != -1})  # as old files say "none"

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], config: GPT2Config) -> Self:
        """Read generation_config.json; what it leaves open is taken from the model's configuration."""
        path = Path(folder) / "generation_config.json"
        keys = read_json(path) if path.exists() else {}
        known = {f.name for f in fields(cls)} - {"extra"}
        given = {name: value for name, value in keys.items() if name in known and value is not None}
        extra = {name: value for name, value in keys.items() if name not in known}
        ignored = [name for name, value in extra.items() if name in NOT_YET and value not in (None, False, 1, 1.0, [])]
        if ignored:
            warnings.warn(f"{path}: {', '.join(ignored)} is not an option here, and is ignored", stacklevel=3)
        try:
            return replace(cls.of(config), **given, extra=extra)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write generation_config.json: what differs from the defaults, and the keys that a file brought."""
        default = GenerationConfig()
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        keys = {name: value for name, value in own.items() if value != getattr(default, name)}
        write_json(Path(folder) / "generation_config.json", {**self.extra, **keys})


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _from(least: int, optional: bool = False) -> tuple[Callable[[Any], bool], str]:
    expected = f"a whole number from {least}" + (", or None" if optional else "")
    return lambda v: (optional and v is None) or (_whole(v) and v >= least), expected


def _ids(value: Any) -> bool:
    return all(_whole(v) and v >= 0 for v in (value if isinstance(value, (list, tuple)) else [value]))


# Options of transformers that change the text, and that would be missed where a file has them.
NOT_YET = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "min_p", "num_beam_groups", "num_beams", "penalty_alpha", "sequence_bias",
    "stop_strings", "suppress_tokens", "typical_p",
)  # fmt: skip


# What each option may be: a test, and the words for it.
OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _from(0, optional=True),
    "max_length": _from(1, optional=True),
    "min_new_tokens": _from(0, optional=True),
    "min_length": _from(0),
    "do_sample": (lambda v: isinstance(v, bool), "True or False"),
    "temperature": (lambda v: _real(v) and v >= 1e-9, "a number from 1e-9 (for greedy choice: do_sample=False)"),
    "top_k": _from(0, optional=True),
    "top_p": (lambda v: _real(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "repetition_penalty": (lambda v: _real(v) and v > 0, "a number above 0"),
    "no_repeat_ngram_size": _from(0),
    "num_return_sequences": _from(1),
    "seed": (lambda v: _whole(v) and 0 <= v < 2**64, "a whole number from 0 to 2**64 - 1"),
    "bos_token_id": _from(0, optional=True),
    "eos_token_id": (lambda v: v is None or _ids(v), "an id, a list of ids, or None"),
    "pad_token_id": _from(0, optional=True),
}


def bucket(length: int) -> int:
    """The length that is compiled for this one: a multiple of 16, and of a quarter of the power of two below it."""
    size = 1 << (length - 1).bit_length() - 3 if length > 64 else 16
    return max(-(-length // size), 1) * size


def threefry2x32(key: tuple[int, int], counter: tuple[Any, Any]) -> tuple[Array, Array]:
    """The 20-round threefry2x32 of Salmon et al. 2011: two 32-bit words from a two-word key and a two-word counter."""
    keys = [np.uint32(word) for word in (key[0], key[1], key[0] ^ key[1] ^ PARITY)]
    with np.errstate(over="ignore"):
        x0, x1 = (np.asarray(word, np.uint32) + keys[i] for i, word in enumerate(counter))
        for group in range(5):
            for rotation in ROTATIONS[group % 2]:
                x0 = x0 + x1
                x1 = x0 ^ (x1 << np.uint32(rotation) | x1 >> np.uint32(32 - rotation))
            x0 = x0 + keys[(group + 1) % 3]
            x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def uniform(seed: int, row: int, step: int, tokens: Array) -> Array:
    """The uniform numbers of one row's step, for these token ids: float64 in (0, 1), exact in float32 too."""
    stream = (seed + row) % 2**64
    x0, _ = threefry2x32((stream & 0xFFFFFFFF, stream >> 32), (np.uint32(step), tokens))
    return np.asarray(((x0 >> np.uint32(9)) + 0.5) * 2.0**-23)


def gumbel(seed: int, row: int, step: int, tokens: Array) -> Array:
    """Gumbel noise: argmax(logits + noise) is a sample of softmax(logits)."""
    return np.asarray(-np.log(-np.log(uniform(seed, row, step, tokens))))


def penalise(logits: Array, ids: Array, penalty: float) -> Array:
    """Make each distinct id of a row less likely (Keskar et al. 2019, section 4.1): (V,) logits, (T,) unmasked ids."""
    out, seen = logits.copy(), np.unique(ids)
    out[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return out


def ban_repeats(logits: Array, ids: Array, size: int) -> Array:
    """Rule out every token that would repeat an n-gram of the row's unmasked ids: (V,) logits, (T,) ids."""
    out, prefix = logits.copy(), tuple(ids[len(ids) - size + 1 :])
    for start in range(len(ids) - size + 1):
        if tuple(ids[start : start + size - 1]) == prefix:
            out[ids[start + size - 1]] = -np.inf
    return out


def keep_top_k(logits: Array, k: int) -> Array:
    """Keep the k greatest logits, and what ties with the k-th."""
    k = min(k, logits.shape[-1])
    return np.where(logits < np.sort(logits, axis=-1)[..., -k, None], -np.inf, logits)


def keep_top_p(logits: Array, p: float) -> Array:
    """Keep the fewest most likely tokens that reach probability p (Holtzman et al. 2020), at least one; low ids."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    probs = np.exp(np.take_along_axis(logits, order, -1) - logits.max(-1, keepdims=True))
    probs = probs / probs.sum(-1, keepdims=True)
    dropped = np.zeros(logits.shape, bool)
    np.put_along_axis(dropped, order, np.cumsum(probs, -1) - probs >= p, -1)
    return np.where(dropped, -np.inf, logits)
