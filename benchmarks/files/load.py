"""Loading a model folder into PyTorch, with the file in the page cache.

Mapping a file defers the work, so the time to the first logits (loading and one forward pass) is measured too, and
the growth of the memory in a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from benchmarks.harness import OURS, Row, compare, folders, rounds
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel

transformers.logging.disable_progress_bar()
IDS = torch.arange(8)[None]
SMALL = {"config": folders.TINY, "count": 1}


def ours(folder: Path) -> Any:
    return GPT2LMHeadModel.from_pretrained(folder)


def mapped(folder: Path) -> Any:
    """With kernels that stay views of the file, for a program that only reads; otherwise they are copied."""
    return GPT2LMHeadModel.from_pretrained(folder, mmap=True)


def peer(folder: Path) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)


def by_hand(folder: Path) -> Any:
    """The least that transformers' class can be loaded with: safetensors, into a model without memory."""
    config = transformers.GPT2Config.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=False, assign=True)
    model.tie_weights()
    return model.eval()


LOADERS: dict[str, Callable[[Path], Any]] = {
    OURS: ours,
    f"{OURS}, mmap=True": mapped,
    "transformers": peer,
    "safetensors, load_state_dict": by_hand,
}


def first_logits(load: Callable[[Path], Any], folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load(folder)(IDS).logits
    return logits


def run(config: GPT2Config | None = None, count: int = 7) -> list[Row]:
    """Load, load and compute, and measure the memory of the latter."""
    with folders.written(folders.plain(config)) as folder:
        peers = {who: partial(load, folder) for who, load in LOADERS.items()}
        rows = compare("load", rounds("load", peers, count), "s")
        what = "load and first logits"
        peers = {who: partial(first_logits, load, folder) for who, load in LOADERS.items()}
        results = [call() for call in peers.values()]
        if not all(torch.allclose(results[0], other, atol=1e-4) for other in results[1:]):
            what += " (DIFFERENT LOGITS)"
        rows += compare(what, rounds(what, peers, count), "s")
        growth = {who: _growth(who, folder) for who in LOADERS}
    return rows + [
        Row(f"{kind} memory of that", who, theirs[kind], "MB", {OURS: theirs[kind] / growth[OURS][kind]})
        for kind in ("peak", "private")
        for who, theirs in growth.items()
    ]


def _growth(who: str, folder: Path) -> dict[str, float]:
    """How much more memory a fresh process holds after its first logits: at the peak, and not shared with a file."""
    code = f"from benchmarks.files import load; from pathlib import Path; load.report({who!r}, Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peak, private = map(float, done.stdout.split())
    return {"peak": peak, "private": private}


def report(who: str, folder: Path) -> None:
    """Print the growth in megabytes; `_growth` runs this."""
    first_logits(_tiny, folder)  # what the first use of PyTorch takes, whatever is loaded
    before = _memory()
    model = LOADERS[who](folder)
    with torch.no_grad():
        model(IDS)
    after = _memory()
    print(after["VmHWM"] - before["VmRSS"], after["RssAnon"] - before["RssAnon"])


def _tiny(folder: Path) -> Any:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))


def _memory() -> dict[str, float]:
    """The sizes in Linux' account of this process, in megabytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text("utf-8").splitlines()]
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[-1] == "kB"}
