"""The state of a training run, and the step that changes it: on one device, on a mesh, on several hosts::

model = FlaxGPT2LMHeadModel.from_pretrained("gpt2", mesh=mesh, rules=rules)
state = create_train_state(model, optimizer(5e-5))
state, metrics = train_step(state, {"input_ids": ids, "labels": ids})
model.params = state.params
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training import train_state
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.flax.attention import upcast
from gpt2_multi.flax.layers import input_names, on_host
from gpt2_multi.flax.parameters.axes import automatic
from gpt2_multi.flax.parameters.sharding import shard_batch
from gpt2_multi.flax.parameters.tree import Tree, check_alive
from gpt2_multi.flax.training.lora import LoraConfig, check_adapters, init_adapters, merge, shapes
from gpt2_multi.flax.training.losses import IGNORED, shifted
from gpt2_multi.model import inputs
from gpt2_multi.model.checkpoint.quantized import check_trained

LORA = 0x4C6F5241  # folded into a seed's key for the first adapters, which dropout, folding in steps, never meets
Batch = Mapping[str, Any]
Metrics = dict[str, Array]
NO_INPUTS = (
    "train", "past_key_values", "output_attentions", "output_hidden_states", "logits_to_keep", "skip_logits",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of a model, as a function that `jit` can compare: two of one module are equal."""

    module: nn.Module
    head: str
    check: Callable[[Batch], None] = field(repr=False)  # of the model
    lora: LoraConfig | None = None

    def __call__(
        self, params: Tree, batch: Batch, dropout_key: Array | None = None, base: Tree | None = None
    ) -> tuple[Array, Array]:
        """The loss, (), and how many labels it is the mean of, (); without a key there is no dropout.

        With LoRA `params` are adapters, and `base` is what they change.
        """
        return automatic(self._mean, None, params, dict(batch), dropout_key, base)  # type: ignore[no-any-return]

    def _mean(self, params: Tree, batch: Batch, dropout_key: Array | None, base: Tree | None) -> tuple[Array, Array]:
        params = self.whole(params, base)
        train, rngs = dropout_key is not None, {} if dropout_key is None else {"dropout": dropout_key}
        output: Any = self.module.apply({"params": params}, **batch, train=train, rngs=rngs)
        losses = [loss for loss in (getattr(output, name, None) for name in ("loss", "mc_loss")) if loss is not None]
        if not losses:
            raise InputError(f"batch: expected labels for the loss, found {', '.join(batch)}; give them by their name")
        return sum(losses), label_count(self.head, batch)

    def whole(self, params: Tree, base: Tree | None) -> Tree:
        """The parameters of the module."""
        return params if self.lora is None or base is None else merge(base, params, self.lora)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and self.module is other.module and self.lora == other.lora

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
        labels = jnp.where(mask.astype(bool), labels, IGNORED)
    return (labels != IGNORED).sum().astype(jnp.float32)


class TrainState(train_state.TrainState):
    """Step, parameters, the optimizer's state, and the key from which each step's dropout follows: a pytree.

    With LoRA `params` are the adapters, and `base` the parameters that they change, which stay as they are.
    """

    apply_fn: Loss = struct.field(pytree_node=False)
    params: Any = struct.field(pytree_node=True)
    dropout_key: Array
    base: Any = None

    def merged(self) -> Tree:
        """The parameters of the model, with LoRA's updates in them; without LoRA they are `params` themselves."""
        if self.base is None:
            return self.params
        shardings = jax.tree.map(lambda x: x.sharding, self.base)
        whole = partial(automatic, self.apply_fn.whole, None)
        return jax.jit(whole, out_shardings=shardings)(self.params, self.base)  # type: ignore[no-any-return]


def create_train_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    params: Tree | None = None,
    *,
    seed: int = 0,
    lora: LoraConfig | None = None,
    adapters: Tree | None = None,
) -> TrainState:
    """The state before the first step, with a copy of the model's parameters, or with `params` themselves.

    It lies where the parameters lie: the optimizer's state is sharded as they are. `seed` decides the dropout. `params`
    are used up; with a model made by `_do_init=False` nothing is held twice. With `lora` only adapters are trained, new
    ones that `seed` decides, or those given, and lie whole on each device. Raises InputError for parameters that do not
    fit the model, and for what is no optimizer.
    """
    given: object = optimizer
    if not isinstance(given, optax.GradientTransformation):
        raise InputError(
            f"optimizer: expected one of optax, found {type(given).__name__}; training.optimizer(5e-5) makes one"
        )
    if adapters is not None:
        check_adapters(model, _needed(lora), adapters)
    source = jax.tree.map(lambda x: x if isinstance(x, Array) else jnp.array(x), model.fitting(params))
    first = partial(_first, loss_of(model, lora), optimizer, seed, _adapters_of(model, lora, adapters))
    shardings, used = _shardings(jax.eval_shape(first, source), source), params is not None
    return jax.jit(first, out_shardings=shardings, donate_argnums=0 if used else ())(source)


