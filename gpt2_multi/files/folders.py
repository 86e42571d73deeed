"""Writing a file, or a folder, whole or not at all."""

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

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def swapped(folder: Path, owned: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write into; when the block ends without an error it takes the place of `folder` in one step.

    At any moment `folder` is the old one or the new one, whole. Folders in it, and files whose names are not `owned`,
    stay in the new one; a link to a folder stays a link. Raises CheckpointError, and leaves what was there, where it
    cannot be written.
    """
    folder = _apart(folder)
    stage = _staged(folder)
    try:
        yield stage
        if folder.exists():
            _keep(folder, stage, owned)
        _sync(stage)
        _exchange(stage, folder)
    except OSError as error:
        way = "; it may be a mount point: write to a folder inside it" if error.errno == errno.EBUSY else ""
        raise CheckpointError(f"{folder}: could not be written ({error}); what was there is whole{way}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _apart(folder: Path) -> Path:
    """Where a folder really is; the one that this process works in cannot change places under it."""
    here, place = Path.cwd(), folder.resolve()
    if place == here or place in here.parents:
        raise CheckpointError(
            f"{folder}: is the folder that you work in, or holds it; give another, such as {here / 'new'}"
        )
    return place


def _staged(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        os.umask(mask := os.umask(0))
        stage.chmod(0o777 & ~mask)
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a place to write a folder, found none ({error})") from None
    return stage


def _keep(folder: Path, stage: Path, owned: Callable[[str], bool]) -> None:
    """Link what belongs to others into the new folder."""
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if owned(path.name) and not is_folder:
            continue
        if is_folder:
            shutil.copytree(path, stage / path.name, symlinks=True, copy_function=link)
        else:
            link(path, stage / path.name)


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; a file system without links gets a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(folder: Path) -> None:
    for path in [*filter(Path.is_file, folder.iterdir()), folder]:  # a pipe would wait for ever
        with suppress(OSError):  # a folder cannot be opened everywhere
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change names in one step, where the system can; a name that is free is taken."""
    if not old.exists():
        new.rename(old)
        return
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is not None and call(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replaced(folder: PathLike, owned: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write a model into; when the block ends without an error its files take their place in `folder`.

    Everything is written and synced before the first old file goes, and old weights that the new model lacks go last.
    What `folder` holds besides files whose names are `owned` is not touched. While files change places, the old ones
    are kept in a hidden folder inside: an error puts them back, and after a crash they are there, whole. Raises
    CheckpointError where nothing can be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    except OSError as error:
        raise CheckpointError(f"{target}: expected a folder to save the model in, found none ({error})") from None
    try:
        yield stage
        _take_places(stage, target, owned)
    except OSError as error:
        raise CheckpointError(f"{target}: the model could not be saved ({error}); what was there is whole") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _take_places(stage: Path, target: Path, owned: Callable[[str], bool]) -> None:
    new = [path.name for path in stage.iterdir()]
    old = [path.name for path in target.iterdir() if owned(path.name)]
    backup = Path(tempfile.mkdtemp(prefix=".replaced-", dir=target))
    for name in old:
        link(target / name, backup / name)
    try:
        for name in new:
            (stage / name).replace(target / name)
        for name in set(old) - set(new):
            (target / name).unlink(missing_ok=True)
    except OSError:
        for name in old:
            (backup / name).replace(target / name)
        raise
    finally:
        shutil.rmtree(backup, ignore_errors=True)


PathLike = str | os.PathLike[str]
