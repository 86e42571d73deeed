"""A small model whose tokens are bytes, and what scores with it in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt2_multi.app.evaluate.scorer import Scorer
from gpt2_multi.model import reference
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.app.conftest import END, byte_vocabulary
from tests.support.fixtures import write_model

Array = np.ndarray[Any, Any]
CONFIG = GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=END, eos_token_id=END)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    """The folder of the model, and its weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    weights = write_model(folder, CONFIG, "lm", dtype=np.float32)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder, weights


class Oracle:
    """The reference in the place of a backend; it notes the shapes that it reads."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.weights, self.shapes = weights, list[tuple[int, ...]]()

    def log_probs(self, model: Any, ids: Array, mask: Array) -> tuple[Array, Array]:
        self.shapes.append(ids.shape)
        logits = logits_of(self.weights, ids[:, :-1])
        chosen = np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
        return chosen - np.log(np.exp(logits).sum(-1)), logits.argmax(-1) == ids[:, 1:]


def logits_of(weights: dict[str, Array], ids: Array) -> Array:
    return reference.oracle(CONFIG, weights, ids)[-1]


@pytest.fixture
def scorer(tiny: tuple[Path, dict[str, Array]]) -> Scorer:
    """What scores texts in NumPy."""
    folder, weights = tiny
    tokenizer = GPT2Tokenizer.from_pretrained(folder, split_special_tokens=True)
    return Scorer(SimpleNamespace(config=CONFIG), tokenizer, Oracle(weights), "cpu")  # type: ignore[arg-type]
