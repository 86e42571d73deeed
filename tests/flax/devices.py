"""What tests/flax/test_sharding.py runs in a process of its own, on 8 virtual devices: prints JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.flax.devices MODEL_FOLDER OUTPUT
"""

import json
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.generation.generate import log_probs
from gpt2_multi.flax.parameters.sharding import FSDP, TENSOR, init_params, make_mesh, shard_batch, shard_params
from gpt2_multi.flax.parameters.tree import Leaf
from gpt2_multi.flax.training import (
    Windows,
    create_train_state,
    eval_step,
    optimizer,
    restore_state,
    save_state,
    train_step,
    update,
)

RULES = {**FSDP, **TENSOR, "vocab": "tensor"}
MESHES = {
    "data": "data=8",
    "fsdp": "fsdp=8",
    "tensor": "data=2,tensor=4",
    "mixed": "data=2,fsdp=2,tensor=2",
    "mixed scan": "data=2,fsdp=2,tensor=2",
}
DATA = Windows(np.random.default_rng(0).integers(0, 32, 300), length=12, batch_size=8)
ADAMW = optimizer(1e-2)
Shapes = dict[str, Any]


def losses(state: Any, steps: int = 5) -> tuple[Any, list[float]]:
    """The state after some steps, and their losses."""
    found = []
    for _ in range(steps):
        state, metrics = train_step(state, DATA[int(state.step)])
        found.append(float(metrics["loss"]))
    return state, found


def shapes(tree: Any) -> Shapes:
    """The shapes of the parts on each device, of every leaf."""
    return {
        "/".join(path): [list(s.data.shape) for s in x.addressable_shards] for path, x in flatten_dict(tree).items()
    }


def watched(folder: str, **options: Any) -> tuple[Any, Any, dict[str, list[list[int]]]]:
    """A model and its parameters, and the shapes of what was read at a time."""
    read: dict[str, list[list[int]]] = {}
    value = Leaf.value

    def watch(leaf: Any, *args: Any) -> Any:
        found = value(leaf, *args)
        read.setdefault(leaf.rows[0].name, []).append(list(found.shape))
        return found

    Leaf.value = watch
    model, tree = FlaxGPT2LMHeadModel.from_pretrained(folder, _do_init=False, **options)
    Leaf.value = value
    return model, tree, read


def gathered(state: Any, mesh: Any) -> list[str]:
    """The shapes of the floats that a step gathers from all devices, such as "16,64"."""
    whole = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        step = jax.jit(update, out_shardings=(whole, None)).lower(state, shard_batch(DATA[0], mesh)).compile()
    return re.findall(r"f32\[([\d,]*)\][^=]* all-gather", step.as_text())


def on_mesh(folder: str, output: Path, name: str) -> dict[str, Any]:
    """Train on a mesh, and write the model."""
    mesh, scan_layers = make_mesh(MESHES[name]), "scan" in name
    model, tree, read = watched(folder, mesh=mesh, rules=RULES, scan_layers=scan_layers)
    placed = shapes(tree)
    state = create_train_state(model, ADAMW, tree)
    gathers = gathered(state, mesh) if name == "fsdp" else []
    state, found = losses(state)
    model.save_pretrained(output / name, state.params)
    moments = [shapes(optax.tree_utils.tree_get(state.opt_state, name)) for name in ("mu", "nu")]
    if name == "mixed":
        save_state(output / "states", state)
    after = shapes(state.params)
    return dict(losses=found, read=read, placed=placed, after=after, moments=moments, gathers=gathers)


def on_one_device(folder: str, output: Path, scan_layers: bool) -> dict[str, Any]:
    """Train on one device; `mixed` once more from the state that the mesh has saved."""
    model = FlaxGPT2LMHeadModel.from_pretrained(folder, scan_layers=scan_layers)
    state, found = losses(create_train_state(model, ADAMW))
    model.save_pretrained(output / f"one {scan_layers}", state.params)
    answer: dict[str, Any] = {"losses": found, "shapes": {k: v[0] for k, v in shapes(state.params).items()}}
    if not scan_layers:
        answer["after mesh"] = losses(restore_state(output / "states", create_train_state(model, ADAMW)), 2)[1]
        answer["after one"] = losses(state, 2)[1]
    return answer


