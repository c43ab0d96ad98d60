"""Files of this machine: how paths are shown, files that appear whole, locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def shown_path(path: str | Path) -> str:
    """A path or address as people read it: what lies below the working directory without that."""
    try:
        below = Path(path).relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, an address; or the working directory was deleted
        return str(path)
    return str(below)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all. Raises OSError."""
    with written_aside(path) as aside:
        aside.write_bytes(data)
        os.replace(aside, path)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A hidden, empty file beside `path` to write and then to rename or link to it; removed at the end if it still exists.

    It has the permissions of a new file. Raises OSError.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    aside = Path(name)
    try:
        aside.chmod(0o666 & ~_umask())  # mkstemp's 0600 would shut out the rest of a group
        yield aside
    finally:
        aside.unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # which names no file by itself
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock `file` within. Errors as `lock`."""
    held = lock(file, wait=wait)
    try:
        yield
    finally:
        os.close(held)


def lock(file: Path, *, wait: bool = True, create: bool = True) -> int:
    """Lock `file` against other processes; returns a descriptor that holds the lock until it is closed or the process ends.

    Raises BlockingIOError if another holds it and this one is not to `wait`, and other OSErrors, as for a symbolic link,
    which somebody may have put in a folder where all may write.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    held = os.open(file, flags, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(held)
        if isinstance(error, OSError):  # which names no file by itself
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise
    return held
