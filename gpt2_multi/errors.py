"""The errors that bad input raises: each names the file or argument, what was expected, what was found, what to do."""

import difflib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"  # how a file of it begins that has no more than a name


class GPT2Error(ValueError):
    """Base of every error that this library raises on purpose."""


class ConfigError(GPT2Error):
    """A configuration value, or a config.json, that GPT-2 cannot have."""


class CheckpointError(GPT2Error):
    """A model folder or a file of weights that is missing, damaged, or does not fit its configuration."""


class TokenizerError(GPT2Error):
    """A vocabulary, a text or an id that the tokenizer cannot take."""


class InputError(GPT2Error):
    """An argument of a model call or of `generate` that cannot be computed with."""


class LostError(InputError, AttributeError):
    """A value that cannot be computed any more; to `hasattr` it is not there."""


def shortened(text: str, most: int = 200) -> str:
    """What a file says, cut where it is too long for the sentence of an error."""
    return text if len(text) <= most else f"{text[:most]}..."


def remedy(path: Path) -> str:
    """What to do about a file that is not what it should be: a clone without Git LFS has only the names of files."""
    with suppress(OSError):
        if path.is_file() and _start(path) == LFS:
            return "it is a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder"
    return "fetch or save it again"


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(LFS))


def nearest(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """The end of a sentence about an unknown name: the known one that looks like it, if any; `least` of 1 is alike."""
    near = difflib.get_close_matches(name, list(known), 1, least)
    return f"; did you mean {near[0]!r}?" if near else ""


def described(thing: object) -> str:
    """What something is, for a sentence about it: of which class, of which library."""
    kind = type(thing)
    library = "" if kind.__module__ in ("builtins", "collections") else f" of {kind.__module__.partition('.')[0]}"
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}{library}"
