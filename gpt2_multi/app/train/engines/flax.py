"""Training in JAX: the step of `gpt2_multi.flax.training`, on a mesh of all devices of all processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from gpt2_multi.app.train.engines.engine import Array, Batch, Update, first_factor, read_state, write_state
from gpt2_multi.app.train.plan import BETAS, EPSILON, LORA_LAYERS, LORA_SCALE, Plan
from gpt2_multi.errors import InputError
from gpt2_multi.files.arrays import Made
from gpt2_multi.flax.classes import FlaxGPT2LMHeadModel
from gpt2_multi.flax.loading import dtypes
from gpt2_multi.flax.parameters.sharding import FSDP, TENSOR, make_mesh
from gpt2_multi.flax.parameters.tree import Tree, gathered
from gpt2_multi.flax.training.adapters import Place, tree_of
from gpt2_multi.flax.training.lora import A, LoraConfig
from gpt2_multi.flax.training.losses import IGNORED
from gpt2_multi.flax.training.optimizers import optimizer
from gpt2_multi.flax.training.state import create_train_state, eval_step, named, refilled, train_step
from gpt2_multi.model.weights import ROW_AXES

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"  # of the environment


class FlaxTeam:
    """The processes that the environment names, or this one alone. See `Team`."""

    def __init__(self, device: str) -> None:
        if ADDRESS in os.environ:
            count, number = (int(os.environ[name]) if name in os.environ else None for name in (COUNT, NUMBER))
            jax.distributed.initialize(num_processes=count, process_id=number)  # which finds out what is not said
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"--backend flax: torchrun starts PyTorch's processes; start each of JAX's with {ADDRESS}=host:port, "
                f"{COUNT} and {NUMBER} in its environment"
            )
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.places = places_of(device)

    def share(self, mesh: str) -> tuple[int, int]:
        """See `Team.share`; each process gives its rows to the mesh, which shares them anew."""
        return self.process, self.processes

    def agreed(self, flag: bool) -> bool:
        """See `Team.agreed`."""
        return bool(np.any(self.all(np.array(flag))))

    def all(self, array: Array) -> Array:
        """The arrays of all processes, (P, ...), of which each has one of the same shape."""
        if self.processes == 1:
            return array[None]
        return np.asarray(multihost_utils.process_allgather(array))

    def close(self) -> None:
        """See `Team.close`."""
        if self.processes > 1:
            jax.distributed.shutdown()


class FlaxEngine:
    """See `Engine`."""

    def __init__(self, plan: Plan, folder: Path, team: FlaxTeam) -> None:
        self._plan, self._team = plan, team
        mesh = make_mesh(plan.mesh or f"data={len(team.places)}", team.places)
        self.device, self.devices = team.places[0].device_kind, mesh.size
        self._parts = int(np.prod([mesh.shape[axis] for axis in ROW_AXES]))  # that the rows of a batch are cut into
        check_rows(plan, mesh.shape)
        stored = "float64" if plan.dtype == "float64" else "float32"
        self._model, params = FlaxGPT2LMHeadModel.from_pretrained(
            folder, plan.dtype, param_dtype=stored, mesh=mesh, rules=FSDP | TENSOR, _do_init=False, **plan.settings
        )
        lora = LoraConfig(plan.lora, LORA_SCALE * plan.lora, LORA_LAYERS) if plan.lora else None
        first = None if lora is None else adapters(plan, self._model, lora)
        options: dict[str, Any] = {"seed": plan.seed, "lora": lora, "adapters": first}
        self._state = create_train_state(self._model, adamw(plan, stored), params, **options)

    def train(self, batch: Batch, step: int, rate: float) -> Update:
        """See `Engine.train`; each step is that of the state, which counts them too."""
        whole = {name: self._whole(value, 1) for name, value in batch.items()}
        old = self._state.opt_state.hyperparams["learning_rate"]
        now = {"learning_rate": placed(old, np.asarray(rate, old.dtype))}
        state = self._state.replace(opt_state=self._state.opt_state._replace(hyperparams=now))
        self._state, found = train_step(state, whole, micro=True)
        return Update(found["loss"], found["grad_norm"])

    def _whole(self, rows: Array, axis: int) -> Array:
        """The rows of all processes, of which each gives its own along an axis, one process after the other."""
        return np.concatenate(list(self._team.all(rows)), axis)

    def evaluate(self, batch: Batch) -> tuple[Any, Any]:
        """See `Engine.evaluate`."""
        whole = {name: self._whole(value, 0) for name, value in batch.items()}
        room = [(0, -len(whole["labels"]) % self._parts), (0, 0)]
        fill = {"input_ids": 0, "labels": IGNORED}
        padded = {name: np.pad(value, room, constant_values=fill[name]) for name, value in whole.items()}
        mean, count = eval_step(self._state, padded)
        return mean * count, count

    def save_model(self, folder: Path | None) -> None:
        """See `Engine.save_model`."""
        params = self._whole_tree(self._state.merged(), folder)
        if folder is not None:
            self._model.save_pretrained(folder, params)

    def save_state(self, folder: Path | None) -> None:
        """See `Engine.save_state`."""
        tensors = self._whole_tree(named(self._state), folder)
        if folder is not None:
            write_state(folder, {name: made(x) for name, x in tensors.items()})

    def _whole_tree(self, tree: Tree, folder: Path | None) -> Tree:
        """What all processes have, in the memory of the one with a folder, so that no other waits for its disk."""

        def whole(x: Any) -> Any:
            found = gathered(x)
            return None if folder is None else found

        return tree if self._team.processes == 1 else jax.tree.map(whole, tree)  # type: ignore[no-any-return]

    def load_state(self, folder: Path) -> None:
        """See `Engine.load_state`."""
        wanted = named(self._state)
        found = read_state(folder, {name: x.shape for name, x in wanted.items()})
        self._state = refilled(
            self._state, {name: placed(x, found[name].view(x.dtype)) for name, x in wanted.items()}, str(folder)
        )

    def product(self, size: int) -> float:
        """See `Engine.product`."""
        place = next(each for each in self._team.places if each.process_index == self._team.process)
        x = jax.device_put(
            np.random.default_rng(0).normal(size=(size, size)).astype(jnp.dtype(self._plan.dtype)), place
        )
        product, seconds = jax.jit(jnp.matmul), []
        for _ in range(4):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return min(seconds)


def join(device: str) -> FlaxTeam:
    """See `engine.join`."""
    return FlaxTeam(device)


def build(plan: Plan, folder: Path, team: FlaxTeam) -> FlaxEngine:
    """See `engine.build`."""
    if plan.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    platform = team.places[0].platform
    if plan.dtype not in (known := dtypes(platform)):
        raise InputError(f"--dtype: {platform} does not compute in {plan.dtype}; choose one of {', '.join(known)}")
    return FlaxEngine(plan, folder, team)


def places_of(device: str) -> list[jax.Device]:
    """The devices of a kind in all processes, by default of the fastest; with a number, one of this process."""
    kind, _, number = device.partition(":")
    try:
        found = jax.devices(kind or None)
        return found if not number else [jax.local_devices(backend=kind)[int(number)]]
    except (RuntimeError, IndexError, ValueError):
        known = [*dict.fromkeys(each.platform for each in (*jax.devices(), *jax.devices("cpu")))]
        raise InputError(
            f"--device: expected one of {', '.join(known)}, or with a number such as {known[0]}:0, found {device!r}"
        ) from None


def check_rows(plan: Plan, mesh: Any) -> None:
    """Devices share the rows of each part of a batch equally."""
    rows, parts = plan.batch_size // plan.accumulate, int(np.prod([mesh[axis] for axis in ROW_AXES]))
    if rows % parts:
        raise InputError(
            f"--batch-size: expected a multiple of {parts * plan.accumulate}, for {parts} devices that share the rows "
            f"of each of {plan.accumulate} parts, found {plan.batch_size}; change it, --accumulate or --mesh"
        )


def adapters(plan: Plan, model: FlaxGPT2LMHeadModel, lora: LoraConfig) -> Tree:
    """The first adapters."""

    def first(_: str, place: Place) -> Array:
        is_first = place.path[-1] == A
        return first_factor(plan, place.row.path, place.shape[1]) if is_first else np.zeros(place.shape)

    return tree_of(model, lora, first)


def adamw(plan: Plan, dtype: str) -> optax.GradientTransformation:
    """AdamW whose learning rate is a part of its state."""
    options: dict[str, Any] = {"b1": BETAS[0], "b2": BETAS[1], "eps": EPSILON}
    of_rate: Callable[..., Any] = partial(
        optimizer, weight_decay=plan.weight_decay, max_norm=plan.max_norm or None, **options
    )
    inject = optax.inject_hyperparams(lambda learning_rate: of_rate(learning_rate), hyperparam_dtype=jnp.dtype(dtype))
    found: optax.GradientTransformation = inject(learning_rate=0.0)
    return found


def made(x: Any) -> Made:
    """An array to write, which is gathered when its turn is; files have no integers without a sign."""
    dtype = np.dtype(np.int32) if x.dtype == jnp.uint32 else np.dtype(x.dtype)
    return dtype, x.shape, lambda: np.asarray(gathered(x), order="C").view(dtype)


def placed(like: jax.Array, value: Array) -> jax.Array:
    """An array on the devices that another lies on, cut as that one."""
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.asarray(value[index]))
