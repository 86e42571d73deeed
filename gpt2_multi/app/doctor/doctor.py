"""Does this machine compute GPT-2 rightly? The demo model's logits per backend, device and dtype against the oracle."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.app import backends
from gpt2_multi.app.doctor.comparison import BOUNDS, Array, Comparison, compare, failure, table
from gpt2_multi.app.terminal import console
from gpt2_multi.files import hub
from gpt2_multi.model import checkpoint
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.reference import oracle
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and 1,234 voices in the café said: it isn't so.\n"
PACKAGES = ("numpy", "safetensors", "huggingface-hub", "click", "rich")


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found: versions, devices, and a comparison for each device and dtype of each backend."""

    versions: dict[str, str]
    devices: dict[str, list[str]]
    findings: list[Comparison]

    @property
    def ok(self) -> bool:
        """Whether something was checked, and all of it was right."""
        return bool(self.findings) and all(finding.ok for finding in self.findings)

    @property
    def wrong(self) -> list[str]:
        """Where something is wrong."""
        return ["{backend} on {device} in {dtype}".format(**each.labels) for each in self.findings if not each.ok]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"ok": self.ok, "versions": self.versions, "devices": self.devices, "findings": findings}


def examine() -> Diagnosis:
    """Compute the demo model's logits with all that is installed here, and compare."""
    there = backends.installed()
    versions = {"python": platform.python_version(), **{name: _version(name) for name in ("gpt2-multi", *PACKAGES)}}
    versions |= {backends.BACKENDS[name].framework: backends.version(name) for name in there}
    devices = {name: backends.resolve(name).devices() for name in there}
    ids = known_ids(hub.DEMO)
    demo = checkpoint.open(hub.DEMO)
    logits = oracle(demo.config, demo, ids)[-1]
    findings = [each for name in there for device in devices[name] for each in _compared(name, device, ids, logits)]
    return Diagnosis(versions, devices, findings)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def known_ids(folder: Path) -> Array:
    """The ids (1, T) of the text that is computed, as far as the model can read."""
    config = GPT2Config.from_pretrained(folder)
    ids = GPT2Tokenizer.from_pretrained(folder)(TEXT).input_ids
    return np.array([ids[: config.n_positions]], dtype=np.int64)


def _compared(name: str, device: str, ids: Array, logits: Array) -> Iterator[Comparison]:
    backend = backends.resolve(name)
    for dtype in backend.dtypes(device):
        labels = {"backend": name, "device": device, "dtype": dtype}
        try:
            found = backend.layers(backend.load(hub.DEMO, device, dtype), ids)[-1]
        except Exception as error:  # whatever a driver or a kernel may raise is what is looked for here
            yield failure(labels, BOUNDS[dtype], f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            yield compare(labels, logits, found, BOUNDS[dtype], "logits")


def show(diagnosis: Diagnosis) -> None:
    """Print it as tables."""
    versions = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items())
    console().print(versions, markup=False, soft_wrap=True)
    console().print(table(diagnosis.findings))
