"""The folders that stand for the names of the pages' models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_multi import GPT2Config, GPT2Tokenizer
from gpt2_multi.tokenizer.engine.bpe import byte_characters
from tests.support.fixtures import write_model

HEADS = ("double_heads", "sequence_classification", "token_classification", "question_answering")


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by what a page takes from the hub: a GPT-2 with two heads, and one for each task."""
    root = tmp_path_factory.mktemp("hub")
    vocab = {token: at for at, token in enumerate([*byte_characters(), "<|endoftext|>"])}
    sizes: dict[str, Any] = dict(vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2)
    for head in HEADS:
        write_model(root / head, GPT2Config(**sizes, bos_token_id=256, eos_token_id=256), head, dtype=np.float32)
        GPT2Tokenizer(vocab, []).save_pretrained(root / head)
    return {"gpt2": root / "double_heads", **{head: root / head for head in HEADS[1:]}}
