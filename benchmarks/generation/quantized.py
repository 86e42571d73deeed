"""Generation and the loss in bfloat16 and int8 on the CPU, beside float32 and CTranslate2 in each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import gpt2_multi
from benchmarks.generation.generate import generating, prompts
from benchmarks.harness import Row, pictures
from benchmarks.harness.corpus import english, shared
from benchmarks.harness.folders import TINY, plain, written
from benchmarks.harness.measuring import Case, first_results, measure
from benchmarks.harness.rows import FLOOR
from benchmarks.peers import workers
from gpt2_multi.app.doctor.floor import bandwidth, weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes of a weight
PEERS = (*workers.BACKENDS, workers.CTRANSLATE2)
SMALL = {"config": TINY, "batches": (1,), "prompt": 8, "new": 8, "count": 1, "texts": 2}
Losses = dict[str, dict[str, float]]  # of a kind of weights, and who


def run(
    config: GPT2Config | None = None,
    batches: Sequence[int] = (1, 8),
    prompt: int = 32,
    new: int = 64,
    count: int = 3,
    texts: int = 8,
    kinds: Sequence[str] = tuple(SIZES),
    who: Sequence[str] = (),
) -> list[Row]:
    """Greedy generation with each kind of weights, and how far the loss is from that in float32."""
    config, speed, rows = plain(config), bandwidth(), []
    random: Losses = {}
    text: Losses = {}
    with written(config) as folder, demo() as known:
        for kind in kinds:
            floor = {FLOOR: new * weights(config, SIZES[kind]) / speed}
            with workers.running([peer.of(kind) for peer in PEERS], folder, who) as running:
                for batch in batches:
                    ids = prompts(config, batch, prompt)
                    case = generating(f"{kind}, batch {batch}", ids, new, {}, same=lambda *_: True)
                    rows += measure([case], running, count)[0].rows(floor=floor)
                random[kind] = losses(running, prompts(config, texts, min(256, config.n_positions)))
                first_results(Case(f"{kind}, demo model", ("turn_to", str(known)), 1), running)
                text[kind] = losses(running, shakespeare(texts))
    return rows + gains(rows, kinds) + distances("random ids", random) + distances("demo model, Shakespeare", text)


@contextmanager
def demo() -> Iterator[Path]:
    """A temporary folder with the demo model, in which there is room for what the peers write."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(shutil.copytree(Path(gpt2_multi.__file__).parent / "demo", name, dirs_exist_ok=True))


def losses(running: Mapping[str, workers.Worker], ids: list[list[int]]) -> dict[str, float]:
    """The loss of each that can tell it."""
    return first_results(Case("loss", ("loss", ids), 1), running)


def shakespeare(rows: int, length: int = 256) -> list[list[int]]:
    """Texts for the demo model, which was trained on what stands before them."""
    ids = GPT2Tokenizer.from_pretrained("demo").encode(english(shared())[-8 * rows * length :])
    return [ids[at * length : (at + 1) * length] for at in range(rows)]


def gains(rows: Sequence[Row], kinds: Sequence[str]) -> list[Row]:
    """How many times as quick each is as by itself in the first of the kinds."""
    speeds = {(row.what, row.who): row.value for row in rows if row.who != FLOOR}
    found = []
    for (what, who), value in speeds.items():
        kind, rest = what.split(", ", 1)
        if kind != kinds[0] and (plainly := speeds.get((f"{kinds[0]}, {rest}", who))):
            found.append(Row(f"{what}, of its {kinds[0]}", who, value / plainly, "times"))
    return found


def distances(what: str, found: Losses) -> list[Row]:
    """How much more the losses are than in the first of the kinds, in percent."""
    first, *others = found
    return [
        Row(f"{kind}, loss of {what}", who, 100 * (loss / found[first][who] - 1), "% more than in " + first)
        for kind in others
        for who, loss in found[kind].items()
        if who in found[first]
    ]


def draw(rows: Sequence[Row], *where: object) -> None:
    """The speeds alone."""
    pictures.bars([row for row in rows if row.unit == "tokens/s"], *where)  # type: ignore[arg-type]