def loss_of(model: Any, lora: LoraConfig | None = None) -> Loss:
    """The loss of a model, without its parameters."""
    bare = copy(model)
    bare._params = None
    return Loss(model.module, model.head, bare.check, lora)


def loss_on(base: Tree | None, loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss as a function of what is trained."""
    return loss if base is None else partial(loss, base=base)


def _needed(lora: LoraConfig | None) -> LoraConfig:
    if lora is None:
        raise InputError("adapters: expected lora beside them, found none; load_adapters gives both")
    return lora


def _adapters_of(model: Any, lora: LoraConfig | None, adapters: Tree | None) -> Callable[[Array, Tree], Tree] | None:
    """A function of a key and the parameters that gives the adapters, new ones or those that there are already."""
    if lora is None:
        return None
    if lora.lora_dropout:
        raise InputError(
            f"lora_dropout: expected 0, found {lora.lora_dropout}: an update is merged into its kernel, and drops "
            "nothing; dataclasses.replace(lora, lora_dropout=0.0) trains on without, the model's own dropout stays"
        )
    if adapters is not None:
        return lambda key, params: jax.tree.map(jnp.array, adapters)
    shapes(model, lora)  # what it refuses is refused before anything is traced
    return partial(init_adapters, model, lora)


def _first(loss: Loss, optimizer: optax.GradientTransformation, seed: int, adapters: Any, params: Tree) -> TrainState:
    params = jax.tree.map(jnp.copy, params)  # otherwise they would share memory that the first step gives away
    key, base = jax.random.key(seed), None
    if adapters is not None:
        params, base = adapters(jax.random.fold_in(key, LORA), params), params
    return TrainState(jnp.int32(0), loss, params, optimizer, optimizer.init(params), key, base)


def _shardings(state: TrainState, params: Tree) -> TrainState:
    """The sharding of each array of a state whose parameters lie as `params` do; adapters are whole on each device.

    What has not the shape of a parameter is replicated; what an optimizer leaves out stays out.
    """
    by_leaf = jax.tree.map(lambda x: x.sharding, params)
    whole = replicated(jax.tree.leaves(params)[0].sharding)
    trained = by_leaf if state.base is None else jax.tree.map(lambda _: whole, state.params)

    def beside(moment: Any, param: Any, sharding: Sharding) -> Any:
        if isinstance(moment, optax.MaskedNode):
            return moment
        return sharding if moment.shape == param.shape else whole

    moments = optax.tree_map_params(
        state.tx, beside, state.opt_state, state.params, trained,
        transform_non_params=lambda _: whole, is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    base = None if state.base is None else by_leaf
    return state.replace(step=whole, params=trained, opt_state=moments, dropout_key=whole, base=base)


def replicated(sharding: Sharding) -> Sharding:
    """The same devices, each with the whole."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def update(state: TrainState, batch: Batch, micro: bool = False) -> tuple[TrainState, Metrics]:
    """What `train_step` compiles, for a `jit` of your own."""
    key = jax.random.fold_in(state.dropout_key, state.step)
    batches = batch if micro else {name: value[None] for name, value in batch.items()}
    loss, grads = accumulated(state, batches, key)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    with jax.numpy_dtype_promotion("standard"):  # which optax needs, under whatever the caller has set
        return state.apply_gradients(grads=grads), metrics


def accumulated(state: TrainState, batches: Batch, key: Array) -> tuple[Array, Tree]:
    """The loss and gradients of micro-batches that are stacked, one after the other: those of one batch of all rows."""
    is_integer = any(x.dtype == jnp.int8 for x in jax.tree.leaves(state.params))
    check_trained(not is_integer, "take gradients of the floats alone, with jax.grad")
    gradients = jax.value_and_grad(loss_on(state.base, state.apply_fn), has_aux=True)

    def one(total: Tree, numbered: Any) -> tuple[Tree, Any]:
        number, batch = numbered
        (loss, count), grads = gradients(state.params, batch, jax.random.fold_in(key, number))
        return jax.tree.map(lambda t, x: t + count.astype(t.dtype) * x.astype(t.dtype), total, grads), (loss, count)

    numbers = jnp.arange(len(jax.tree.leaves(batches)[0]))
    start = jax.tree.map(lambda x: jnp.zeros_like(upcast(x)), state.params)
    total, (losses, counts) = lax.scan(one, start, (numbers, dict(batches)))
    count = jnp.maximum(counts.sum(), 1)
    mean = jax.tree.map(lambda t, x: (t / count.astype(t.dtype)).astype(x.dtype), total, state.params)
    return (losses * counts).sum() / count, mean


def train_step(state: TrainState, batch: Batch, micro: bool = False) -> tuple[TrainState, Metrics]:
    """One update by a batch with labels: the next state, and `loss` and `grad_norm`, (), before it.

    Compiled, with the shardings of the state, whose memory it takes: go on with the state that it returns. Arrays of
    NumPy are placed on the state's mesh by `shard_batch`. With `micro` the inputs have a first axis of micro-batches,
    (A, B, T) ids, whose gradients are accumulated: what one batch of A B rows gives in the memory of B rows. The
    dropout of a step follows from the state's key and the step. Raises InputError for what a call of the model refuses,
    values being looked at where they are of NumPy, and for a batch without labels; TypeError for an unknown input.
    """
    batch = checked(state, batch, micro)
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
    return loss_on(state.base, state.apply_fn)(state.params, batch)


def eval_step(state: TrainState, batch: Batch) -> tuple[Array, Array]:
    """The loss of a batch without dropout, (), and how many labels it is the mean of, ()."""
    batch = checked(state, batch, False)
    return _on_mesh(_evaluated, state, batch, False)


def checked(state: TrainState, batch: Batch, micro: bool) -> Batch:
    """A batch as arrays, without what is None: what a call of the model would take.

    Values on a device are not looked at, which would wait for it: there, JAX takes no id that there is not.
    """
    check_alive("state", state)
    loss, given = state.apply_fn, dict(arrays_of(batch))
    known = [name for name in input_names(loss.module) if name not in NO_INPUTS]
    inputs.check_names("batch", [*given], known)
    host = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}

    def look(device: Batch) -> None:
        for part in micro_batches({**host, **device}) if micro else [{**host, **device}]:
            loss.check(part)

    jax.eval_shape(look, {name: value for name, value in given.items() if name not in host})
    return given


