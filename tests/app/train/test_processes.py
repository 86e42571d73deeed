"""Two processes of each framework train as one does: torchrun, jax.distributed, tf.distribute."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_multi.model.config import GPT2Config
from tests.app.train.several import WORDS, run
from tests.support.effort import THOROUGH
from tests.support.fixtures import write_model

ROOT = Path(__file__).resolve().parents[3]
NEEDED = {"pt": "torch", "tf": "tensorflow", "flax": "flax"}
MESHES = {"pt": ["", "fsdp=2", "tensor=2"], "tf": [""], "flax": ["", "data=2,fsdp=2", "fsdp=2,tensor=2"]}


def ports(number: int) -> list[int]:
    """Ports of this host that nobody listens at."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def environments(framework: str) -> Iterator[dict[str, str]]:
    """What says to each of two processes which it is."""
    one, other = ports(2)
    workers = [f"127.0.0.1:{port}" for port in (one, other)]
    for index in range(2):
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        numbers = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": one}
        yield {
            "pt": {name: str(value) for name, value in numbers.items()},  # as torchrun does
            "tf": {"TF_CONFIG": json.dumps(task)},
            "flax": {"JAX_COORDINATOR_ADDRESS": workers[0], "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)},
        }[framework]


if THOROUGH:

    @pytest.mark.parametrize(("framework", "mesh"), [(name, mesh) for name in NEEDED for mesh in MESHES[name]])
    def test_two_processes_train_as_one(framework: str, mesh: str, tmp_path: Path) -> None:
        pytest.importorskip(NEEDED[framework])
        config = GPT2Config(
            vocab_size=WORDS, n_positions=12, n_embd=16, n_layer=1, n_head=2, eos_token_id=None, bos_token_id=None
        )
        write_model(tmp_path / "model", config, "lm", dtype=np.float64)
        one = run(framework, tmp_path / "model", tmp_path / "one")
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={2 if mesh else 1}"}
        command = [
            sys.executable,
            "-m",
            "tests.app.train.several",
            framework,
            *map(str, (tmp_path / "model", tmp_path / "two")),
        ]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        running = [
            subprocess.Popen([*command, mesh] if mesh else command, env={**os.environ, **flags, **each}, **pipes)
            for each in environments(framework)
        ]
        try:
            answers = [process.communicate(timeout=600) for process in running]
        finally:
            for process in running:
                process.kill()
        for index, (process, (printed, errors)) in enumerate(zip(running, answers, strict=True)):
            assert process.returncode == 0, errors[-3000:]
            found = json.loads(printed.splitlines()[-1])
            assert (found["process"], found["processes"], found["agreed"]) == (index, 2, [True, False])
            assert found["again"] == found["losses"][3:]
            np.testing.assert_allclose(found["losses"], one["losses"], rtol=0, atol=1e-9)
            np.testing.assert_allclose(found["held"], one["held"], rtol=0, atol=1e-9)
        assert (tmp_path / "two" / "model" / "model.safetensors").exists()
