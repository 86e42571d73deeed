"""Greedy generation in TensorFlow, beside transformers and KerasHub; this library is on XLA unless told otherwise."""

from functools import partial

from benchmarks.harness import OURS
from benchmarks.peer_rows import generate
from benchmarks.peer_workers import TF

PEERS = [(OURS, "plain"), *((name, mode) for name in ("transformers", "kerashub") for mode in ("plain", "xla"))]

run = partial(generate, TF, PEERS)
