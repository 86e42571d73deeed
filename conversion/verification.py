"""Is a checkpoint what it should be? `verify` compares hidden states and logits, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2_multi.app.backends import installed, resolve
from gpt2_multi.app.doctor.comparison import BOUNDS, Comparison, compare
from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.arrays import Array, same
from gpt2_multi.files.folders import PathLike
from gpt2_multi.model.checkpoint import Checkpoint, open
from gpt2_multi.model.checkpoint.quantized import dequantized, quantize
from gpt2_multi.model.reference import oracle

BOUND = BOUNDS["float32"]  # of the greatest value
LENGTH, SEED = 24, 0  # of the random ids that are computed


@dataclass
class Verdict:
    """What `verify` found. `tensors` are those that differ between two checkpoints, by their canonical names."""

    lines: list[Comparison] = field(default_factory=list)
    tensors: dict[str, Comparison] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was compared, and all of it is within the bound."""
        return bool(self.lines) and all(line.ok for line in (*self.lines, *self.tensors.values()))

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        tensors = {name: each.to_dict() for name, each in self.tensors.items()}
        return {"ok": self.ok, "bound": BOUND, "lines": [line.to_dict() for line in self.lines], "tensors": tensors}


def verify(
    a: PathLike,
    b: PathLike | None = None,
    backends: Sequence[str] | None = None,
    *,
    prefix: str | None = None,
    drop: str | Iterable[str] = (),
    n_head: int | None = None,
) -> Verdict:
    """Compare the checkpoint `a` with `b`, or, without it, what each backend makes of `a` with the NumPy oracle.

    `prefix`, `drop` and `n_head` are those of `convert`, for `a`. Random ids go through both; `backends` are by default
    all that are installed. Raises CheckpointError where there is nothing to compare.
    """
    given = {"prefix": prefix, "drop": drop or None, "n_head": n_head}
    which: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    old = open(a, **which)
    return _against_backends(old, backends, which) if b is None else compared(old, open(b))


def compared(old: Checkpoint, new: Checkpoint) -> Verdict:
    """Two checkpoints, by the NumPy oracle in float64, and tensor by tensor."""
    ids = _ids(old)
    if old.config.vocab_size != new.config.vocab_size or old.config.n_layer != new.config.n_layer:
        raise CheckpointError(f"{new.path}: expected as many layers and tokens as {old.path} has, found others")
    verdict = Verdict(_lines(str(new.path), oracle(old.config, old, ids), oracle(new.config, new, ids)))
    for name in dict.fromkeys([*old, *new]):
        line = compare({"what": name, "against": str(new.path)}, _tensor(old, name), _tensor(new, name), BOUND)
        if line.error:
            verdict.tensors[name] = line
    return verdict


def _tensor(checkpoint: Checkpoint, name: str) -> Array:
    """A tensor, or one that is like no other where there is none; a tied head is the embedding."""
    source = "wte.weight" if name == "lm_head.weight" and name not in checkpoint else name
    return checkpoint[source] if source in checkpoint else np.zeros(0)


def _expected(old: Checkpoint, new: Checkpoint, name: str) -> Array:
    """A tensor as the new one should have it: in int8 it is rounded by a rule of its own."""
    array = _tensor(old, name)
    source = "wte.weight" if name not in old else name
    if new.quantized(name) is None or (source in old and old.quantized(source) is not None):
        return array
    return dequantized(new.weights[name], quantize(new.weights[name], array))


def _is_as_wide(old: Checkpoint, new: Checkpoint) -> bool:
    return old.dtype_of("wte.weight") == new.dtype_of("wte.weight")


def check(old: Checkpoint, new: Checkpoint) -> None:
    """Whether `new` is `old`, each tensor as it was or rounded once, and computes the same where nothing was rounded.

    Raises CheckpointError where it is not.
    """
    for name in new:
        if not same(_expected(old, new, name), new[name], name):
            raise CheckpointError(f"{new.path.name}: {name} is not what {old.path} has; nothing was changed")
    verdict = compared(old, new)
    if not verdict.ok and old.config.quantization == new.config.quantization and _is_as_wide(old, new):
        worst = max(verdict.lines, key=lambda line: line.relative)
        raise CheckpointError(
            f"{new.path.name}: {worst.labels['what']} differs by {worst.relative:.1e} of its greatest value from what "
            f"{old.path} computes; nothing was changed"
        )


def _ids(checkpoint: Checkpoint) -> Array:
    config = checkpoint.config
    length = min(LENGTH, config.n_positions)
    return np.random.default_rng(SEED).integers(config.vocab_size, size=(1, length))


def _against_backends(old: Checkpoint, names: Sequence[str] | None, which: dict[str, Any]) -> Verdict:
    ids, verdict = _ids(old), Verdict()
    expected = oracle(old.config, old, ids)
    for name in names or installed():
        backend = resolve(name)
        verdict.lines += _lines(name, expected, backend.layers(backend.load(old.path, "cpu", **which), ids))
    if not verdict.lines:
        resolve()  # which says what to install
    return verdict


def _lines(against: str, expected: Sequence[Array], found: Sequence[Array]) -> list[Comparison]:
    names = ["embeddings", *(f"layer {i}" for i in range(len(expected) - 2)), "logits"]
    rows = zip(names, expected, found, strict=True)
    return [compare({"what": name, "against": against}, a, b, BOUND) for name, a, b in rows]
