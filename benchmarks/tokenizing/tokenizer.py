"""Speed of the tokenizers beside their peers, in megabytes of UTF-8 a second, on one core and with warm caches."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from gpt2_multi.tokenizer.files import to_tokenizer_json
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Encode = Callable[[str], Any]
RULE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SIZE = 4_000_000  # characters of each text
DOCUMENT = 100_000  # characters of a call
ROUNDS = 5
OURS = "GPT2Tokenizer"
WORDS = ("prose", "emoji", "comb", "cjk")  # kinds of texts in the fixtures


def run() -> list[Row]:
    """Measure every tokenizer that is installed; the peers take turns, and the best of the rounds counts."""
    data = shared()
    peers = _peers(GPT2Tokenizer.from_pretrained(data / "vocab" / "gpt2"), data / "vocab" / "gpt2")
    rows: list[Row] = []
    for what, text in (("English", english(data)), ("multilingual", _multilingual(data))):
        documents = [text[at : at + DOCUMENT] for at in range(0, len(text), DOCUMENT)]
        rows += _rows(f"tokenize, {what}", _measure(peers, documents), sum(len(part.encode()) for part in documents))
    return rows


def shared() -> Path:
    """The folder with texts and vocabularies."""
    return Path(os.environ.get("GPT2_MULTI_SHARED") or Path(__file__).resolve().parents[3] / "shared")


def english(data: Path, size: int = SIZE) -> str:
    """So many characters of Shakespeare, repeated where there are not enough."""
    text = (data / "text" / "tinyshakespeare.txt").read_text("utf-8")
    return (text * (size // len(text) + 1))[:size]


def _multilingual(data: Path) -> str:
    """The texts of the fixtures that are made of words of many languages, emoji among them."""
    cases = map(json.loads, (data / "fixtures" / "tokens.jsonl").read_text("utf-8").splitlines())
    text = "\n".join(case["text"] for case in cases if case["kind"] in WORDS)
    text = text.encode("utf-8", "replace").decode()
    return (text * (SIZE // len(text) + 1))[:SIZE]


def _measure(peers: dict[str, Encode], documents: list[str]) -> dict[str, float]:
    best = dict.fromkeys(peers, float("inf"))
    for _ in range(ROUNDS):
        for who, encode in peers.items():
            start = time.perf_counter()
            for document in documents:
                encode(document)
            best[who] = min(best[who], time.perf_counter() - start)
    return best


def _rows(what: str, seconds: dict[str, float], size: int) -> list[Row]:
    return [Row(what, who, size / 1e6 / took, "MB/s", {OURS: took / seconds[OURS]}) for who, took in seconds.items()]


def _peers(ours: GPT2Tokenizer, folder: Path) -> dict[str, Encode]:
    peers: dict[str, Encode] = {OURS: lambda text: ours.encode(text, truncation=False)}
    for add in (_add_fast, _add_tiktoken, _add_tokenizers, _add_transformers, _add_gigatoken):
        try:
            add(peers, ours, folder)
        except ImportError as error:
            print(f"not measured: {error}")
    return peers


def _add_fast(peers: dict[str, Encode], ours: GPT2Tokenizer, folder: Path) -> None:
    from gpt2_multi.tokenizer.fast import GPT2TokenizerFast

    fast = GPT2TokenizerFast.from_pretrained(folder)
    peers["GPT2TokenizerFast"] = lambda text: fast.encode(text, truncation=False)


def _add_tiktoken(peers: dict[str, Encode], ours: GPT2Tokenizer, folder: Path) -> None:
    peer = tiktoken_encoding(ours)
    peers["tiktoken, encode_ordinary"] = peer.encode_ordinary
    peers["tiktoken, encode"] = lambda text: peer.encode(text, allowed_special="all")


def _add_tokenizers(peers: dict[str, Encode], ours: GPT2Tokenizer, folder: Path) -> None:
    peer = tokenizers_tokenizer(ours)
    peers["tokenizers"] = lambda text: peer.encode(text).ids


def _add_transformers(peers: dict[str, Encode], ours: GPT2Tokenizer, folder: Path) -> None:
    """From version 5 on its one GPT2Tokenizer is built on `tokenizers`; before, the slow one is pure Python."""
    from transformers import GPT2Tokenizer as Peer

    peer = Peer.from_pretrained(str(folder))
    kind = "on tokenizers; none in Python" if peer.is_fast else "in Python"
    peers[f"transformers ({kind})"] = lambda text: peer(text)["input_ids"]


def _add_gigatoken(peers: dict[str, Encode], ours: GPT2Tokenizer, folder: Path) -> None:
    from gigatoken import Tokenizer

    peer = Tokenizer.from_json(tokenizer_json(ours))
    peers["gigatoken, to lists"] = lambda text: peer.encode(text).tolist()


def tiktoken_encoding(ours: GPT2Tokenizer) -> Any:
    """tiktoken with the same vocabulary."""
    import tiktoken

    ranks = {ours.decode_bytes(at): at for at in range(ours.vocab_size - 1)}
    special = {"<|endoftext|>": ours.vocab_size - 1}
    return tiktoken.Encoding("gpt2-here", pat_str=RULE, mergeable_ranks=ranks, special_tokens=special)


def tokenizers_tokenizer(ours: GPT2Tokenizer) -> Any:
    """tokenizers with the same vocabulary."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json(ours))


def tokenizer_json(ours: GPT2Tokenizer) -> str:
    """A tokenizer.json with the same vocabulary."""
    merges = ours._bpe.merges
    return to_tokenizer_json(ours.get_vocab(), merges, {}, {"add_prefix_space": False, "add_bos_token": False})
