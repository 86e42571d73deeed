"""What importing costs: the core loads no framework, and each framework's package none of the others."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gpt2_multi

FRAMEWORKS = frozenset({"torch", "tensorflow", "keras", "jax", "flax", "transformers"})
MAY_LOAD = {
    "pt": {"torch"},
    "tf": {"tensorflow", "keras"},
    "flax": {"jax", "flax"},
}  # and so may the engine that trains with each
OPTIONAL = {"gpt2_multi.app.evaluate.harness"}  # which lm_eval imports
if not importlib.util.find_spec("starlette"):  # of the extra `serve`
    OPTIONAL |= {f"gpt2_multi.app.serve.{name}" for name in ("api", "guards", "server")}


def modules() -> list[str]:
    """Every module of the installed package, found by walking it; running `__main__` is not importing it."""
    found = pkgutil.walk_packages(gpt2_multi.__path__, "gpt2_multi.", onerror=lambda name: None)
    return ["gpt2_multi", *(module.name for module in found if not module.name.endswith("__main__"))]


def loaded_by(*codes: str) -> list[set[str]]:
    """The top-level modules that a fresh process has after each of some codes."""
    report = "; import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    code = "\n".join(each + report for each in codes)
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [set(json.loads(line)) for line in run.stdout.splitlines()]


def test_the_walk_finds_the_package() -> None:
    assert {"gpt2_multi.model.config", "gpt2_multi.files.hub", "gpt2_multi.pt"} <= set(modules())


def packages(name: str) -> tuple[str, str]:
    """Those of a backend."""
    return f"gpt2_multi.{name}", f"gpt2_multi.app.train.engines.{name}"


@pytest.mark.parametrize("name", MAY_LOAD)
def test_packages_load_their_own_framework_only(name: str) -> None:
    own = MAY_LOAD[name]
    for framework in own:
        pytest.importorskip(framework)
    inside = [module for module in modules() if module.startswith(packages(name))]
    before, after = loaded_by(*(f"import {', '.join(names)}" for names in (sorted(own), inside)))
    assert after & FRAMEWORKS <= own | before  # TensorFlow loads JAX where it is


def test_a_module_of_the_core_loads_no_framework_and_may_be_the_first() -> None:
    """One process, which forgets the package after each module; what is not there in the end was never there."""
    theirs = tuple(package for name in MAY_LOAD for package in packages(name))
    core = [module for module in modules() if module not in OPTIONAL and not module.startswith(theirs)]
    forget = "[sys.modules.pop(name) for name in [*sys.modules] if name.partition('.')[0] == 'gpt2_multi']"
    (loaded,) = loaded_by("\n".join(f"import sys, {module}; {forget}" for module in core))
    assert not loaded & FRAMEWORKS and not loaded & {"conversion", "gpt2_multi_conversion"}


def test_importing_the_package_loads_next_to_nothing() -> None:
    heavy = {"numpy", "safetensors", "huggingface_hub", "click", "rich", "regex"}
    (loaded,) = loaded_by("import gpt2_multi")
    assert not loaded & heavy


def test_a_name_loads_its_own_module_only() -> None:
    (loaded,) = loaded_by("from gpt2_multi import GPT2Config; GPT2Config()")
    assert not loaded & (FRAMEWORKS | {"numpy", "huggingface_hub"})


def test_every_exported_name_is_there() -> None:
    assert set(gpt2_multi.__all__) <= set(dir(gpt2_multi))
    for name in gpt2_multi.__all__:
        assert getattr(gpt2_multi, name) is not None
    with pytest.raises(AttributeError, match="module 'gpt2_multi' has no attribute 'GPT3'"):
        _ = gpt2_multi.GPT3  # type: ignore[attr-defined]


def test_every_package_is_installed() -> None:
    root = Path(__file__).resolve().parents[3]
    listed = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    found = [".".join(path.parent.relative_to(root).parts) for path in (root / "gpt2_multi").rglob("__init__.py")]
    assert sorted(listed) == sorted([*found, "gpt2_multi_conversion"])
