"""Score a folder of files on a Ray cluster of two workers, of which one is killed: the bytes of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpt2_multi.files.hub import DEMO

Path("texts").mkdir()
WORDS = (DEMO / "README.md").read_text().split()
for number in range(40):
    rows = [{"text": " ".join(WORDS[(number + i) % 90 :][:8])} for i in range(100)]
    Path("texts", f"{number:02}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

EVALUATE = [sys.executable, "-m", "gpt2_multi", "evaluate", "demo", "texts", "--backend", "pt", "--json"]
RAY = ["--ray", "local", "--workers", "2"]
os.environ["OMP_NUM_THREADS"] = "1"  # in every process, so that sums are added in one order


def workers() -> list[int]:
    """The processes that score, which Ray names after what they do."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], check=True, capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "ray::Worker" in line]


def run(*more: str) -> dict:
    return json.loads(subprocess.run([*EVALUATE, *more], check=True, capture_output=True, text=True).stdout)


alone = run("--output", "alone.jsonl")
with subprocess.Popen([*EVALUATE, *RAY, "--output", "killed.jsonl"], stdout=subprocess.PIPE, text=True) as process:
    while not (Path("killed.jsonl").exists() and Path("killed.jsonl").stat().st_size):
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(victim := workers()[0], signal.SIGKILL)
    answer = process.communicate()[0]
assert process.returncode == 0 and json.loads(answer) == alone, answer
assert Path("killed.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()
print(f"killed {victim}; {alone['documents']} documents, perplexity {alone['perplexity']:.3f}, the same bytes")

whole = Path("alone.jsonl").read_bytes()
Path("killed.jsonl").write_bytes(
    whole[: len(whole) // 2]
)  # the process that began the run, killed in the middle of a line
assert run(*RAY, "--output", "killed.jsonl") == alone and Path("killed.jsonl").read_bytes() == whole
