"""`python -m tests.app.serve.attacks --count 1000`: attack a server of the demo model in a process of its own.

Prints the seed, how each kind of attack was answered, and how much memory the server has before and after. A wrong
answer is an AssertionError.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path

from tests.app.serve.attacks.kinds import KINDS, request, spelled
from tests.app.serve.attacks.wire import Attack, answers, attack_all, crowd


def main() -> None:
    """Attack a server of the demo model in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    command = [sys.executable, "-m", "gpt2_multi", "serve", "--port", "0", "--queue", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline() if process.stdout else "")
            assert found, "the server did not begin"
            address = found[1], int(found[2])
            good = Attack([request(spelled(prompt="ROMEO:", max_tokens=30, seed=1))], {200})
            before, memory = answers(good, address)[0].body, resident(process.pid)
            for name, statuses in attack_all(address, KINDS, asked.count, asked.seed).items():
                print(f"{name:24}", dict(sorted(statuses.items())))
            print("crowd of 1,000           ", dict(crowd(address, 1000)))
            after = answers(good, address)[0].body
            assert json.loads(before)["choices"] == json.loads(after)["choices"]
            print(f"memory: {memory / 1e6:.0f} MB before, {resident(process.pid) / 1e6:.0f} MB after")
        finally:
            process.terminate()


def resident(process: int) -> int:
    """How many bytes of memory a process has."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0


main()