def distance(a: Any, b: Any) -> float:
    """The greatest difference of two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


def made_and_moved(folder: str) -> dict[str, float]:
    """How far first parameters made on a mesh, and parameters moved to it, are from those of one device."""
    model = FlaxGPT2LMHeadModel.from_pretrained(folder)
    mesh = make_mesh(MESHES["mixed"])
    moved = shard_params(model.params, model.config, mesh, RULES)
    made, first = init_params(model, mesh, RULES, seed=3), model.init_weights(jax.random.key(3))

    same = shapes(moved) == shapes(made)
    return {"moved": distance(moved, model.params), "made": distance(made, first), "same shapes": same}


def answers(model: Any, ids: Any, every: bool) -> dict[str, Any]:
    """What a model gives for ids (B, T): in its own calls, and in a `jit` of the caller's."""
    loss = jax.grad(lambda params, ids: model.module.apply({"params": params}, ids, labels=ids).loss)
    output, grads = model(ids, labels=ids), jax.jit(loss)(model.params, ids)
    found = {"logits": output.logits, "loss": output.loss, "grads": grads}
    options: dict[str, Any] = {"greedy": {}}
    if every:
        options |= {"sampled": {"do_sample": True}, "beams": {"num_beams": 2}}
        options |= {"guesses": {"prompt_lookup_num_tokens": 2}, "assisted": {"assistant_model": model}}
        found["streamed"] = jnp.stack([*model.stream_tokens(ids, max_new_tokens=3)], 1)
        found["scored"] = log_probs(model, np.asarray(ids), np.ones(ids.shape, int))[0]
        found["traced"] = jax.jit(lambda params, ids: model.generate(ids, params=params, max_new_tokens=3))(
            model.params, ids
        )
    return found | {name: model.generate(ids, max_new_tokens=3, **more) for name, more in options.items()}


class Outer(nn.Module):
    """A module of a caller's, with ours inside."""

    inner: nn.Module

    def __call__(self, ids: Any) -> Any:
        """The mean of the logits of each token, (B, T)."""
        return self.inner(ids).logits.mean(-1)


def around(model: Any, ids: Any, own: Any) -> dict[str, Any]:
    """What callers do with a model besides calling it; `own` is for functions that call modules by themselves."""
    batch, state = {"input_ids": np.asarray(ids), "labels": np.asarray(ids)}, create_train_state(model, ADAMW)
    found = {"eval": eval_step(state, {"input_ids": ids, "labels": ids})[0]}
    stacked = {name: x.reshape(2, len(x) // 2, -1) for name, x in batch.items()}
    return found | {
        "micro": train_step(state, stacked, micro=True)[1]["loss"],
        "bf16": model.to_bf16(model.params),
        "init": model.module.init(jax.random.key(3), ids, deterministic=True)["params"],
        "outer": own(Outer(model.module).apply)({"params": {"inner": model.params}}, ids),
        "bound": own(lambda params, ids: model.module.bind({"params": params})(ids).logits)(model.params, ids),
    }


def on_explicit_axes(folder: str, output: Path) -> dict[str, Any]:
    """How far that is from one device on a mesh of explicit axes, with ids that were placed on it; and losses.

    Calls and training where `jax.set_mesh` has set the mesh; a few, and what is around a model, where it has not.
    """
    mesh = jax.make_mesh((2, 2), ("data", "mp"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    ids, rules = DATA[0]["input_ids"], {"mlp": "mp", "head": "mp"}
    rows = NamedSharding(mesh, PartitionSpec("data"))
    one, placed = FlaxGPT2LMHeadModel.from_pretrained(folder), jax.device_put(ids, rows)
    first = one.init_weights(jax.random.key(3))
    expected = answers(one, ids, True) | around(one, ids, jax.jit) | {"made": first, "moved": one.params}
    answer: dict[str, Any] = {}
    for name, context in (("set", lambda: jax.set_mesh(mesh)), ("not set", nullcontext)):
        with context():
            model = FlaxGPT2LMHeadModel.from_pretrained(folder, mesh=mesh, rules=rules)
            found = answers(model, placed, name == "set")
            found["moved"] = shard_params(one.params, model.config, mesh, rules)
            if name == "set":
                found["made"] = init_params(model, mesh, rules, seed=3)
                state, before = losses(create_train_state(model, ADAMW), 2)
                save_state(output / name, state)
                state, after = losses(restore_state(output / name, create_train_state(model, ADAMW)), 2)
                answer["losses"] = [*before, *after]
            else:
                found |= around(model, placed, partial(jax.sharding.auto_axes, out_sharding=rows))
            answer[name] = {key: distance(value, expected[key]) for key, value in found.items()}
            lie = {
                x.sharding.mesh for key in ("logits", "moved", "made", "bf16") for x in jax.tree.leaves(found.get(key))
            }
            answer[name]["elsewhere"] = float(lie != {mesh} or found["logits"].sharding.spec[0] != "data")
    model.prune_heads({0: [1, 3]})
    model.save_pretrained(output / "pruned", model.resize_token_embeddings(40))
    return answer


def main() -> None:
    """Everything, as one JSON object on stdout."""
    folder, output = sys.argv[1], Path(sys.argv[2])
    found: dict[str, Any] = {name: on_mesh(folder, output, name) for name in MESHES}
    found |= {f"one {scan}": on_one_device(folder, output, scan) for scan in (False, True)}
    found["explicit"] = on_explicit_axes(folder, output)
    print(json.dumps(found | {"others": made_and_moved(folder)}))


if __name__ == "__main__":
    main()
