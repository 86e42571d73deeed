"""Old checkpoints to safetensors, by `conversion.convert` and by the framework that wrote them: seconds and memory.

Each is a process of its own, with its imports; memory is the most that the process held, pages of files included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gpt2_multi_conversion import convert
from rich.progress import track

from benchmarks.harness import OURS, PeerError, Row, compare, folders
from benchmarks.peers.workers import ROOT, TRANSFORMERS_FLAX, TRANSFORMERS_TF, Peer
from gpt2_multi.model.config import GPT2Config

PEERS: dict[str, tuple[str, Peer]] = {
    "tf-h5": ("transformers, TensorFlow", TRANSFORMERS_TF),
    "flax-msgpack": ("transformers, Flax", TRANSFORMERS_FLAX),
    "openai": ("TensorFlow", TRANSFORMERS_TF),
}
SMALL = {"config": folders.TINY, "count": 1}


def run(config: GPT2Config | None = None, count: int = 3) -> list[Row]:
    """Convert GPT-2 124M, or `config`, from each format `count` times."""
    rows: list[Row] = []
    with folders.written(folders.plain(config)) as folder, tempfile.TemporaryDirectory() as place:
        for format, (who, its) in track(PEERS.items(), "convert", transient=True):
            source, target = Path(place, format), Path(place, "target")
            convert(folder, source, format)
            commands = {OURS: ours(source, target)}
            try:
                peer = [its.interpreter(), "-m", "benchmarks.peers.converters", format]
                commands[who] = [*peer, str(source), str(target)]
                spent(commands[who])  # whether it runs at all
            except PeerError as error:
                print(f"not measured: {who}: {error}")
                commands.pop(who, None)
            rows += measured(f"{format} to safetensors", commands, count)
    return rows


def ours(source: Path, target: Path) -> list[str]:
    """The command of this library."""
    return [sys.executable, "-m", "gpt2_multi_conversion", "convert", str(source), str(target), "--force"]


def measured(what: str, commands: dict[str, list[str]], count: int) -> list[Row]:
    """Rows of the seconds and of the memory of commands that take turns."""
    seconds: dict[str, list[float]] = {who: [] for who in commands}
    memory: dict[str, list[float]] = {who: [] for who in commands}
    for _ in range(count):
        for who, command in commands.items():
            took, most = spent(command)
            seconds[who].append(took)
            memory[who].append(most)
    return compare(what, seconds, "s") + compare(f"{what}, memory", memory, "MB")


def spent(command: list[str]) -> tuple[float, float]:
    """The seconds that a process took, and the most megabytes that it held."""
    start, most = time.perf_counter(), 0.0
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, peak(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise PeerError(f"{' '.join(command[2:4])} ended with the status {process.returncode}")
    return time.perf_counter() - start, most


def peak(process: int) -> float:
    """The most megabytes that a process has held so far (Linux); 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0
