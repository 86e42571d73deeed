"""The state of a training run, and the step that changes it: on one device, on a mesh, on several hosts.

model = FlaxGPT2LMHeadModel.from_pretrained("gpt2", mesh=mesh, rules=rules)
state = create_train_state(model, optimizer(5e-5))
state, metrics = train_step(state, {"input_ids": ids, "labels": ids})
model.params = state.params
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training import train_state
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gpt2_multi import limits
from gpt2_multi.errors import InputError
from gpt2_multi.flax.checks import extremes
from gpt2_multi.flax.params import Tree
from gpt2_multi.flax.sharding import shard_batch
from gpt2_multi.flax.training import IGNORED, shifted

if TYPE_CHECKING:
    from gpt2_multi.flax.loading import FlaxGPT2PreTrainedModel

Batch = Mapping[str, Any]
Metrics = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of a model, as a function that `jit` can compare: two of one module are equal."""

    module: nn.Module
    head: str

    def __call__(self, params: Tree, batch: Batch, dropout_key: Array | None = None) -> tuple[Array, Array]:
        """The loss, (), and how many labels it is the mean of, (); without a key there is no dropout."""
        train, rngs = dropout_key is not None, {} if dropout_key is None else {"dropout": dropout_key}
        output: Any = self.module.apply({"params": params}, **batch, train=train, rngs=rngs)
        losses = [loss for loss in (output.loss, getattr(output, "mc_loss", None)) if loss is not None]
        if not losses:
            raise InputError(f"batch: expected labels for the loss, found {', '.join(batch)}; give them by their name")
        return sum(losses), label_count(self.head, batch)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and self.module is other.module

    def __hash__(self) -> int:
        return id(self.module)


def label_count(head: str, batch: Batch) -> Array:
    """How many labels of tokens count, (); 1 for the other heads, whose micro-batches count alike."""
    if head not in ("lm", "token_classification"):
        return jnp.float32(1)
    labels, mask = batch["labels"], batch.get("attention_mask")
    mask = None if mask is None or mask.ndim != 2 else mask
    if head == "lm":
        labels = shifted(labels, mask)
    elif mask is not None:
        labels = jnp.where(mask != 0, labels, IGNORED)
    return (labels != IGNORED).sum().astype(jnp.float32)


class TrainState(train_state.TrainState):
    """Step, parameters, the optimizer's state, and the key from which each step's dropout follows: a pytree."""

    apply_fn: Loss = struct.field(pytree_node=False)
    params: Any = struct.field(pytree_node=True)
    dropout_key: Array


def create_train_state(
    model: FlaxGPT2PreTrainedModel,
    optimizer: optax.GradientTransformation,
    params: Tree | None = None,
    *,
    seed: int = 0,
) -> TrainState:
    """The state before the first step, with a copy of the model's parameters, or with `params` themselves.

    It lies where the parameters lie: the optimizer's state is sharded as they are. `seed` decides the dropout. `params`
    are used up by the first step; with a model made by `_do_init=False` nothing is held twice.
    """
    source = model.params if params is None else params
    first = partial(_first, Loss(model.module, model.head), optimizer, seed)
    shardings, given = _shardings(jax.eval_shape(first, source), source), params is not None
    return jax.jit(first, out_shardings=shardings, donate_argnums=0 if given else ())(source)


def _first(loss: Loss, optimizer: optax.GradientTransformation, seed: int, params: Tree) -> TrainState:
    params = jax.tree.map(jnp.copy, params)  # otherwise they would share memory that the first step gives away
    return TrainState(jnp.int32(0), loss, params, optimizer, optimizer.init(params), jax.random.key(seed))


def _shardings(state: TrainState, params: Tree) -> TrainState:
    """The sharding of each array of a state whose parameters lie as `params` do; what is no parameter is replicated."""
    by_leaf = jax.tree.map(lambda x: x.sharding, params)
    whole = replicated(jax.tree.leaves(params)[0].sharding)
    moments = optax.tree_map_params(
        state.tx, lambda _, sharding: sharding, state.opt_state, by_leaf, transform_non_params=lambda _: whole
    )
    return state.replace(step=whole, params=by_leaf, opt_state=moments, dropout_key=whole)


