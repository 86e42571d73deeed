"""A training step in JAX, beside transformers, KerasHub, and this library in PyTorch."""

from functools import partial

from benchmarks.harness import OURS
from benchmarks.peer_rows import train
from benchmarks.peer_workers import FLAX

PEERS = [(name, "plain") for name in (OURS, "transformers", "kerashub", f"{OURS}, PyTorch")]

run = partial(train, FLAX, {"": PEERS})
