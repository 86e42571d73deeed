"""Peers in JAX: this library, and the last transformers that has Flax."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.calls import ADAMW, Process, as_ids, dtype_of


class Plain(Process):
    """A model that is trained as the examples of transformers do: with all logits at once."""

    model: Any
    state: Any = None  # parameters and moments, from the first update on

    def train(self, ids: Any) -> Any:
        import jax
        import optax

        optimizer = optax.adamw(**ADAMW)
        if self.state is None:
            self.step = jax.jit(partial(step, self.model, optimizer), donate_argnums=0)
            self.state = self.model.params, optimizer.init(self.model.params)
        self.state, loss = self.step(self.state, as_ids(ids))
        return loss


class Ours(Plain):
    """This library."""

    package = "gpt2_multi"

    def load(self, folder: Path) -> None:
        from gpt2_multi import GPT2Config
        from gpt2_multi.flax import FlaxGPT2LMHeadModel

        if "new" in self.modes:
            self.model = FlaxGPT2LMHeadModel(GPT2Config.from_pretrained(folder))
        else:
            self.model = FlaxGPT2LMHeadModel.from_pretrained(folder, **self.options())

    def options(self) -> dict[str, Any]:
        """How the folder is loaded."""
        if "int8" in self.modes:
            return {"quantization": "int8"}
        if "autocast" in self.modes:
            return {"dtype": "bfloat16", "param_dtype": "float32"}
        return {"param_dtype": dtype_of(self.modes)}

    def generate(self, ids: Any, new: int, options: Any) -> Any:
        chosen = {"do_sample": False, "eos_token_id": None, **options}
        return self.model.generate(as_ids(ids), max_new_tokens=new, **chosen)

    def loss(self, ids: Any) -> Any:
        return self.model(as_ids(ids), labels=as_ids(ids)).loss

    def train(self, ids: Any) -> Any:
        from gpt2_multi.flax.training import create_train_state, optimizer, train_step

        if "whole logits" in self.modes:
            return super().train(ids)
        if self.state is None:
            self.state = create_train_state(self.model, optimizer(**ADAMW, max_norm=None))
        self.state, metrics = train_step(self.state, {"input_ids": as_ids(ids), "labels": as_ids(ids)})
        return metrics["loss"]


class Transformers(Plain):
    """transformers 4.57.6; its users compile both calls."""

    package = "transformers"

    def load(self, folder: Path) -> None:
        from safetensors.numpy import load_file
        from transformers import FlaxGPT2LMHeadModel, GPT2Config
        from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

        self.model = FlaxGPT2LMHeadModel(GPT2Config.from_pretrained(folder))
        self.model.params = convert_pytorch_state_dict_to_flax(load_file(folder / "model.safetensors"), self.model)
        self.generates: dict[str, Any] = {}

    def generate(self, ids: Any, new: int, options: Any) -> Any:
        import jax

        chosen = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options}
        run = self.generates.setdefault(str(chosen), jax.jit(partial(self.model.generate, **chosen)))
        return run(as_ids(ids), params=self.model.params).sequences


def step(model: Any, optimizer: Any, state: Any, ids: Any) -> tuple[Any, Any]:
    """An update, as the examples of transformers write it."""
    import jax
    import optax

    def loss(params: Any) -> Any:
        logits = model(ids, params=params, dropout_rng=jax.random.key(0), train=True).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    params, moments = state
    value, gradients = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), value