def replicated(sharding: Sharding) -> Sharding:
    """The same devices, each with the whole."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def update(state: TrainState, batch: Batch, micro: bool = False) -> tuple[TrainState, Metrics]:
    """What `train_step` compiles, for a `jit` of your own."""
    key = jax.random.fold_in(state.dropout_key, state.step)
    batches = batch if micro else {name: value[None] for name, value in batch.items()}
    loss, grads = accumulated(state, batches, key)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state.apply_gradients(grads=grads), metrics


def accumulated(state: TrainState, batches: Batch, key: Array) -> tuple[Array, Tree]:
    """The loss and gradients of micro-batches that are stacked, one after the other: those of one batch of all rows."""
    gradients = jax.value_and_grad(state.apply_fn, has_aux=True)

    def one(total: Tree, numbered: Any) -> tuple[Tree, Any]:
        number, batch = numbered
        (loss, count), grads = gradients(state.params, batch, jax.random.fold_in(key, number))
        return jax.tree.map(lambda t, x: t + count.astype(x.dtype) * x, total, grads), (loss, count)

    numbers = jnp.arange(len(jax.tree.leaves(batches)[0]))
    start = jax.tree.map(jnp.zeros_like, state.params)
    total, (losses, counts) = lax.scan(one, start, (numbers, dict(batches)))
    count = jnp.maximum(counts.sum(), 1)
    return (losses * counts).sum() / count, jax.tree.map(lambda x: x / count.astype(x.dtype), total)


def train_step(state: TrainState, batch: Batch, micro: bool = False) -> tuple[TrainState, Metrics]:
    """One update by a batch with labels: the next state, and `loss` and `grad_norm`, (), before it.

    Compiled, with the shardings of the state, whose memory it takes: go on with the state that it returns. Arrays of
    NumPy are placed on the state's mesh by `shard_batch`. With `micro` the inputs have a first axis of micro-batches,
    (A, B, T) ids, whose gradients are accumulated: what one batch of A B rows gives in the memory of B rows. The
    dropout of a step follows from the state's key and the step. Raises InputError for ids and labels outside the
    vocabulary, and for a batch without labels.
    """
    check_batch(state, batch)
    leaves, tree = jax.tree.flatten(state)
    step = _compiled(tree, tuple(leaf.sharding for leaf in leaves), micro)
    return _on_mesh(step, state, batch, micro)


def _on_mesh(call: Callable[..., Any], state: TrainState, batch: Batch, micro: bool) -> Any:
    mesh: Any = getattr(jax.tree.leaves(state)[0].sharding, "mesh", None)
    if mesh is None:
        return call(state, dict(batch))
    with jax.set_mesh(mesh):
        return call(state, shard_batch(batch, mesh, micro))


@lru_cache(maxsize=16)
def _compiled(tree: Any, shardings: tuple[Sharding, ...], micro: bool) -> Callable[..., tuple[TrainState, Metrics]]:
    out = (jax.tree.unflatten(tree, shardings), replicated(shardings[0]))
    return jax.jit(partial(update, micro=micro), out_shardings=out, donate_argnums=0)


@jax.jit
def _evaluated(state: TrainState, batch: Batch) -> tuple[Array, Array]:
    return state.apply_fn(state.params, batch)


def eval_step(state: TrainState, batch: Batch) -> tuple[Array, Array]:
    """The loss of a batch without dropout, (), and how many labels it is the mean of, ()."""
    check_batch(state, batch)
    return _on_mesh(_evaluated, state, batch, False)


def check_batch(state: TrainState, batch: Batch) -> None:
    """Look at ids and labels that are on this host: on a device, JAX would take the nearest id that there is."""
    config, head = state.apply_fn.module.config, state.apply_fn.head
    host = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
    for name in host.keys() & {"input_ids", "token_type_ids"}:
        limits.check_ids(name, *extremes(host[name]), config.vocab_size)
        limits.check_positions(0, host[name].shape[-1] - 1, config.n_positions)
    if "labels" in host and head in ("lm", "double_heads"):
        limits.check_labels(*extremes(host["labels"]), config.vocab_size)
