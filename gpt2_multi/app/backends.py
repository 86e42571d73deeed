"""The frameworks that can carry a model: a row of the table for each, and none is imported before it is used.

The language models of the three have the same calls (`generate`, `stream`, `score`); a row says what is not the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.errors import GPT2Error, InputError

Array = np.ndarray[Any, Any]
# What the frameworks call it when there is no more memory, as a class or in words.
MEMORY = ("OutOfMemoryError", "MemoryError", "ResourceExhaustedError")
NO_MEMORY = ("RESOURCE_EXHAUSTED", "not enough memory", "can't allocate memory", "out of memory")


@dataclass(frozen=True)
class Backend:
    """A framework: its name for people, the module that it is imported as, the package here, its language model.

    to_tensor: from a model and ids in NumPy, the ids as the model takes them. to_numpy: what it gives, in NumPy.
    one_text: options of `generate` and `stream` with which a single text is there soonest. threads: of a model, within
    which a thread that steps it again and again uses no more cores than are worth it.
    """

    title: str
    framework: str
    package: str
    language_model: str
    to_tensor: Callable[[Any, Array], Any] = lambda model, ids: ids
    to_numpy: Callable[[Any], Array] = np.asarray
    one_text: Mapping[str, Any] = field(default_factory=dict)
    threads: Callable[[Any], AbstractContextManager[None]] = nullcontext

    @property
    def loading(self) -> Any:
        """The package's module `loading`, which knows the devices."""
        return importlib.import_module(f"{self.package}.loading")

    def devices(self) -> list[str]:
        """Where the framework can compute, the fastest kind first, the CPU last."""
        return list(self.loading.devices())

    def dtypes(self, device: str) -> list[str]:
        """The floating-point dtypes that a device computes in."""
        return list(self.loading.dtypes(device))

    def load(self, folder: Path, device: str, dtype: str = "float32", **options: Any) -> Any:
        """The language model in a folder, on a device; `options` are those of its `from_pretrained`."""
        model_class = getattr(importlib.import_module(self.package), self.language_model)
        return self.loading.load_on(device, model_class, folder, param_dtype=dtype, **options)

    def slots(self, model: Any, count: int) -> Any:
        """Places for `count` texts that come and go, see `pt.generation.slots.Slots`."""
        return importlib.import_module(f"{self.package}.generation.slots").Slots(model, count)

    def device(self, name: str | None = None) -> str:
        """A device by its name, or the first of its kind, or the fastest; InputError for one that is not there."""
        there = self.devices()
        found = [device for device in there if name in (None, device, device.partition(":")[0])]
        if not found:
            raise InputError(f"device: {self.title} has {', '.join(there)} here, found {name!r}; choose one of these")
        return found[0]

    def log_probs(self, model: Any, ids: Array, mask: Array) -> tuple[Array, Array]:
        """Of each id but the first its log-probability, and whether none is likelier: (B, T) -> (B, T - 1) of both."""
        generate = importlib.import_module(f"{self.package}.generation.generate")
        found: tuple[Array, Array] = generate.log_probs(model, ids, mask)
        return found

    def layers(self, model: Any, ids: Array) -> list[Array]:
        """What `reference.oracle` gives, of a model: what goes into each layer, what the last norm gives, the logits.

        ids: (B, T). The arrays are (B, T, E), the logits (B, T, V), all in float64.
        """
        output = model(self.to_tensor(model, ids), output_hidden_states=True, return_dict=True)
        return [self.to_numpy(x).astype(np.float64) for x in (*output.hidden_states, output.logits)]


def _to_torch(model: Any, ids: Array) -> Any:
    from gpt2_multi.pt.layers import to_torch

    return to_torch(ids).to(model.device)


def _threads_of_torch(model: Any) -> AbstractContextManager[None]:
    from gpt2_multi.pt.generation.slots import worthwhile_threads

    return worthwhile_threads(model)


def _from_torch(tensor: Any) -> Array:
    from gpt2_multi.pt.layers import to_numpy

    return to_numpy(tensor)


BACKENDS = {
    "pt": Backend(
        "PyTorch", "torch", "gpt2_multi.pt", "GPT2LMHeadModel", _to_torch, _from_torch, threads=_threads_of_torch
    ),
    "tf": Backend(  # XLA compiles for longer than it takes to write a text
        "TensorFlow", "tensorflow", "gpt2_multi.tf", "TFGPT2LMHeadModel", one_text={"jit_compile": False}
    ),
    "flax": Backend("JAX", "jax", "gpt2_multi.flax", "FlaxGPT2LMHeadModel"),
}


def installed() -> list[str]:
    """The backends whose framework is installed, in the order of the table; none is imported to find out."""
    return [name for name, row in BACKENDS.items() if importlib.util.find_spec(row.framework)]


def version(name: str) -> str:
    """The version of a backend's framework, which has to be installed."""
    return importlib.metadata.version(BACKENDS[name].framework)


def of(model: Any) -> Backend:
    """The backend of a model; GPT2Error for what is none of ours."""
    modules = [base.__module__ for base in type(model).__mro__]
    for row in BACKENDS.values():
        if any(module.startswith(f"{row.package}.") for module in modules):
            return row
    raise GPT2Error(f"model: expected one of this library, found {type(model).__name__}; load it by from_pretrained")


def resolve(name: str | None = None) -> Backend:
    """The backend of a name, by default the first that is installed; GPT2Error where its framework is missing."""
    there = installed()
    name = name or next(iter(there), None)
    if name is None:
        ways = " or ".join(f'pip install "gpt2-multi[{other}]" ({row.title})' for other, row in BACKENDS.items())
        raise GPT2Error(f"no framework is installed; to compute with a model: {ways}")
    if name not in BACKENDS:
        raise GPT2Error(f"backend: expected one of {', '.join(BACKENDS)}, found {name!r}")
    if name not in there:
        raise GPT2Error(f'{BACKENDS[name].title} is not installed: pip install "gpt2-multi[{name}]"')
    return BACKENDS[name]


def lacks_memory(error: BaseException) -> bool:
    """Whether this is what a framework raises when there is no more memory."""
    return type(error).__name__ in MEMORY or any(said in str(error) for said in NO_MEMORY)


def name_of(backend: Backend) -> str:
    """The name of a backend."""
    return next(name for name, row in BACKENDS.items() if row is backend)
