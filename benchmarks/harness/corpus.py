"""Text as varied as that of the web, of any size, the same each time: what is repeated flatters a memory of words.

English is drawn by Zipf's law from a list of 1.5 million words: those of Shakespeare, the frequent ones first, and then
halves of two of them put together. (A gigabyte of OpenWebText has 1.3 million.) Every twentieth paragraph is a text of
the fixtures that has words of many languages, emoji among them.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 1_500_000
PARAGRAPHS, LENGTH = 200, 100  # of a block, and the words of one
KINDS = ("prose", "emoji", "comb", "cjk")  # of texts in the fixtures


def corpus(data: Path, size: int, seed: int = 0) -> Iterator[bytes]:
    """So many bytes of text or a few more, in blocks."""
    rng = np.random.default_rng(seed)
    words, others = lexicon(data, rng), multilingual(data)
    edges = np.cumsum(1 / (np.arange(len(words)) + 2.7))  # as Mandelbrot has it for English
    done = 0
    while done < size:
        drawn = words[np.searchsorted(edges, rng.random(PARAGRAPHS * LENGTH) * edges[-1])].reshape(PARAGRAPHS, LENGTH)
        paragraphs = [" ".join(row) for row in drawn.tolist()]
        paragraphs[::20] = [others[at] for at in rng.integers(len(others), size=len(paragraphs[::20]))]
        block = "".join(f"{paragraph}\n\n" for paragraph in paragraphs).encode()
        done += len(block)
        yield block


def lexicon(data: Path, rng: np.random.Generator) -> Any:
    """The words, the frequent ones first."""
    known = Counter(english(data).split())
    words = [word for word, _ in known.most_common()]
    first, second = rng.integers(len(words), size=(2, WORDS)).tolist()
    coined = (
        words[a][: (len(words[a]) + 1) // 2] + words[b][len(words[b]) // 2 :].lower()
        for a, b in zip(first, second, strict=True)
    )
    return np.array(list(dict.fromkeys([*words, *coined])), object)


def multilingual(data: Path) -> list[str]:
    """The texts of the fixtures that are made of words of many languages."""
    cases = map(json.loads, (data / "fixtures" / "tokens.jsonl").read_text("utf-8").splitlines())
    return [case["text"].encode("utf-8", "replace").decode() for case in cases if case["kind"] in KINDS]


def shared() -> Path:
    """The folder with texts and vocabularies."""
    return Path(os.environ.get("GPT2_MULTI_SHARED") or Path(__file__).resolve().parents[3] / "shared")


def english(data: Path) -> str:
    """Shakespeare."""
    return (data / "text" / "tinyshakespeare.txt").read_text("utf-8")


def repeated(text: str, size: int) -> str:
    """So many characters of a text, which is repeated where it has not enough."""
    return (text * (size // len(text) + 1))[:size]
