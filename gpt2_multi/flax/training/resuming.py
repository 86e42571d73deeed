"""Training that goes on where it stopped: states that Orbax saves and restores::

data = Windows(ids, length=256, batch_size=8)
state = restore_state("run", state)
for step in range(int(state.step), steps):
    state, _ = train_step(state, data[step])
save_state("run", state)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt2_multi.errors import CheckpointError
from gpt2_multi.flax.parameters.tree import check_alive
from gpt2_multi.flax.training.state import TrainState, named, refilled
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.states import check_fit, chosen_step


def save_state(folder: str | os.PathLike[str], state: TrainState, keep: int | None = 2) -> None:
    """Write a state to `folder`, under its step, by Orbax; the last `keep` stay. Each host has to call it.

    The folder of a step appears whole or not at all. Raises CheckpointError where it cannot be written.
    """
    if keep is not None:
        inputs.check_size("keep", keep, 1)
    check_alive("state", state)
    try:
        with _manager(folder, keep) as manager:
            manager.save(int(state.step), args=ocp.args.StandardSave(named(state)), force=True)
            manager.wait_until_finished()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: the state could not be saved ({_line(error)})") from error


def restore_state(folder: str | os.PathLike[str], state: TrainState, step: int | None = None) -> TrainState:
    """The last state of `folder`, or that of a step, bit by bit; it lies where `state` lies, whose memory is let go.

    `state` is what `create_train_state` makes of the same model and optimizer; the mesh may be another. Raises
    CheckpointError where there is no such state, and where it does not fit.
    """
    check_alive("state", state)
    step = chosen_step(folder, saved_steps(folder), step)
    what, wanted = f"{folder}: the state of step {step}", named(state)
    try:
        found = _read(folder, step, what, wanted)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{what} is damaged ({_line(error)}); delete it to go on from the one before") from error
    return refilled(state, found, what)


def saved_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps whose states a folder has."""
    if not Path(folder).is_dir():
        return []
    with _manager(folder, None) as manager:
        return sorted(manager.all_steps())


def _read(folder: str | os.PathLike[str], step: int, what: str, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    with _manager(folder, None) as manager:
        check_fit(what, _shapes(dict(manager.item_metadata(step))), _shapes(wanted))
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
        return manager.restore(step, args=ocp.args.StandardRestore(target))  # type: ignore[no-any-return]


def _manager(folder: str | os.PathLike[str], keep: int | None) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        Path(folder).resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def _shapes(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{np.dtype(x.dtype).name}{list(x.shape)}" for name, x in arrays.items()}


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
