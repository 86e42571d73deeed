"""What an import costs in a fresh interpreter: seconds from the start of the process to its end."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.harness import OURS, Row, compare, rounds

PACKAGES = {
    OURS: "import gpt2_multi",
    "bare interpreter": "pass",
    "torch": "import torch",
    "transformers": "import transformers",
}
MODELS = {
    OURS: "from gpt2_multi.pt import GPT2LMHeadModel",
    "transformers": "from transformers import GPT2LMHeadModel",
}


def run(count: int = 5) -> list[Row]:
    """Import the packages, and then the model classes."""
    rows = []
    for what, statements in (("import the package", PACKAGES), ("import the model class", MODELS)):
        peers = {who: lambda code=code: _start(code) for who, code in statements.items()}
        seconds = rounds(what, peers, count)
        rows += compare(f"{what}, median", seconds, "s")
        rows += [
            Row(f"{what}, best", who, min(theirs), "s", {OURS: min(theirs) / min(seconds[OURS])})
            for who, theirs in seconds.items()
        ]
        if "bare interpreter" in seconds:
            over = [our - bare for our, bare in zip(seconds[OURS], seconds["bare interpreter"], strict=True)]
            rows.append(Row(f"{what}, median over bare", OURS, statistics.median(over), "s"))
    return rows


def _start(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
