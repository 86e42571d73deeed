"""One random GPT-2 as this library and transformers load it, for the benchmarks that compare the two."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@contextmanager
def saved(config: GPT2Config) -> Iterator[Path]:
    """A temporary folder with a randomly initialised model."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).save_pretrained(folder)
        yield Path(folder)


@contextmanager
def both(config: GPT2Config) -> Iterator[tuple[GPT2LMHeadModel, Any]]:
    """The same random model twice: ours, and transformers'."""
    with saved(config) as folder:
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        yield GPT2LMHeadModel.from_pretrained(folder), theirs
