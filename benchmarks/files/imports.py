"""What an import costs in a fresh interpreter: seconds from the start of the process to its end."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial

from benchmarks.harness import OURS, Row, compare, rounds

BARE = "bare interpreter"
PACKAGES = {
    OURS: "import gpt2_multi",
    BARE: "pass",
    "torch": "import torch",
    "transformers": "import transformers",
}
MODELS = {
    OURS: "from gpt2_multi.pt import GPT2LMHeadModel",
    "transformers": "from transformers import GPT2LMHeadModel",
}
SMALL = {"count": 1}


def run(count: int = 5) -> list[Row]:
    """Import the packages, and then the model classes."""
    rows = []
    for what, statements in (("import the package", PACKAGES), ("import the model class", MODELS)):
        seconds = rounds(what, {who: partial(start, code) for who, code in statements.items()}, count)
        rows += compare(what, seconds, "s")
        if BARE in seconds:
            over = [our - bare for our, bare in zip(seconds[OURS], seconds[BARE], strict=True)]
            rows.append(Row(f"{what}, over a bare interpreter", OURS, statistics.median(over), "s", rounds=len(over)))
    return rows


def start(code: str) -> None:
    """A fresh interpreter that runs a line, and ends."""
    subprocess.run([sys.executable, "-c", code], check=True)
