"""Is a checkpoint what it should be? `verify` compares hidden states and logits, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.arrays import Array, same
from gpt2_multi.files.folders import PathLike
from gpt2_multi.model.checkpoint import Checkpoint, open
from gpt2_multi.model.reference import oracle

BOUND = 1e-4  # of the greatest value; float32 computed rightly stays well below
LENGTH, SEED = 24, 0  # of the random ids that are computed


@dataclass(frozen=True)
class Line:
    """One comparison: the greatest difference, and the same relative to the greatest value."""

    what: str  # "embeddings", "layer 0", ..., "logits", or a tensor's name
    against: str
    error: float
    relative: float

    @property
    def ok(self) -> bool:
        """Whether it is within the bound."""
        return self.relative <= BOUND


@dataclass
class Verdict:
    """What `verify` found. `tensors` are those that differ between two checkpoints, by their canonical names."""

    lines: list[Line] = field(default_factory=list)
    tensors: dict[str, Line] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was compared, and all of it is within the bound."""
        return bool(self.lines) and all(line.ok for line in (*self.lines, *self.tensors.values()))

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"ok": self.ok, "bound": BOUND, **asdict(self)}


def verify(a: PathLike, b: PathLike | None = None, backends: Sequence[str] | None = None) -> Verdict:
    """Compare the checkpoint `a` with `b`, or, without it, what each backend makes of `a` with the NumPy oracle.

    Random ids go through both; `backends` are by default all that are installed. Raises CheckpointError where there is
    nothing to compare.
    """
    old = open(a)
    return _against_backends(old, backends) if b is None else compare(old, open(b))


def compare(old: Checkpoint, new: Checkpoint) -> Verdict:
    """Two checkpoints, by the NumPy oracle in float64, and tensor by tensor."""
    ids = _ids(old)
    if old.config.vocab_size != new.config.vocab_size or old.config.n_layer != new.config.n_layer:
        raise CheckpointError(f"{new.path}: expected as many layers and tokens as {old.path} has, found others")
    verdict = Verdict(_lines(str(new.path), oracle(old.config, old, ids), oracle(new.config, new, ids)))
    for name in dict.fromkeys([*old, *new]):
        line = _line(name, str(new.path), _tensor(old, name), _tensor(new, name))
        if line.error:
            verdict.tensors[name] = line
    return verdict


def _tensor(checkpoint: Checkpoint, name: str) -> Array:
    """A tensor, or one that is like no other where there is none; a tied head is the embedding."""
    source = "wte.weight" if name == "lm_head.weight" and name not in checkpoint else name
    return checkpoint[source] if source in checkpoint else np.zeros(0)


def check(old: Checkpoint, new: Checkpoint) -> None:
    """Whether `new` is `old`, each tensor as it was or rounded once, and computes the same where nothing was rounded.

    Raises CheckpointError where it is not.
    """
    for name in new:
        if not same(_tensor(old, name), new[name], name):
            raise CheckpointError(f"{new.path.name}: {name} is not what {old.path} has; nothing was changed")
    verdict = compare(old, new)
    if not verdict.ok and old["wte.weight"].dtype == new["wte.weight"].dtype:
        worst = max(verdict.lines, key=lambda line: line.relative)
        raise CheckpointError(
            f"{new.path.name}: {worst.what} differs by {worst.relative:.1e} of its greatest value from what {old.path} "
            "computes; nothing was changed"
        )


def _difference(a: Array, b: Array) -> float:
    """The greatest difference; infinite between other shapes, and where one is no number."""
    if a.shape != b.shape:
        return np.inf
    with np.errstate(all="ignore"):
        error = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return error if np.isfinite(error) else np.inf


def _ids(checkpoint: Checkpoint) -> Array:
    config = checkpoint.config
    length = min(LENGTH, config.n_positions)
    return np.random.default_rng(SEED).integers(config.vocab_size, size=(1, length))


def _against_backends(old: Checkpoint, names: Sequence[str] | None) -> Verdict:
    from gpt2_multi.app import backends

    ids, verdict = _ids(old), Verdict()
    expected = oracle(old.config, old, ids)
    folder = old.path if old.path.is_dir() else old.path.parent
    for name in names or backends.installed():
        adapter = backends.load(name)
        model = adapter.load(folder, "cpu")
        found = [*adapter.hidden_states(model, ids), adapter.logits(model, ids)]
        verdict.lines += _lines(name, expected, found)
    if not verdict.lines:
        backends.load()  # which says what to install
    return verdict


def _lines(against: str, expected: Sequence[Array], found: Sequence[Array]) -> list[Line]:
    names = ["embeddings", *(f"layer {i}" for i in range(len(expected) - 2)), "logits"]
    return [_line(name, against, a, b) for name, a, b in zip(names, expected, found, strict=True)]


def _line(what: str, against: str, expected: Array, found: Array) -> Line:
    if np.array_equal(expected, found, equal_nan=True):  # infinities and NaN too
        return Line(what, against, 0.0, 0.0)
    error = _difference(expected, found)
    relative = error / float(np.abs(expected).max(initial=0) or 1)
    return Line(what, against, error, relative if np.isfinite(relative) else np.inf)
