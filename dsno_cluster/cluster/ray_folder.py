"""The folder of one Ray on one node, which nobody else can enter, and its end.

Ray makes the folder that it is given writable for everybody (mode 777), its sockets and logs in it too. So it is given one
inside of a folder of ours, which is the user's alone (700). That one is locked as long as its process lives: what a killed
process left is told from what is in use, and removed by the user's next Ray on that node.
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
# of the 107 bytes that a socket's path may have; Ray adds session_<time>_<pid>/sockets/...
LONGEST = 45
# file systems, by the names of stat(1), on which one folder is seen by several nodes
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
    """Where a Ray of that name has its folder: on the node's own disk, and nobody else's.

    Below TMPDIR, unless that is too long for the Unix sockets that Ray keeps there, or seen by all nodes.
    """
    base = Path(tempfile.gettempdir())
    folder = f"{_prefix()}{name}"
    fits = len(str(base / folder / INSIDE)) <= LONGEST and _file_system(base) not in SHARED
    return (base if fits else Path("/tmp")) / folder


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Make `folder`, as `place_for` named it; yields the one inside of it that is for Ray, which makes it. Both are removed.

    Raises WorkError where something has that name already: the folder for temporary files is everybody's.
    """
    _sweep(folder.parent)
    held = _made(folder)
    try:
        yield folder / INSIDE
    finally:
        for _ in range(REMOVALS):  # the last of Ray's processes may be writing still
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)
        os.close(held)


def _made(folder: Path) -> int:
    """Make the folder, locked before it has its name; returns the lock's descriptor, held as long as this process lives."""
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
        except FileNotFoundError:  # its removal was cut off; a new one has its lock before its name
            shutil.rmtree(folder, ignore_errors=True)
            continue
        except OSError:  # another's, or still in use
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _prefix() -> str:
    return f"dsno-ray-{os.getuid()}-"


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as stat(1) names it; empty where it does not say."""
    asked = ["stat", "--file-system", "--format=%T", str(folder)]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip().lower()
