"""The peers of the JAX benchmarks, each compiled as it is by default; see `benchmarks.peers`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.peers import OPTIMIZER, Ids, KerasHub, serve


class Ours:
    """This library."""

    package = "gpt2_multi"

    def __init__(self, folder: Path, _: bool) -> None:
        from gpt2_multi.flax import FlaxGPT2LMHeadModel

        self.model: Any = FlaxGPT2LMHeadModel.from_pretrained(folder)
        self.state: Any = None

    def generate(self, ids: Ids, new: int) -> Any:
        return self.model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)

    def train(self, ids: Ids) -> Any:
        from gpt2_multi.flax.training import create_train_state, optimizer, train_step

        if self.state is None:
            self.state = create_train_state(self.model, optimizer(**OPTIMIZER, max_norm=None))
        self.state, metrics = train_step(self.state, {"input_ids": ids, "labels": ids})
        return metrics["loss"]


class OursPyTorch:
    """This library in PyTorch."""

    package = "gpt2_multi"

    def __init__(self, folder: Path, _: bool) -> None:
        import torch

        from gpt2_multi.pt import GPT2LMHeadModel
        from gpt2_multi.pt.training import train_step

        model = GPT2LMHeadModel.from_pretrained(folder).train()
        options = {"lr": OPTIMIZER["learning_rate"], "weight_decay": OPTIMIZER["weight_decay"]}
        self.step = partial(train_step, model, torch.optim.AdamW(model.parameters(), **options))
        self.tensor = torch.tensor

    def train(self, ids: Ids) -> Any:
        batch = {"input_ids": self.tensor(ids), "labels": self.tensor(ids)}
        return self.step([batch], max_norm=None)


class Transformers:
    """The last transformers that has Flax; its users compile both calls."""

    package = "transformers"

    def __init__(self, folder: Path, _: bool) -> None:
        from safetensors.numpy import load_file
        from transformers import FlaxGPT2LMHeadModel, GPT2Config
        from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

        self.model = FlaxGPT2LMHeadModel(GPT2Config.from_pretrained(folder))
        self.model.params = convert_pytorch_state_dict_to_flax(load_file(folder / "model.safetensors"), self.model)
        self.generates: dict[int, Callable[..., Any]] = {}
        self.state: Any = None

    def generate(self, ids: Ids, new: int) -> Any:
        import jax

        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        run = self.generates.setdefault(new, jax.jit(partial(self.model.generate, **options)))
        return run(ids, params=self.model.params).sequences

    def train(self, ids: Ids) -> Any:
        import jax
        import optax

        optimizer = optax.adamw(**OPTIMIZER)
        if self.state is None:
            self.step = jax.jit(partial(step, self.model, optimizer), donate_argnums=0)
            self.state = jax.tree.map(jax.numpy.array, (self.model.params, optimizer.init(self.model.params)))
        self.state, loss = self.step(self.state, ids)
        return loss


def step(model: Any, optimizer: Any, state: Any, ids: Any) -> tuple[Any, Any]:
    """An update of transformers' model, as its examples write it."""
    import jax
    import optax

    def loss(params: Any) -> Any:
        logits = model(ids, params=params, dropout_rng=jax.random.key(0), train=True).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    params, moments = state
    value, gradients = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), value


class CTranslate2:
    """An engine in C++, which converts the folder into its own format and works on the names of tokens."""

    package = "ctranslate2"

    def __init__(self, folder: Path, _: bool) -> None:
        import ctranslate2

        size = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "0")
        tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(size)}, **special)
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        converter.load_tokenizer = lambda *_: tokenizer
        place = converter.convert(str(folder / self.package), quantization="float32")
        self.model = ctranslate2.Generator(place, compute_type="float32", intra_threads=os.cpu_count())

    def generate(self, ids: Ids, new: int) -> Any:
        options = {"max_length": new, "min_length": new, "include_prompt_in_result": False}
        results = self.model.generate_batch([[*map(str, row)] for row in ids], **options)
        return [[*row, *result.sequences_ids[0]] for row, result in zip(ids, results, strict=True)]


PEERS: dict[str, Callable[[Path, bool], Any]] = {
    "gpt2_multi": Ours,
    "gpt2_multi, PyTorch": OursPyTorch,
    "transformers": Transformers,
    "kerashub": KerasHub,
    "ctranslate2": CTranslate2,
}

if __name__ == "__main__":
    serve(PEERS, *sys.argv[1:])
