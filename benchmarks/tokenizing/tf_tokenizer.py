"""TensorFlow's tokenizer in a graph, beside KerasHub's and tokenizers in Python: megabytes of text a second on a core.

The layers are given tensors, and the others lists. All but this library's layer and tiktoken remember words, over the
rounds too; of KerasHub's, "cold" is a new one that has seen none of the text, and "warm" is its second time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.harness import OURS, Row, compare, rounds
from benchmarks.harness.corpus import english, repeated, shared
from benchmarks.harness.measuring import Case, first_results
from benchmarks.harness.rows import elapsed
from benchmarks.peers.workers import Peer, Worker, running

ONE_CORE = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "KERAS_BACKEND": "tensorflow"}
KERASHUB = "KerasHub"
PEERS = [
    Peer(name, f"tokenizers:{peer}", python, environment=ONE_CORE)
    for name, peer, python in (
        (OURS, "Ours", ""),
        (KERASHUB, "KerasHub", "TF_KERASHUB"),
        ("tiktoken", "Tiktoken", ""),
        ("tokenizers", "Tokenizers", ""),
        (f"{OURS}, GPT2Tokenizer", "Python", ""),
    )
]
WORD = ["Tokenization"]  # which the text does not have
SMALL = {"size": 10_000, "documents": 2, "count": 1}


def run(size: int = 1_000_000, documents: int = 32, count: int = 3) -> list[Row]:
    """English text of so many characters, in one piece and as a batch of documents, with GPT-2's own vocabulary."""
    text, length = repeated(english(shared()), size), -(-size // documents)
    pieces = [text[at : at + length] for at in range(0, size, length)]
    with vocabulary() as folder, running(PEERS, folder) as workers:
        rows = made(workers)
        for what, texts in (("one text", [text]), (f"{documents} documents", pieces)):
            rows += measured(f"TensorFlow, tokenize, {what}", workers, texts, count)
    return rows


@contextmanager
def vocabulary() -> Iterator[Path]:
    """A temporary folder with GPT-2's vocabulary, in which there is room for what the peers say."""
    with tempfile.TemporaryDirectory() as name:
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(shared() / "vocab" / "gpt2" / file, name)
        yield Path(name)


def made(workers: Mapping[str, Worker]) -> list[Row]:
    """Rows of the seconds until a layer is made, and traced, and has encoded a word."""
    layers = {who: worker for who, worker in workers.items() if who == OURS or who.startswith(KERASHUB)}
    seconds = {who: [elapsed(partial(worker.ask, "first", WORD))] for who, worker in layers.items()}
    return compare("TensorFlow, tokenize, first call", seconds, "s")


def measured(what: str, workers: Mapping[str, Worker], texts: Sequence[str], count: int) -> list[Row]:
    """Rows of the speed of every tokenizer; it is marked where its ids are not this library's."""
    found = first_results(Case(what, ("ids", texts), 1), workers)
    peers = {label: call for who in found for label, call in calls(who, workers[who], texts).items()}
    seconds = rounds(what, peers, count, timed=lambda call: call())
    rows = compare(what, seconds, "MB/s", sum(len(text.encode()) for text in texts) / 1e6)
    others = tuple(who for who, ids in found.items() if ids != found[OURS])
    return [replace(row, differs=row.who.startswith(others)) for row in rows]


def calls(who: str, worker: Worker, texts: Sequence[str]) -> dict[str, Callable[[], float]]:
    """What a round asks of a tokenizer: its seconds; of KerasHub's, those of its first and of its second time."""
    again = partial(worker.ask, "seconds", texts)
    if not who.startswith(KERASHUB):
        return {who: again}
    return {f"{who}, cold": partial(cold, worker, texts), f"{who}, warm": again}


def cold(worker: Worker, texts: Sequence[str]) -> float:
    """The seconds of a new layer, which is traced before."""
    worker.ask("first", WORD)
    return float(worker.ask("seconds", texts))
