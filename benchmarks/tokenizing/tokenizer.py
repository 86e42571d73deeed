"""Speed of the tokenizers beside their peers, in megabytes of UTF-8 a second, on one core and with warm caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS, Row, compare, rounds
from benchmarks.harness.corpus import english, multilingual, repeated, shared
from gpt2_multi.tokenizer.files import to_tokenizer_json
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Encode = Callable[[str], Any]
RULE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DOCUMENT = 100_000  # characters of a call
SMALL = {"size": 100_000, "count": 1}


def run(size: int = 2_000_000, count: int = 3) -> list[Row]:
    """Encode so many characters of two texts, with every tokenizer that is installed."""
    data = shared()
    rows: list[Row] = []
    for what, text in (("English", english(data)), ("multilingual", "\n".join(multilingual(data)))):
        whole = repeated(text, size)
        documents = [whole[at : at + DOCUMENT] for at in range(0, size, DOCUMENT)]
        peers = {who: partial(all_of, encode, documents) for who, encode in encoders(data / "vocab" / "gpt2").items()}
        rows += compare(f"tokenize, {what}", rounds(what, peers, count), "MB/s", len(whole.encode()) / 1e6)
    return rows


def all_of(encode: Encode, documents: list[str]) -> None:
    """Encode one document after the other."""
    for document in documents:
        encode(document)


def encoders(folder: Path) -> dict[str, Encode]:
    """What is called, of each tokenizer that is there."""
    ours, found = GPT2Tokenizer.from_pretrained(folder), {}
    for who, make in PEERS.items():
        try:
            found[who] = make(ours, folder)
        except ImportError as error:
            print(f"not measured: {who}: {error}")
    return found


# --- the tokenizers --------------------------------------------------------------------------------------------------


def fast(ours: GPT2Tokenizer, folder: Path) -> Encode:
    """This library's compiled one."""
    from gpt2_multi.tokenizer.fast import GPT2TokenizerFast

    return partial(GPT2TokenizerFast.from_pretrained(folder).encode, truncation=False)


def python(ours: GPT2Tokenizer, folder: Path) -> Encode:
    """This library's in Python."""
    return partial(ours.encode, truncation=False)


def tiktoken(ours: GPT2Tokenizer, folder: Path) -> Encode:
    """tiktoken, without a search for control tokens."""
    return tiktoken_encoding(ours).encode_ordinary  # type: ignore[no-any-return]


def tokenizers(ours: GPT2Tokenizer, folder: Path) -> Encode:
    """tokenizers, up to a list."""
    peer = tokenizers_tokenizer(ours)
    return lambda text: peer.encode(text).ids


def transformers(ours: GPT2Tokenizer, folder: Path) -> Encode:
    """From version 5 on its one GPT2Tokenizer is built on `tokenizers`."""
    from transformers import GPT2Tokenizer as Peer

    peer = Peer.from_pretrained(str(folder))
    return lambda text: peer(text)["input_ids"]


def gigatoken(ours: GPT2Tokenizer, folder: Path) -> Encode:
    """gigatoken, up to a list."""
    peer = gigatoken_tokenizer(ours)
    return lambda text: peer.encode(text).tolist()


PEERS: dict[str, Callable[[GPT2Tokenizer, Path], Encode]] = {
    f"{OURS}, GPT2TokenizerFast": fast,
    f"{OURS}, GPT2Tokenizer": python,
    "tiktoken": tiktoken,
    "tokenizers": tokenizers,
    "transformers": transformers,
    "gigatoken": gigatoken,
}


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


def gigatoken_tokenizer(ours: GPT2Tokenizer) -> Any:
    """gigatoken with the same vocabulary."""
    from gigatoken import Tokenizer

    return Tokenizer.from_json(tokenizer_json(ours))


def tokenizer_json(ours: GPT2Tokenizer) -> str:
    """A tokenizer.json with the same vocabulary."""
    merges = ours._bpe.merges
    return to_tokenizer_json(ours.get_vocab(), merges, {}, {"add_prefix_space": False, "add_bos_token": False})
