"""What holds of a saved state of training, whoever has written it: which step it is of, and whether it fits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from gpt2_multi.errors import CheckpointError


def chosen_step(folder: str | os.PathLike[str], there: Sequence[int], step: int | None) -> int:
    """The step that is asked for, or the last, of those that a folder has; CheckpointError where it has no such."""
    if not there or step not in (None, *there):
        steps = f"only those of the steps {', '.join(map(str, there))}" if there else "none"
        raise CheckpointError(f"{folder}: expected a saved state, found {steps}; save_state writes one")
    return there[-1] if step is None else step


def check_fit(what: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """CheckpointError where a state has other tensors than are expected, by what is said of each name."""
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{what}: expected {name} to be {expected.get(name, 'absent')}, found {found.get(name, 'none')}; make "
                "the model and the optimizer as they were when it was saved"
            )
