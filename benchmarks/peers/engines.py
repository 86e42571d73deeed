"""KerasHub, which runs on TensorFlow and on JAX, and CTranslate2, which is written in C++."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from benchmarks.peers.calls import ADAMW, Process, as_ids, threads


class KerasHub(Process):
    """KerasHub, which takes sequences of their final length and labels that are shifted already."""

    package = "keras-hub"

    def load(self, folder: Path) -> None:
        from keras_hub.models import GPT2CausalLM

        modes = self.modes
        self.functions: dict[str, Any] = {}  # that generate, of the options for which they were compiled
        dtype = "mixed_bfloat16" if "autocast" in modes else "bfloat16" if "bfloat16" in modes else "float32"
        self.model = GPT2CausalLM.from_preset(str(folder), preprocessor=None, dtype=dtype)
        self.compile("greedy")

    def compile(self, sampler: Any) -> None:
        """Say how it trains, and how it chooses tokens."""
        import keras

        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
        optimizer, compiled = keras.optimizers.AdamW(**ADAMW), "xla" in self.modes or "auto"
        self.model.compile(optimizer, loss, weighted_metrics=[], sampler=sampler, jit_compile=compiled)

    def choose(self, options: Any) -> None:
        """Let it generate with these options: by the function that it has compiled for them, or will."""
        key = str(options)
        if key not in self.functions:
            self.compile(sampler(options))
            self.functions[key] = self.model.sampler, self.model.make_generate_function()
        self.model.sampler, self.model.generate_function = self.functions[key]

    def generate(self, ids: Any, new: int, options: Any) -> Any:
        if "prompt_lookup_num_tokens" in options:
            raise NotImplementedError("it has no prompt lookup")
        self.choose(options)
        given, room = as_ids(ids), ((0, 0), (0, new))
        inputs = {"token_ids": np.pad(given, room), "padding_mask": np.pad(np.ones_like(given), room)}
        return self.model.generate(inputs, stop_token_ids=None)["token_ids"]

    def train(self, ids: Any) -> Any:
        given = as_ids(ids)
        counted = np.ones(given.shape, np.float32)
        counted[:, -1] = 0
        inputs = {"token_ids": given, "padding_mask": np.ones_like(given)}
        return self.model.train_on_batch(inputs, np.roll(given, -1, 1), counted)


def sampler(options: Any) -> Any:
    """KerasHub's way to choose tokens."""
    from keras_hub import samplers

    if "num_beams" in options:
        return samplers.BeamSampler(num_beams=options["num_beams"])
    return samplers.TopPSampler(options["top_p"], k=options["top_k"]) if "top_p" in options else "greedy"


class CTranslate2(Process):
    """CTranslate2, which converts the folder into its own format and works on the names of tokens."""

    package = "ctranslate2"
    names: ClassVar = {"num_beams": "beam_size", "top_k": "sampling_topk", "top_p": "sampling_topp"}

    def load(self, folder: Path) -> None:
        import ctranslate2

        size = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "0")
        tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(size)}, **special)
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        converter.load_tokenizer = lambda *_: tokenizer
        dtype = next((mode for mode in ("int8", "bfloat16") if mode in self.modes), "float32")
        place = converter.convert(str(folder / f"{self.package}-{dtype}"), quantization=dtype)
        self.model = ctranslate2.Generator(place, compute_type=dtype, intra_threads=threads())

    def generate(self, ids: Any, new: int, options: Any) -> Any:
        if "prompt_lookup_num_tokens" in options:
            raise NotImplementedError("it has no prompt lookup")
        chosen = {self.names[name]: value for name, value in options.items() if name in self.names}
        length = {"max_length": new, "min_length": new, "include_prompt_in_result": False}
        results = self.model.generate_batch([[*map(str, row)] for row in ids], **length, **chosen)
        return [[*row, *result.sequences_ids[0]] for row, result in zip(ids, results, strict=True)]

    def loss(self, ids: Any) -> float:
        results = self.model.score_batch([[*map(str, row)] for row in ids])
        return -float(np.mean([result.log_probs for result in results]))
