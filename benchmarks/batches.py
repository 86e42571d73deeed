"""Greedy generation by every installed backend and by transformers, on the CPU, float32, for several batch sizes.

`python -m benchmarks batches --picture batches.svg` draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from benchmarks import folders
from benchmarks.harness import OURS, Row, compare, rounds
from gpt2_multi.app import backends
from gpt2_multi.model.config import GPT2Config


def run(
    config: GPT2Config | None = None,
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 32,
    new: int = 64,
    count: int = 3,
) -> list[Row]:
    """Continue random prompts of `prompt` ids by `new` tokens, for each batch size."""
    config, rows = folders.plain(config), []
    with folders.written(config) as folder:
        models = {name: backends.resolve(name).load(folder, "cpu") for name in backends.installed()}
        for batch in batches:
            ids = np.random.default_rng(batch).integers(config.vocab_size, size=(batch, prompt))
            peers = {title(name): caller(name, model, ids, new) for name, model in models.items()}
            if "pt" in models:
                peers["transformers"] = transformers(folder, ids, new)
            what = f"batch {batch}"
            rows += compare(what, rounds(what, peers, count), "tokens/s", batch * new)
    first = f"{OURS}, {backends.BACKENDS[backends.installed()[0]].title}"
    return [replace(row, who=first) if row.who == OURS else row for row in rows]


def title(name: str) -> str:
    """What a backend is called in the rows; the first installed is what the others are compared with."""
    return OURS if name == backends.installed()[0] else f"{OURS}, {backends.BACKENDS[name].title}"


def caller(name: str, model: object, ids: np.ndarray, new: int) -> Callable[[], object]:  # type: ignore[type-arg]
    """A call that generates and waits for the tokens."""
    if name == "pt":
        import torch

        given = torch.from_numpy(ids)
        return lambda: model.generate(given, max_new_tokens=new)  # type: ignore[attr-defined]
    return lambda: np.asarray(model.generate(ids, max_new_tokens=new))  # type: ignore[attr-defined]


def transformers(folder: object, ids: np.ndarray, new: int) -> Callable[[], object]:  # type: ignore[type-arg]
    """The same by transformers."""
    import torch

    from benchmarks.models import transformers

    model, given = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32), torch.from_numpy(ids)
    return lambda: model.generate(
        given, attention_mask=torch.ones_like(given), pad_token_id=0, do_sample=False, max_new_tokens=new
    )
