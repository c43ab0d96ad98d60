"""Local files: how paths are shown, their hashes, atomic writes, locks between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsno_cluster.errors import UserError, closest

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # errors of a full disk
LONGEST_NAME, LONGEST_PATH = 255, 3500  # bytes; Linux takes 255 and 4095
CACHE_HOME = "XDG_CACHE_HOME"  # the variable with the folder of all programs' caches
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of a file system without locks


def shown_path(path: str | Path) -> str:
    """A path or address as shown to people: relative if it lies below the working directory."""
    try:
        below = Path(path).relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, an address; or the working directory was deleted
        return str(path)
    return str(below)


def not_there(path: str | Path, what: str = "file or folder") -> str:
    """Why there is no `what` at a local path: the folder that a relative path is relative to, and the nearest name."""
    below = "" if Path(shown_path(path)).is_absolute() else f" below {Path.cwd()}"
    near = nearest_existing(path, folders_only=what == "folder")
    return f"no such {what}{below}" + (f"; did you mean {near}?" if near else "")


def nearest_existing(path: str | Path, *, folders_only: bool = False) -> str | None:
    """The existing path that is nearest to one that does not exist, as shown to people; None if none is near."""
    at = Path(os.path.expanduser(path)).absolute()
    missing = next((part for part in [*reversed(at.parents), at] if not os.path.exists(part)), None)
    if missing is None:
        return None
    folders_only = folders_only or missing != at
    try:
        beside = [p.name for p in missing.parent.iterdir() if not folders_only or p.is_dir()]
    except OSError:
        return None
    if (near := closest(missing.name, sorted(beside))) is None:
        return None
    whole = missing.parent / near / at.relative_to(missing)
    return shown_path(whole if os.path.exists(whole) else missing.parent / near)


def in_home(path: str) -> str:
    """`path` with the home folder in place of a `~` or `~user` at its beginning.

    Raises UserError if that folder is not known: without HOME and without an entry in the users' list, as in
    some containers.
    """
    expanded = os.path.expanduser(path)
    user = path.partition("/")[0]
    if user.startswith("~") and (expanded == path or (user == "~" and os.environ.get("HOME") == "")):
        why = "HOME is not set" if user == "~" else f"there is no user {user[1:]}"
        raise UserError(f"{path}: {user} is no folder here, as {why}; write the path out")
    return expanded


def too_long(path: str) -> str | None:
    """Why no file can be at a path, with room for the names below it; None if one can."""
    name = max(path.split("/"), key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(name)) > LONGEST_NAME:
        return f"{name[:20]}...: a name of {len(os.fsencode(name))} bytes; a folder or file can have {LONGEST_NAME}"
    if len(os.fsencode(path)) > LONGEST_PATH:
        return f"{path[:20]}...: a path of {len(os.fsencode(path))} bytes; the limit is {LONGEST_PATH}"
    return None


def cache_folder(name: str = "") -> Path:
    """The user's folder for downloaded `name`: $XDG_CACHE_HOME/dsno-cluster/<name>, or below ~/.cache.

    Without a name, the folder with all of them.

    Raises UserError if the home folder is not known.
    """
    return Path(os.environ.get(CACHE_HOME) or in_home("~/.cache")) / "dsno-cluster" / name


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically. Raises OSError."""
    with written_aside(path) as aside:
        aside.write_bytes(data)
        os.replace(aside, path)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A hidden, empty file beside `path`, to be written and then renamed or linked to `path`.

    It has the permissions of a new file, and is removed at the end if it still exists. Raises OSError.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    aside = Path(name)
    try:
        aside.chmod(0o666 & ~_umask())  # mkstemp's 0600 would exclude the rest of a group
        yield aside
    finally:
        aside.unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_sha256(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal. Raises OSError."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # it does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock `file` in the block. Raises as `lock` does."""
    held = lock(file, wait=wait)
    try:
        yield
    finally:
        os.close(held)


@contextlib.contextmanager
def locked_if_possible(file: Path, *, wait: bool = True) -> Iterator[None]:
    """As `locked`; on a file system without locks nothing is held, and nothing is raised."""
    held = None
    try:
        held = lock(file, wait=wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def lock(file: Path, *, wait: bool = True, create: bool = True) -> int:
    """Lock `file` against other processes; returns a descriptor that holds the lock until it is closed or the process ends.

    Raises BlockingIOError if another process holds it and `wait` is false, and other OSErrors, for example if
    `file` is a symbolic link, which somebody may have put into a folder that everybody can write to.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        held = os.open(file, flags, 0o666)
    except PermissionError:  # another user made it, and only that user may write to it
        held = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(held)
        if isinstance(error, OSError):  # it does not name the file
            raise OSError(error.errno, error.strerror, str(file)) from error
        raise
    return held
