"""Training in TensorFlow: our AdamW, LoRA as Keras has it, on several devices and hosts by tf.distribute."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from gpt2_multi.app.train.engines.engine import Array, Batch, Update, first_factor, read_state, write_state
from gpt2_multi.app.train.plan import BETAS, EPSILON, LORA_LAYERS, LORA_SCALE, Plan
from gpt2_multi.errors import InputError
from gpt2_multi.files.arrays import Made
from gpt2_multi.tf.fit.optimizers import AdamW
from gpt2_multi.tf.heads import TFGPT2LMHeadModel
from gpt2_multi.tf.layers import alone, over_replicas
from gpt2_multi.tf.loading import devices
from gpt2_multi.tf.training import IGNORED

PARAMETER, UPDATES, MOMENTS = "parameter", "updates", ("momentum", "velocity")  # as Keras' AdamW calls them
CLUSTER = "TF_CONFIG"  # of the environment, which tf.distribute reads


class TFTeam:
    """The processes that TF_CONFIG names, or this one alone; every device of each has the whole model. See `Team`."""

    def __init__(self, device: str) -> None:
        task = json.loads(os.environ.get(CLUSTER, "{}"))
        self.processes = len(task.get("cluster", {}).get("worker", [0]))
        self.process = int(task["task"]["index"]) if self.processes > 1 else 0
        if self.processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"--backend tf: torchrun starts PyTorch's processes; start each of TensorFlow's with {CLUSTER} in its "
                "environment"
            )
        self.strategy = strategy_of(device, self.processes)

    @property
    def replicas(self) -> int:
        """How many devices this process has."""
        return int(self.strategy.num_replicas_in_sync) // self.processes

    def spread(self, rows: Array) -> Any:
        """Rows (..., B, T) as each device of this process gets its own of them."""
        parts = np.split(rows, self.replicas, -2)
        return self.values([tf.constant(part) for part in parts])

    def values(self, each: list[Any]) -> Any:
        """A tensor for each device of this process."""
        if self.strategy.num_replicas_in_sync == 1:
            return each[0]
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: each[context.replica_id_in_sync_group % len(each)]
        )

    def share(self, mesh: str) -> tuple[int, int]:
        """See `Team.share`."""
        return self.process, self.processes

    def agreed(self, flag: bool) -> bool:
        """See `Team.agreed`."""
        if self.processes == 1:
            return flag
        said = self.values([tf.constant(int(flag))] * self.replicas)
        return bool(self.strategy.reduce(tf.distribute.ReduceOp.SUM, said, None))

    def close(self) -> None:
        """See `Team.close`; tf.distribute has nothing to close."""


class Summed(AdamW):
    """AdamW of gradients that are summed over all devices, and clipped, already."""

    def _clip_gradients(self, grads: list[tf.Tensor]) -> list[tf.Tensor]:
        return grads


class TFEngine:
    """See `Engine`."""

    def __init__(self, plan: Plan, folder: Path, team: TFTeam) -> None:
        self._plan, self._team, self._strategy = plan, team, team.strategy
        self.device, self.devices = title_of(self._strategy), int(self._strategy.num_replicas_in_sync)
        stored = "float64" if plan.dtype == "float64" else "float32"
        dtypes: dict[str, Any] = {"dtype": plan.dtype, "param_dtype": stored}
        with self._strategy.scope():
            self._model = TFGPT2LMHeadModel.from_pretrained(folder, **dtypes, **plan.settings)
            if plan.lora:
                adapt(self._model, plan)
            self._rate = tf.Variable(tf.zeros((), stored), trainable=False)
            beta, other = BETAS
            options: dict[str, Any] = {"beta_1": beta, "beta_2": other, "epsilon": EPSILON}
            self._optimizer = Summed(lambda: self._rate, plan.weight_decay, **options)
            self._optimizer.build(self._model.trainable_variables)
        layers = self._model._flatten_layers()
        self._noises = [layer.seed_generator.state for layer in layers if hasattr(layer, "seed_generator")]
        jit = is_compiled(self._strategy)
        self._step = tf.function(self._updated, jit_compile=jit)
        self._forward = tf.function(self._evaluated, jit_compile=jit)

    def train(self, batch: Batch, step: int, rate: float) -> Update:
        """See `Engine.train`."""
        self._rate.assign(tf.constant(rate, self._rate.dtype))
        rows = (self._team.spread(batch[name]) for name in ("input_ids", "labels"))
        loss, norm = self._step(self._noise(step), *rows)
        return Update(*(self._strategy.experimental_local_results(x)[0] for x in (loss, norm)))

    def _noise(self, step: int) -> Any:
        """What dropout follows from in a step, of each device of this process its own, ()."""
        first = self._team.process * self._team.replicas
        keys = [[self._plan.seed, step, first + device] for device in range(self._team.replicas)]
        return self._team.values([tf.constant(np.random.SeedSequence(key).generate_state(1)[0]) for key in keys])

    def _updated(self, noise: Any, ids: Any, labels: Any) -> Any:
        return self._strategy.run(self._update, (noise, ids, labels))

    def _update(self, noise: tf.Tensor, ids: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """One update by the rows of one device, (A, B, T): the loss and the norm of all gradients, ()."""
        for number, state in enumerate(self._noises):
            state.assign(tf.stack([tf.cast(noise, state.dtype), tf.constant(number, state.dtype)]))
        variables = [variable.value for variable in self._model.trainable_variables]
        counts = tf.math.count_nonzero(labels[..., 1:] != IGNORED, (1, 2), dtype=self._rate.dtype)  # (A,)
        shares = counts / tf.maximum(over_replicas(tf.reduce_sum(counts)), 1)

        def add(part: tf.Tensor, loss: tf.Tensor, sums: list[tf.Tensor]) -> Any:
            with tf.GradientTape() as tape, alone():  # a loop cannot wait for other devices
                mean = self._model(ids[part], labels=labels[part], training=True, skip_logits=True).loss
                mean *= tf.gather(shares, part)
            grads = tape.gradient(mean, variables)
            return part + 1, loss + mean, [x + y for x, y in zip(sums, grads, strict=True)]

        start = tf.constant(0), tf.zeros((), self._rate.dtype), [tf.zeros_like(x) for x in variables]
        _, loss, grads = tf.while_loop(lambda part, *_: part < len(ids), add, start, parallel_iterations=1)
        if self.devices > 1:
            grads = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, grads)
        norm = tf.linalg.global_norm(grads)
        if self._plan.max_norm:
            scale = tf.minimum(tf.constant(self._plan.max_norm, norm.dtype) / norm, 1.0)
            grads = [x * scale for x in grads]
        self._optimizer.apply(grads, self._model.trainable_variables)
        return over_replicas(loss), norm

    def evaluate(self, batch: Batch) -> tuple[Any, Any]:
        """See `Engine.evaluate`."""
        room = [(0, -len(batch["labels"]) % self._team.replicas), (0, 0)]
        fill = {"input_ids": 0, "labels": IGNORED}
        padded = [np.pad(batch[name], room, constant_values=value) for name, value in fill.items()]
        total, count = self._forward(*map(self._team.spread, padded))
        first, other = (self._strategy.experimental_local_results(x)[0] for x in (total, count))
        return first, other

    def _evaluated(self, ids: Any, labels: Any) -> Any:
        return self._strategy.run(self._evaluate, (ids, labels))

    def _evaluate(self, ids: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        mean = self._model(ids, labels=labels, training=False, skip_logits=True).loss
        count = over_replicas(tf.math.count_nonzero(labels[:, 1:] != IGNORED, dtype=mean.dtype))
        return over_replicas(mean) * count, count

    def save_model(self, folder: Path | None) -> None:
        """See `Engine.save_model`."""
        if folder is not None:
            self._model.save_pretrained(folder)

    def save_state(self, folder: Path | None) -> None:
        """See `Engine.save_state`."""
        if folder is not None:
            write_state(folder, {name: made(variable) for name, variable in self._state()})

    def _state(self) -> Iterator[tuple[str, Any]]:
        """Each trained variable with its moments, and how many updates they are the mean of."""
        for name, variable in trained(self._model):
            yield f"{PARAMETER}.{name}", variable
            index = self._optimizer._get_variable_index(variable)
            moments = self._optimizer._momentums[index], self._optimizer._velocities[index]
            yield from ((f"{moment}.{name}", x) for moment, x in zip(MOMENTS, moments, strict=True))
        yield UPDATES, self._optimizer.iterations

    def load_state(self, folder: Path) -> None:
        """See `Engine.load_state`."""
        wanted = dict(self._state())
        found = read_state(folder, {name: tuple(variable.shape) for name, variable in wanted.items()})
        for name, variable in wanted.items():
            variable.assign(tf.constant(found[name], variable.dtype))

    def product(self, size: int) -> float:
        """See `Engine.product`."""
        with tf.device(self._strategy.extended.worker_devices[0]):
            x = tf.cast(tf.random.normal((size, size)), self._plan.dtype)
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                float(tf.matmul(x, x)[0, 0])
                seconds.append(time.perf_counter() - start)
        return min(seconds)


def join(device: str) -> TFTeam:
    """See `engine.join`."""
    return TFTeam(device)


def build(plan: Plan, folder: Path, team: TFTeam) -> TFEngine:
    """See `engine.build`."""
    if plan.mesh:
        raise InputError(f"--mesh {plan.mesh}: TensorFlow has the whole model on each device; use --backend pt or flax")
    rows, share = plan.batch_size // plan.accumulate, int(team.strategy.num_replicas_in_sync)
    if rows % share:
        raise InputError(
            f"--batch-size: expected a multiple of {share * plan.accumulate}, for {share} devices that share the rows "
            f"of each of {plan.accumulate} parts, found {plan.batch_size}; change it, or --accumulate"
        )
    return TFEngine(plan, folder, team)


def strategy_of(device: str, processes: int) -> Any:
    """How the devices share a batch: all GPUs of all processes, or one device."""
    known = devices()
    if processes > 1:
        if device not in ("", known[0].partition(":")[0]):
            raise InputError(
                f"--device: with several processes TensorFlow takes all of each, found {device!r}; leave it out"
            )
        return tf.distribute.MultiWorkerMirroredStrategy()
    if device not in ("", *known, *(name.partition(":")[0] for name in known)):
        raise InputError(f"--device: expected one of {', '.join(known)}, found {device!r}")
    many = [name for name in known if name != "cpu"]
    if len(many) > 1 and device in ("", "gpu"):
        return tf.distribute.MirroredStrategy(many)
    return tf.distribute.OneDeviceStrategy(device or known[0])


def is_compiled(strategy: Any) -> bool:
    """Whether XLA compiles a step: it does not wait for other devices."""
    return int(strategy.num_replicas_in_sync) == 1


def title_of(strategy: Any) -> str:
    """What people call the device that a strategy computes on."""
    kind = tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type
    if kind != "GPU":
        return "cpu"
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return str(details.get("device_name", "GPU"))


def adapt(model: TFGPT2LMHeadModel, plan: Plan) -> None:
    """Give a model adapters, which alone are trained."""
    model.enable_lora(plan.lora, LORA_LAYERS, lora_alpha=LORA_SCALE * plan.lora)
    for name, layer in model.owners().items():
        if getattr(layer, "lora_enabled", False):
            factor = layer.lora_kernel_a
            factor.assign(tf.constant(first_factor(plan, name, factor.shape[0]).T, factor.dtype))


def trained(model: TFGPT2LMHeadModel) -> Iterator[tuple[str, Any]]:
    """The variables that are trained, by names that do not depend on what else the process has made."""
    for name, layer in model.owners().items():
        yield from ((f"{name}.{variable.name}", variable) for variable in layer.trainable_variables)


def made(variable: Any) -> Made:
    """A variable to write, which comes to the CPU when its turn is."""
    return np.dtype(variable.dtype), tuple(variable.shape), lambda: tf.convert_to_tensor(variable).numpy()