def arrays_of(batch: object) -> Iterator[tuple[str, Any]]:
    """The inputs that a batch has, as arrays."""
    if not isinstance(batch, Mapping) or not batch:
        raise InputError(
            f"batch: expected a dict of inputs and labels, found {batch if batch == {} else type(batch).__name__}"
        )
    return ((name, on_host(name, value)) for name, value in batch.items() if value is not None)


def micro_batches(batch: Batch) -> list[Batch]:
    """The micro-batches that are stacked in a batch."""
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
        raise InputError(f"batch: expected as many micro-batches, the first axis, in each input, found {shapes}")
    return [{name: value[i] for name, value in batch.items()} for i in range(next(iter(shapes.values()))[0])]


def kept(state: TrainState) -> TrainState:
    """What is saved of a state: of parameters that adapters change a number alone, by which they are known again."""
    base = None if state.base is None else fingerprint(state.base)
    return state.replace(dropout_key=jax.random.key_data(state.dropout_key), base=base)


@jax.jit
def fingerprint(params: Tree) -> Array:
    """A number that follows from all bits of a tree of parameters, wherever they lie: uint32, ()."""
    total = jnp.uint32(len(jax.tree.leaves(params)))
    for x in jax.tree.leaves(params):
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32).ravel()
        places = lax.iota(jnp.uint32, bits.size)
        total = 31 * total + ((bits ^ places) * (2 * places + 1)).sum(dtype=jnp.uint32)
    return total


def named(state: TrainState) -> dict[str, Array]:
    """Every array that is saved by its path, such as params.transformer.wte.embedding, in the order of the leaves."""
    flat, _ = jax.tree.flatten_with_path(kept(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def refilled(state: TrainState, found: Mapping[str, Any], what: str) -> TrainState:
    """A state with the arrays that `named` gave; CheckpointError, about `what`, for adapters of other parameters."""
    wanted = named(state)
    if state.base is not None and int(found["base"]) != int(wanted["base"]):
        raise CheckpointError(
            f"{what} has adapters of other parameters than the model's; make the model as it was when it was saved"
        )
    filled = jax.tree.unflatten(jax.tree.structure(kept(state)), [found[name] for name in wanted])
    impl = jax.random.key_impl(state.dropout_key)
    return filled.replace(dropout_key=jax.random.wrap_key_data(filled.dropout_key, impl=impl), base=state.base)
