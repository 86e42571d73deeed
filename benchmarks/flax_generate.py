"""Greedy generation in JAX, beside transformers, KerasHub, and CTranslate2, which is written in C++."""

from functools import partial

from benchmarks.harness import OURS
from benchmarks.peer_rows import generate
from benchmarks.peer_workers import FLAX

PEERS = [(name, "plain") for name in (OURS, "transformers", "kerashub", "ctranslate2")]

run = partial(generate, FLAX, PEERS)
