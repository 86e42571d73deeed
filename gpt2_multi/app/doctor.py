"""Does this machine compute GPT-2 rightly? The demo model's logits per backend, device and dtype against the oracle."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.app import backends
from gpt2_multi.files import hub
from gpt2_multi.model import checkpoint
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.reference import oracle
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]

TEXT = "The quick brown fox jumps over the lazy dog, and 1,234 voices in the café said: it isn't so.\n"
PACKAGES = ("numpy", "safetensors", "huggingface-hub", "click", "rich")
# How far logits may be from the oracle's, relative to the greatest of them. A wrong kernel is off by far more.
BOUNDS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-2}


@dataclass(frozen=True)
class Finding:
    """What came out on one device in one dtype; `error` is None where there were no finite logits to compare."""

    backend: str
    device: str
    dtype: str
    error: float | None
    bound: float
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether the logits are right."""
        return self.problem is None


@dataclass(frozen=True)
class Report:
    """What `doctor` found: versions, devices, and a finding for each device and dtype of each backend."""

    versions: dict[str, str]
    devices: dict[str, list[str]]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether something was checked, and all of it was right."""
        return bool(self.findings) and all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        findings = [{**asdict(finding), "ok": finding.ok} for finding in self.findings]
        return {"ok": self.ok, "versions": self.versions, "devices": self.devices, "findings": findings}


def examine() -> Report:
    """Compute the demo model's logits with all that is installed here, and compare."""
    there = backends.installed()
    versions = {"python": platform.python_version(), **{name: _version(name) for name in ("gpt2-multi", *PACKAGES)}}
    versions |= {backends.BACKENDS[name].framework: backends.version(name) for name in there}
    adapters = {name: backends.load(name) for name in there}
    devices = {name: list(adapter.devices()) for name, adapter in adapters.items()}
    ids = known_ids(hub.DEMO)
    demo = checkpoint.open(hub.DEMO)
    expected = oracle(demo.config, demo, ids)[-1]
    findings = [
        finding for name in there for device in devices[name] for finding in _check(name, device, ids, expected)
    ]
    return Report(versions, devices, findings)


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


def _check(name: str, device: str, ids: Array, expected: Array) -> Iterator[Finding]:
    adapter = backends.load(name)
    for dtype in adapter.dtypes(device):
        try:
            found = adapter.logits(adapter.load(hub.DEMO, device, dtype), ids)
        except Exception as error:  # whatever a driver or a kernel may raise is what is looked for here
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Finding(name, device, dtype, None, BOUNDS[dtype], problem)
        else:
            yield _judge(name, device, dtype, found, expected)


def _judge(name: str, device: str, dtype: str, found: Array, expected: Array) -> Finding:
    bound = BOUNDS[dtype]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not math.isfinite(error):
        return Finding(name, device, dtype, None, bound, "the logits are not finite")
    return Finding(name, device, dtype, error, bound, None if error <= bound else "the logits are wrong")


def show(report: Report) -> None:
    """Print a report as tables."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120  # rich would take 80 for a pipe, and break sentences
    console = Console(highlight=False, width=width)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(versions, markup=False, soft_wrap=True)
    console.print(_table(report))


def _table(report: Report) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("backend", "device", "dtype", "relative error", "allowed", "result", box=box.SIMPLE)
    for finding in report.findings:
        error = "-" if finding.error is None else f"{finding.error:.1e}"
        result = Text("ok", "green") if finding.ok else Text(finding.problem or "", "red")
        table.add_row(finding.backend, finding.device, finding.dtype, error, f"{finding.bound:.0e}", result)
    return table
