"""A tiny model, and the command line run within this process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from gpt2_multi.app import cli
from gpt2_multi.files import hub
from gpt2_multi.model.config import GPT2Config
from tests.support.fixtures import write_model

needs_pt = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
END = 256


def byte_vocabulary() -> dict[str, int]:
    """GPT-2's 256 byte tokens, and the end token: byte b is the id b."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    spelled = {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}
    return {**{spelled[byte]: byte for byte in range(256)}, "<|endoftext|>": END}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=END, eos_token_id=END
    )
    write_model(folder, config, "lm", dtype=np.float32)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with the first of its layers alone."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("shallow") / "demo"
    shutil.copytree(hub.DEMO, folder)
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"n_layer": 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in weights.items() if ".h." not in name or ".h.0." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def demo(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the small model be the one that doctor computes."""
    monkeypatch.setattr(hub, "DEMO", tiny)


def run(*args: str | Path, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], input=stdin)


def good(*args: str | Path, stdin: bytes | str | None = None) -> str:
    result = run(*args, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refusal(*args: str | Path, stdin: bytes | str | None = None, code: int = 1) -> str:
    """The one sentence of a failure, after which nothing may have been printed."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == code, result.output
    return sentence(result.stdout, result.stderr)


def sentence(stdout: str, stderr: str) -> str:
    assert stdout == ""
    assert stderr.startswith("gpt2-multi: ")
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("gpt2-multi: ").rstrip("\n")


def process(*args: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-W", "error", "-m", "gpt2_multi", *map(str, args)]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def copy_of(folder: Path, target: Path, **changes: Any) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    GPT2Config.from_pretrained(folder, **changes).save_pretrained(target)
    return target
