"""A folder replaced whole: what is written takes the place of what was there together, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gpt2_multi.errors import CheckpointError

PathLike = str | os.PathLike[str]
Owned = Callable[[Path], bool]  # whether what lies in a folder is replaced with it
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def replaced(folder: PathLike, owned: Owned) -> Iterator[Path]:
    """A folder to write into; when the block ends without an error what it holds takes its place in `folder`.

    Everything is written and synced before. Where all that `folder` holds is `owned`, the new one takes its place in
    one step: at any moment it is the old one or the new one, whole. What is not owned is not touched: beside it, and in
    a folder that cannot change its place, such as the one that this process works in, files take their places one by
    one, and the old ones are kept in a hidden folder inside meanwhile: an error puts them back, and after a crash they
    are there, whole. A link to a folder stays a link. Raises CheckpointError, and leaves what was there, where nothing
    can be written.
    """
    place = Path(folder).resolve()
    stage = _staged(place)
    try:
        yield stage
        _sync(stage)
        if _is_free(place, owned):
            exchange(stage, place)
        else:
            _take_places(stage, place, owned)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error}); what was there is whole") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _staged(place: Path) -> Path:
    """A hidden folder beside the place of another, or inside it where that is on another disk."""
    inside = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
    try:
        place.mkdir(parents=True, exist_ok=True) if inside else place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_dir():
            raise FileExistsError(errno.EEXIST, "it is a file")
        stage = Path(tempfile.mkdtemp(prefix=f".{place.name[:20]}.", dir=place if inside else place.parent))
        os.umask(mask := os.umask(0))
        stage.chmod(0o777 & ~mask)
    except OSError as error:
        raise CheckpointError(f"{place}: expected a folder to save the model in, found none ({error})") from None
    return stage


def _is_free(place: Path, owned: Owned) -> bool:
    """Whether another folder can take this place as a whole."""
    if not place.exists():
        return True
    here = Path.cwd()
    moves = place not in (here, *here.parents) and not os.path.ismount(place)
    return moves and all(map(owned, place.iterdir()))


def exchange(new: Path, old: Path) -> None:
    """Let two folders change names in one step, where the system can; a name that is free is taken.

    Elsewhere the old one is moved away, and is gone when the new one has its name.
    """
    if not old.exists():
        new.rename(old)
        return
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is not None and call(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}.old")
    shutil.rmtree(aside, ignore_errors=True)  # of one that was stopped
    old.rename(aside)
    try:
        new.rename(old)
    finally:
        if not old.exists():  # stopped between the two
            aside.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def _take_places(stage: Path, place: Path, owned: Owned) -> None:
    old = [path.name for path in place.iterdir() if owned(path)]
    backup, placed = Path(tempfile.mkdtemp(prefix=".replaced-", dir=place)), []
    for name in old:
        _keep(place / name, backup / name)
    try:
        for new in list(stage.iterdir()):
            new.replace(place / new.name)
            placed.append(new.name)
        for name in set(old) - set(placed):
            _remove(place / name)
    except BaseException:  # an interrupt too
        _put_back(backup, place, old, placed)
        shutil.rmtree(backup, ignore_errors=True)  # not where that fails: what it holds is nowhere else
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _put_back(backup: Path, place: Path, old: list[str], placed: list[str]) -> None:
    """Let the old files be what they were; those that still are stay untouched, since a sick disk may refuse more."""
    for name in set(placed) - set(old):
        _remove(place / name)
    for name in old:
        now, before = place / name, backup / name
        if not os.path.lexists(now) or not os.path.samestat(now.lstat(), before.lstat()):
            if now.is_dir() and not now.is_symlink():
                shutil.rmtree(now)
            before.replace(now)


def _keep(path: Path, copy: Path) -> None:
    """Give a file a second name, or a folder another; a file system without links gets a copy."""
    if path.is_dir():
        path.rename(copy)
        return
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, copy, follow_symlinks=False)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in [*filter(Path.is_file, folder.iterdir()), folder]:  # a pipe would wait for ever
        with suppress(OSError):  # a folder cannot be opened everywhere
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
