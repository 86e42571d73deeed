"""Texts as token ids on disk: made once, on all cores, in files of bounded size that later runs map.

A shard is a .bin as llm.c has them, which its loaders read too; the spare room of its header says what it is of. The
file `shards.json`, written last, names them all: without it there are none, whatever was stopped on the way.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gpt2_multi.app.terminal import files_of
from gpt2_multi.app.train.data.tokens import HEADER, LLM_C, Tokens, check_vocabulary, open_tokens
from gpt2_multi.errors import CheckpointError, GPT2Error, InputError
from gpt2_multi.files.documents import File, read
from gpt2_multi.files.json_files import read_json, sync, write_whole
from gpt2_multi.files.progress import measured

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Array = np.ndarray[Any, Any]
FORMAT, VERSION = "gpt2-multi tokens", 1
INDEX = "shards.json"
SHARD = 1 << 28  # tokens of a shard
Sources = Iterable[str | os.PathLike[str]]


def prepare(
    sources: Sources,
    tokenizer: GPT2Tokenizer,
    folder: str | os.PathLike[str],
    field: str | None = None,
    *,
    vocab_size: int | None = None,
    workers: int | None = None,
) -> Tokens:
    """The tokens of all documents of the sources, with an end token after each, mapped from shards in a folder.

    Shards that are there, of the same files and the same tokenizer, are used; others are replaced. Whether control
    tokens are found in texts, the tokenizer's `split_special_tokens` says. Sources that are files of tokens are mapped
    where they are. See `documents.find` for what a source is, and `field`.

    Args:
        vocab_size: of the model, in which every token has to lie; by default that of the tokenizer.
        workers: how many cores encode; by default all.

    Raises:
        InputError, TokenizerError: a source cannot be read, or has a token that the model has not.
        CheckpointError: the folder cannot be written.
    """
    files, size = files_of(sources, field), len(tokenizer) if vocab_size is None else vocab_size
    if any(file.kind == "tokens" for file in files):
        tokens = open_files(files)
        check_vocabulary(tokens, size)
        return tokens
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer: has no eos_token, which ends each document; set it")
    place, key = Path(folder), _key(files, tokenizer, field)
    if (found := _reusable(place, key)) is None:
        _write(place, key, files, tokenizer, workers)
        found = _index(place)
    if found["largest"] >= size:
        raise InputError(
            f"tokenizer: gave the token {found['largest']}, which is outside the model's vocabulary (0 to {size - 1}); "
            "take the model's tokenizer, or resize_token_embeddings"
        )
    return _tokens(place, found)


def reopen(folder: str | os.PathLike[str]) -> Tokens:
    """The tokens that `prepare` left in a folder, whatever became of its sources."""
    return _tokens(Path(folder), _index(Path(folder)))


def open_files(files: Iterable[File]) -> Tokens:
    """The tokens of files of tokens, mapped where they are."""
    return Tokens([open_tokens(_of_tokens(file)) for file in files])


def _of_tokens(file: File) -> Path:
    if file.kind != "tokens" or file.path is None:
        raise InputError(f"{file.name}: is a text beside files of tokens; train on texts, or on tokens")
    return file.path


# --- what shards are of -----------------------------------------------------------------------------------------------


def _key(files: Sequence[File], tokenizer: GPT2Tokenizer, field: str | None) -> dict[str, Any]:
    """What has to be the same for shards to be used again."""
    hashed = hashlib.sha256()
    for file in files:
        state = os.urandom(16) if file.path is None else _state(file.path)  # what is piped in is never the same
        hashed.update(repr((str(Path(file.name).resolve()), state)).encode())
    said = {"format": FORMAT, "version": VERSION, "vocab_size": len(tokenizer), "end": tokenizer.eos_token_id}
    said |= {"field": field, "split_special_tokens": bool(tokenizer.split_special_tokens)}
    return said | {"tokenizer": _tokenizer_hash(tokenizer), "sources": hashed.hexdigest()}


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _tokenizer_hash(tokenizer: GPT2Tokenizer) -> str:
    """Of all that it saves, which decides the ids."""
    hashed = hashlib.sha256()
    with TemporaryDirectory() as folder:
        for path in sorted(map(Path, tokenizer.save_pretrained(folder))):
            hashed.update(repr((path.name, path.read_bytes())).encode())
    return hashed.hexdigest()


def _reusable(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The index of a folder, if its shards are whole and are of this."""
    with suppress(GPT2Error, KeyError, TypeError, AttributeError):
        found = _index(folder)
        if {name: found[name] for name in key} == key and len(_tokens(folder, found)) == found["count"]:
            return found
    return None


def _index(folder: Path) -> dict[str, Any]:
    return read_json(folder / INDEX, largest=1 << 26)


def _tokens(folder: Path, index: dict[str, Any]) -> Tokens:
    return Tokens([open_tokens(folder / name) for name in index["shards"]])


# --- writing them -----------------------------------------------------------------------------------------------------


def _write(folder: Path, key: dict[str, Any], files: list[File], tokenizer: Any, workers: int | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        try:
            index = key | _written(folder, key, _blocks(files, tokenizer, key["field"], workers))
            write_whole(folder / INDEX, json.dumps(index, indent=2))
        except BaseException:  # an interrupt too
            _clear(folder)
            raise
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(
            f"{folder}: the tokens could not be written ({why}); make room, or name another"
        ) from None


def _clear(folder: Path) -> None:
    """Take away what an earlier run left, its index first."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("tokens-*.bin"):
        path.unlink()


def _blocks(files: list[File], tokenizer: Any, field: str | None, workers: int | None) -> Iterator[Array]:
    """The ids of all documents, each with its end token, in arrays of a bounded size."""
    ending = copy.copy(tokenizer)
    ending.add_eos_token = True
    total = None if any(file.size is None for file in files) else sum(file.size or 0 for file in files)
    with measured("Tokenizing", total) as seen:
        yield from ending.encode_stream(read(files, field, seen), workers=workers)


def _written(folder: Path, key: dict[str, Any], blocks: Iterator[Array]) -> dict[str, Any]:
    """Write blocks of ids as shards; returns what the index says of them."""
    names, count, largest = [], 0, 0
    for number, parts in groupby(_cut(blocks), itemgetter(0)):
        names.append(f"tokens-{number:05}.bin")
        with (folder / names[-1]).open("wb") as file:
            file.write(bytes(HEADER))  # until it is whole
            for _, part in parts:
                file.write(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
                largest = max(largest, int(part.max()))
            tokens = (file.tell() - HEADER) // part.itemsize
            _finish(file, key | {"dtype": part.dtype.name, "count": tokens})
        count += tokens
    if not count:
        raise InputError("the sources have no document; name others")
    return {"count": count, "largest": largest, "shards": names}


def _cut(blocks: Iterator[Array]) -> Iterator[tuple[int, Array]]:
    """The blocks in parts that lie in one shard, each with its number."""
    done = 0
    for block in blocks:
        while len(block):
            part = block[: SHARD - done % SHARD]
            yield done // SHARD, part
            block, done = block[len(part) :], done + len(part)


def _finish(file: BinaryIO, said: dict[str, Any]) -> None:
    """Write the header, once the tokens are on the disk."""
    sync(file)
    magic, version = next(known for known, stored in LLM_C.items() if np.dtype(stored).name == said["dtype"])
    file.seek(0)
    file.write(np.array([magic, version, said["count"]], "<i4").tobytes() + json.dumps(said).encode())
    sync(file)
