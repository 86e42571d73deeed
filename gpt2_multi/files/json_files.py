"""JSON files: what is read is small, what is written is whole, and by one process at a time."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from gpt2_multi.errors import CheckpointError, GPT2Error, InputError, remedy

LARGEST = 1 << 22  # bytes of JSON: what is made of them can be seventy times as large


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text beside the old file, sync it, and put it in its place: a crash leaves one or the other."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_json(
    path: Path,
    damaged: type[GPT2Error] = CheckpointError,
    missing: type[GPT2Error] = CheckpointError,
    largest: int = LARGEST,
) -> dict[str, Any]:
    """The object in a JSON file; an error of one of these classes where there is none.

    A byte order mark before it means nothing. A pipe, which would be read for ever, is refused, and so is a giant.
    """
    try:
        if path.exists() and not path.is_file():
            raise missing(f"{path}: expected a file, found something else; check the path")
        if (size := path.stat().st_size) > largest:
            raise missing(f"{path}: has {size} bytes, more than such a file of a model ({largest}); fetch it again")
        value = json.loads(path.read_bytes().removeprefix(BOM_UTF8))
    except FileNotFoundError:
        raise missing(f"{path}: there is no such file; a model folder holds it beside the weights") from None
    except OSError as error:
        raise missing(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except GPT2Error:
        raise
    except (ValueError, RecursionError) as error:
        raise damaged(f"{path}: not valid JSON ({error}); {remedy(path)}") from None
    if not isinstance(value, dict):
        raise damaged(f"{path}: expected a JSON object, found {type(value).__name__}; fetch or save it again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON file, synced."""
    with path.open("wb") as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
        sync(file)


def sync(file: BinaryIO) -> None:
    """Wait until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def hold(file: IO[Any], name: str) -> None:
    """Keep an open file from every other process that holds it, until it is closed; InputError where one has it.

    `name` is what the sentence begins with. Where the system or the disk has no locks, nothing is kept.
    """
    with suppress(ModuleNotFoundError):  # of Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{name}: another process writes there; wait for it, or name another") from None
        except OSError:  # some network disks have no locks
            pass
