"""The frameworks that can carry a model, behind one set of calls: what the command line and `doctor` see of them.

A row of the table names a framework and the package here that is written in it. That package's module `adapter` takes
and gives NumPy arrays, so that nothing outside it has to know the framework.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from gpt2_multi.errors import GPT2Error
from gpt2_multi.generation.config import GenerationConfig

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]


class Backend(NamedTuple):
    """A framework: its name for people, the module that it is imported as, and the package here."""

    title: str
    framework: str
    package: str


BACKENDS = {
    "pt": Backend("PyTorch", "torch", "gpt2_multi.pt"),
    "tf": Backend("TensorFlow", "tensorflow", "gpt2_multi.tf"),
    "flax": Backend("JAX", "jax", "gpt2_multi.flax"),
}


class Adapter(Protocol):
    """The calls that each package's `adapter` module has."""

    def devices(self) -> Sequence[str]:
        """Where the framework can compute, the fastest kind first."""

    def dtypes(self, device: str) -> Sequence[str]:
        """The floating-point dtypes that a device computes in."""

    def load(self, folder: Path, device: str, dtype: str = "float32") -> Any:
        """The language model in a folder, on a device."""

    def logits(self, model: Any, ids: Array) -> Array:
        """The logits (B, T, V), in float64, of ids (B, T)."""

    def hidden_states(self, model: Any, ids: Array) -> list[Array]:
        """What goes into each layer and what the last norm gives, (B, T, E) each, in float64, of ids (B, T)."""

    def stream(
        self, model: Any, ids: Array, config: GenerationConfig, tokenizer: GPT2Tokenizer | None = None
    ) -> Iterator[Array]:
        """New ids, one column (B * num_return_sequences,) at a time, that continue ids (B, T)."""

    def stream_text(self, model: Any, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig) -> Iterator[str]:
        """What continues a text, piece by piece."""

    def generate_texts(self, model: Any, text: str, tokenizer: GPT2Tokenizer, config: GenerationConfig) -> list[str]:
        """A text with what continues it, as often as `config` says."""


def installed() -> list[str]:
    """The backends whose framework is installed, in the order of the table; none is imported to find out."""
    return [name for name, row in BACKENDS.items() if importlib.util.find_spec(row.framework)]


def version(name: str) -> str:
    """The version of a backend's framework, which has to be installed."""
    return importlib.metadata.version(BACKENDS[name].framework)


def load(name: str | None = None) -> Adapter:
    """The adapter of a backend, by default of the first that is installed; GPT2Error where its framework is missing."""
    there = installed()
    name = name or next(iter(there), None)
    if name is None:
        ways = " or ".join(f'pip install "gpt2-multi[{other}]" ({row.title})' for other, row in BACKENDS.items())
        raise GPT2Error(f"no framework is installed; to compute with a model: {ways}")
    if name not in BACKENDS:
        raise GPT2Error(f"backend: expected one of {', '.join(BACKENDS)}, found {name!r}")
    if name not in there:
        raise GPT2Error(f'{BACKENDS[name].title} is not installed: pip install "gpt2-multi[{name}]"')
    return cast(Adapter, importlib.import_module(f"{BACKENDS[name].package}.adapter"))
