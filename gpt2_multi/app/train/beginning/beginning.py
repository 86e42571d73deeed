"""What a run begins from: a model, its tokenizer, the tokens, and the plan; written down for all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_multi.app import backends
from gpt2_multi.app.train.beginning.choices import Asked, going_on, plan_of
from gpt2_multi.app.train.beginning.models import TOKENIZER, Model, chosen, new_weights, weights_hash
from gpt2_multi.app.train.data.shards import INDEX, open_files, prepare, reopen
from gpt2_multi.app.train.data.tokens import Tokens, divided
from gpt2_multi.app.train.folder import Folder
from gpt2_multi.app.train.plan import HELD_OUT, Plan
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files.documents import find
from gpt2_multi.files.hub import resolve
from gpt2_multi.model.weights import parameter_count

Find = Callable[[str, tuple[str, ...]], Tokens]
FEWEST = 2  # tokens to measure on: one of them predicts the other
SAMPLED, SAMPLE = 64, 4096  # pieces of the tokens that are hashed, and their length


@dataclass(frozen=True)
class Beginning:
    """What all processes of a run know: `facts` are what the model card says besides."""

    asked: Asked
    plan: Plan
    start: Path  # the model folder to build the engine from
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "asked": self.asked.to_dict(), "plan": self.plan.to_dict(), "start": str(self.start), "facts": self.facts,
        }  # fmt: skip

    @classmethod
    def read(cls, folder: Folder) -> Beginning:
        """What the first process wrote."""
        found = folder.read()
        try:
            asked, plan = Asked.from_dict(found["asked"]), Plan.from_dict(found["plan"])
            return cls(asked, plan, Path(found["start"]), found["facts"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder.begun}: expected what this version writes, found something else ({error}); start another run"
            ) from None

    def tokens(self, folder: Folder) -> tuple[Tokens, Tokens | None]:
        """The tokens to learn from, and those held out, as the run began with them, whatever became of the texts."""

        def found(name: str, sources: tuple[str, ...]) -> Tokens:
            index = folder.tokens / name / INDEX
            if index.exists():
                return reopen(index.parent)
            files = [] if "-" in sources else find(sources).files
            if not files or any(file.kind != "tokens" for file in files):
                raise gone(index)
            return open_files(files)

        learned, held = divide(self.asked, found, self.facts["end"])
        if fingerprint(learned) != self.plan.data:
            raise CheckpointError(f"{folder.tokens}: the tokens are no more what they were; start another run")
        return learned, held


def begin(asked: Asked, folder: Folder) -> Beginning:
    """Begin a run: fetch the model, learn or fetch a tokenizer, make shards of the data, decide what was left open."""
    asked = replace(asked, model=asked.model or "demo")
    model = chosen(asked)
    folder.begin({"asked": asked.to_dict()})

    def found(name: str, sources: tuple[str, ...]) -> Tokens:
        field = None if name == "val" and sources[0].endswith(".txt") else asked.field
        return prepare(sources, model.tokenizer, folder.tokens / name, field, vocab_size=model.config.vocab_size)

    learned, held = divide(asked, found, model.tokenizer.eos_token_id)
    backend = asked.backend or next(iter(backends.installed()))
    plan = plan_of(asked, backend, model.config, model.source is None, len(learned), fingerprint(learned))
    start = model.source or new_weights(folder.start, model.config, plan.seed)
    model.tokenizer.save_pretrained(folder.path)
    counts = {"tokens": len(learned), "held": 0 if held is None else len(held)}
    weights = {"weights": weights_hash(start) if plan.lora else None}
    beginning = Beginning(asked, plan, start, facts_of(asked, model, backend) | counts | weights)
    folder.begin(beginning.to_dict())
    return beginning


def facts_of(asked: Asked, model: Model, backend: str) -> dict[str, Any]:
    """What the model card says of where a run began."""
    name, is_new = asked.model or "", model.source is None
    on_hub = not is_new and not Path(name).is_dir() and name != "demo"
    return {
        "data": list(asked.data), "val": asked.val, "model": name, "is_new": is_new, "hub": name if on_hub else None,
        "parameters": parameter_count(model.config), "end": model.tokenizer.eos_token_id,
        "tokenizer": asked.tokenizer or (TOKENIZER if is_new else name),
        "framework": f"{backends.BACKENDS[backend].title} {backends.version(backend)}",
    }  # fmt: skip


def go_on(asked: Asked, folder: Folder) -> Beginning:
    """Go on with a run, whose states have all weights; those under adapters have to be what they were."""
    saved = Beginning.read(folder)
    changed, plan = going_on(asked, saved.asked, saved.plan)
    start = resolve(saved.asked.model or "") if plan.lora else folder.path
    if not plan.lora and not (config := start / "config.json").exists():  # a guess at its heads may be another model
        raise gone(config)
    if plan.lora and weights_hash(start) != saved.facts["weights"]:
        raise CheckpointError(f"--model {saved.asked.model}: its weights are no more what they were; start another run")
    beginning = Beginning(changed, plan, start, saved.facts)
    folder.begin(beginning.to_dict())
    return beginning


def gone(path: Path) -> CheckpointError:
    """The error of a file of a run that is not there any more."""
    return CheckpointError(f"{path}: is gone, and the run needs it to go on; put it back, or start another run")


# --- data -------------------------------------------------------------------------------------------------------------


def divide(asked: Asked, found: Find, end: int | None) -> tuple[Tokens, Tokens | None]:
    """The tokens to learn from, and those held out: of a source of their own, or the end of all.

    `found` gives the tokens of sources, by the name of their place in the folder.
    """
    tokens = found("train", asked.data)
    if asked.val is not None:
        return tokens, found("val", (asked.val,))
    fraction = HELD_OUT if asked.val_fraction is None else asked.val_fraction
    if not fraction:
        return tokens, None
    learned, held = divided(tokens, fraction, end)
    if len(held) < FEWEST:
        raise InputError(
            f"--val-fraction: {fraction} of the data is {len(held)} tokens, too few to measure on; 0 is none"
        )
    return learned, held


def fingerprint(tokens: Tokens) -> str:
    """What says of tokens that they are the same, without reading all of them."""
    hashed = hashlib.sha256(str(len(tokens)).encode())
    for start in np.linspace(0, max(len(tokens) - SAMPLE, 0), SAMPLED).astype(np.int64).tolist():
        hashed.update(tokens[start : start + SAMPLE].astype("<i4").tobytes())
    return hashed.hexdigest()[:16]
