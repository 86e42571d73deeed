"""A file of varied text to arrays of ids on all cores: megabytes a second from the first byte, and the most memory.

Each tokenizer is loaded in a fresh process, which has seen no text. The memory is what it and the processes that it
starts hold for themselves (USS), summed up twenty times a second while it encodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import OURS, PeerError, Row, compare
from benchmarks.harness.corpus import corpus, shared
from benchmarks.peers.calls import threads
from benchmarks.tokenizing.tokenizer import gigatoken_tokenizer, tiktoken_encoding, tokenizers_tokenizer
from gpt2_multi.tokenizer.engine.texts import parts, read
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Encode = Callable[[Path], Iterable[Any]]
EVERY = 0.05  # seconds
CORES = threads()
SMALL = {"size": 1}


def run(size: int = 40, who: Sequence[str] = ()) -> list[Row]:
    """A file of `size` megabytes, once by each tokenizer."""
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, ids = Path(folder, "corpus.txt"), None
        with path.open("wb") as file:
            file.writelines(corpus(shared(), size * 1_000_000))
        for name in (name for name in PEERS if not who or name.startswith(tuple(who))):
            found = measured(name, path)
            if found is None:
                continue
            ids = ids or found["ids"]
            label = name if found["ids"] == ids else f"{name} (DIFFERENT)"
            seconds[label], memory[label] = [found["seconds"]], [found["peak"]]
        megabytes = path.stat().st_size / 1e6
    if not any(name.startswith(OURS) for name in seconds):
        raise PeerError("none of this library's tokenizers was measured, with which others are compared")
    return [
        *compare(f"tokenize a file of {size} MB", seconds, "MB/s", megabytes),
        *compare("peak memory of that", memory, "MB"),
    ]


def measured(name: str, path: Path) -> Any:
    """What a fresh process says of a tokenizer, and the most memory that it held; None if it is not installed."""
    command = [sys.executable, "-m", __name__, name, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not process.stdout.readline():  # it is loaded, and begins
            print(f"not measured: {name}")
            return None
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, held(psutil.Process(process.pid)))
            time.sleep(EVERY)
        return {**json.loads(process.stdout.read()), "peak": peak}


def held(process: psutil.Process) -> float:
    """The megabytes that a process and those below it hold for themselves."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().uss / 1e6
        except psutil.Error:  # it has ended
            continue
    return total


def encoded(encode: Encode, path: Path) -> dict[str, Any]:
    """The seconds in which a tokenizer gives all ids, and a sum that tells whether they are the same."""
    start, count, check = time.perf_counter(), 0, 0
    for ids in encode(path):
        array = np.asarray(ids, np.uint16)
        count, check = count + len(array), zlib.crc32(array, check)
    return {"seconds": time.perf_counter() - start, "ids": [count, check]}


def texts(path: Path) -> Iterator[list[str]]:
    """The text of a file, as many parts at once as there are cores, cut where it changes no ids."""
    found = parts(read(path, str(path)), str(path))
    while some := list(islice(found, CORES)):
        yield some


# --- the tokenizers --------------------------------------------------------------------------------------------------


def fast() -> Encode:
    """This library's compiled one."""
    from gpt2_multi.tokenizer.fast import GPT2TokenizerFast

    return GPT2TokenizerFast.from_pretrained(shared() / "vocab" / "gpt2").encode_stream


def python() -> Encode:
    """This library's in Python."""
    return GPT2Tokenizer.from_pretrained(shared() / "vocab" / "gpt2").encode_stream


def tiktoken() -> Encode:
    """tiktoken, in as many threads as there are cores."""
    peer = tiktoken_encoding(GPT2Tokenizer.from_pretrained(shared() / "vocab" / "gpt2"))
    return lambda path: (ids for some in texts(path) for ids in peer.encode_ordinary_batch(some, num_threads=CORES))


def tokenizers() -> Encode:
    """tokenizers, which takes all cores by itself."""
    peer = tokenizers_tokenizer(GPT2Tokenizer.from_pretrained(shared() / "vocab" / "gpt2"))
    return lambda path: (row.ids for some in texts(path) for row in peer.encode_batch(some))


def gigatoken() -> Encode:
    """gigatoken, which gives all ids of the file at once."""
    peer = gigatoken_tokenizer(GPT2Tokenizer.from_pretrained(shared() / "vocab" / "gpt2"))
    return lambda path: peer.encode_files([path])


PEERS: dict[str, Callable[[], Encode]] = {
    f"{OURS}, GPT2TokenizerFast": fast,
    f"{OURS}, GPT2Tokenizer": python,
    "tiktoken, encode_ordinary_batch": tiktoken,
    "tokenizers, encode_batch": tokenizers,
    "gigatoken, encode_files": gigatoken,
}

if __name__ == "__main__":
    chosen = PEERS[sys.argv[1]]()
    print("loaded", flush=True)
    print(json.dumps(encoded(chosen, Path(sys.argv[2]))))
