"""Generation and the loss in bfloat16 and int8 on the CPU, beside float32 and CTranslate2 in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gpt2_multi
from benchmarks.generation.generate import generating, prompts
from benchmarks.harness import Row
from benchmarks.harness.floor import FLOOR, bandwidth, weights
from benchmarks.harness.folders import plain, written
from benchmarks.harness.measuring import Case, first_calls, measure
from benchmarks.peers import workers
from benchmarks.tokenizing.tokenizer import english, shared
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes of a weight
PEERS = (*workers.BACKENDS, workers.CTRANSLATE2)
DEMO = Path(gpt2_multi.__file__).parent / "demo"
Losses = dict[str, dict[str, float]]  # of a kind of weights, and who


def run(
    config: GPT2Config | None = None,
    batches: Sequence[int] = (1, 8),
    prompt: int = 32,
    new: int = 64,
    count: int = 3,
    kinds: Sequence[str] = tuple(SIZES),
    who: Sequence[str] = (),
) -> list[Row]:
    """Greedy generation with each kind of weights, and how far the loss is from that in float32."""
    config, speed, rows = plain(config), bandwidth(), []
    random: Losses = {}
    text: Losses = {}
    with written(config) as folder:
        for kind in kinds:
            floor = {FLOOR: new * weights(config, SIZES[kind]) / speed}
            with workers.running([peer.of(kind) for peer in PEERS], folder, who) as running:
                for batch in batches:
                    ids = prompts(config, batch, prompt)
                    case = generating(f"{kind}, batch {batch}", ids, new, {}, same=lambda *_: True)
                    rows += measure([case], running, count)[0].rows(floor=floor)
                random[kind] = losses(running, prompts(config, 4, min(256, config.n_positions)))
            with workers.running([peer.of(kind) for peer in workers.BACKENDS], DEMO, who) as running:
                text[kind] = losses(running, shakespeare())
    return rows + distances("random ids", random) + distances("demo model, tinyshakespeare", text)


def losses(running: Mapping[str, workers.Worker], ids: list[list[int]]) -> dict[str, float]:
    """The loss of each that can tell it."""
    return {who: result for who, (_, result) in first_calls(Case("loss", ("loss", ids), 1), running).items()}


def shakespeare(rows: int = 16, length: int = 256) -> list[list[int]]:
    """Texts for the demo model, which was trained on what stands before them."""
    ids = GPT2Tokenizer.from_pretrained("demo").encode(english(shared())[-8 * rows * length :])
    return [ids[at * length : (at + 1) * length] for at in range(rows)]


def distances(what: str, found: Losses) -> list[Row]:
    """How much more the losses are than in float32, in percent."""
    return [
        Row(f"{kind}, loss of {what}", who, 100 * (loss / found["float32"][who] - 1), "% more")
        for kind in list(found)[1:]
        for who, loss in found[kind].items()
        if who in found["float32"]
    ]
