"""The private folder of a Ray on a node, and its removal.

Ray makes its folder, and the sockets and logs in it, writable for everybody (mode 777). So it gets one inside
a folder of ours that only the user can enter (700). Ours is locked while its process lives, so that the
user's next Ray on that node can distinguish the leftovers of a killed process from a folder in use, and
remove them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dsno_cluster.errors import WorkError
from dsno_cluster.files import lock

LOCK, INSIDE = "lock", "ray"
REMOVALS = 20
# a socket's path may have 107 bytes; Ray appends session_<time>_<pid>/sockets/...
LONGEST = 45
# file systems, as stat(1) names them, that several nodes may share
SHARED = (
    "nfs",
    "lustre",
    "gpfs",
    "ceph",
    "beegfs",
    "fhgfs",
    "panfs",
    "afs",
    "cifs",
    "smb",
    "smb2",
    "fuseblk",
    "fuse",
)


def place_for(name: str) -> Path:
    """The folder of a Ray of that name, on the node's own disk.

    It is below TMPDIR, unless that is too long for Ray's Unix sockets or on a file system that nodes share.
    """
    base = Path(tempfile.gettempdir())
    folder = f"{_prefix()}{name}"
    fits = len(str(base / folder / INSIDE)) <= LONGEST and _file_system(base) not in SHARED
    return (base if fits else Path("/tmp")) / folder


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Make `folder`, as `place_for` named it; yields the path inside it at which Ray makes its own.

    Both are removed.

    Raises WorkError if that name is taken: everybody can write to the folder for temporary files.
    """
    _sweep(folder.parent)
    held = _made(folder)
    try:
        yield folder / INSIDE
    finally:
        for _ in range(REMOVALS):  # the last of Ray's processes may still be writing
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)
        os.close(held)


def _made(folder: Path) -> int:
    """Make the folder, locked before it gets its name; returns the lock's descriptor."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=".dsno-ray-", dir=folder.parent))
        held = lock(aside / LOCK)
        try:
            aside.rename(folder)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise WorkError(
            f"{folder} cannot be made on {socket.gethostname()}: {error.strerror}; TMPDIR must be a folder that every node has "
            "on a disk of its own"
        ) from error
    return held


def _sweep(base: Path) -> None:
    """Remove folders of this user whose process was killed before it could do so itself."""
    for folder in base.glob(f"{_prefix()}*"):
        try:
            held = lock(folder / LOCK, wait=False, create=False)
        except FileNotFoundError:  # its removal was interrupted: a new folder has its lock before its name
            shutil.rmtree(folder, ignore_errors=True)
            continue
        except OSError:  # another user's, or still in use
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _prefix() -> str:
    return f"dsno-ray-{os.getuid()}-"


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as stat(1) names it; empty if unknown."""
    asked = ["stat", "--file-system", "--format=%T", str(folder)]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip().lower()
