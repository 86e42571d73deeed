"""`train_on_batch` in TensorFlow, beside transformers and KerasHub: as Keras compiles it by default, and on XLA."""

from functools import partial

from benchmarks.harness import OURS
from benchmarks.peer_rows import train
from benchmarks.peer_workers import TF

GROUPS = {f", {mode}": [(name, mode) for name in (OURS, "transformers", "kerashub")] for mode in ("plain", "xla")}

run = partial(train, TF, GROUPS)
