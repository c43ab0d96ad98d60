"""Objects as files below a folder: written to a temporary file, then renamed or linked."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from dsno_cluster.errors import StorageError
from dsno_cluster.files import locked_if_possible, shown_path, sync, written_aside
from dsno_cluster.storage.protocol import STALE, MissingObject, PreconditionFailed, Stat


class FolderStorage:
    """Objects as files below a folder, which the first write creates.

    On a file system without locks (Lustre without `-o flock`, some NFS), two writes with `if_match` that
    compare at the same moment may both succeed; the later one then replaces the earlier.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = shown_path(root)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        try:
            with (self.root / key).open("rb") as file:
                file.seek(start)
                return file.read() if end is None else file.read(max(0, end - start))
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObject(f"{self.root / key}: no such file") from None
        except OSError as error:
            raise StorageError(f"{self.root / key}: cannot be read: {error.strerror}") from error

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        path = self.root / key
        try:
            _make_folder(path.parent)
            with written_aside(path) as aside:
                aside.write_bytes(data)
                sync(aside)
                if if_absent:
                    os.link(aside, path)  # atomic; fails if the file exists
                elif if_match is not None:
                    with locked_if_possible(path.with_name(f".{path.name}.lock")):
                        now = self.stat(key)
                        if now is None or now.etag != if_match:
                            raise PreconditionFailed(f"{path}: was changed by another writer")
                        os.replace(aside, path)
                else:
                    os.replace(aside, path)
            sync(path.parent)
        except FileExistsError:
            raise PreconditionFailed(f"{path}: exists already") from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        path = self.root / prefix.rstrip("/")
        try:
            if not _may_be_replaced(path, last=list(files)[-1]):
                raise PreconditionFailed(f"{path}: holds other files, which would be lost")
            _make_folder(path.parent)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as name:
                new, old = Path(name) / "new", Path(name) / "old"
                inside = FolderStorage(new)
                for key, data in files.items():
                    inside.write(key, data)
                try:
                    if path.exists():  # a folder cannot be renamed onto another that holds files
                        os.rename(path, old)
                    os.rename(new, path)
                finally:
                    if old.exists() and not path.exists():  # an error or Ctrl-C came between the two renames
                        os.rename(old, path)
            sync(path.parent)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

    def stat(self, key: str) -> Stat | None:
        path = self.root / key
        try:
            return self._stat(path) if path.is_file() else None
        except FileNotFoundError:  # deleted meanwhile
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error

    def list(self, prefix: str) -> Iterator[Stat]:
        def unreadable(error: OSError) -> None:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise StorageError(f"{error.filename}: cannot be listed: {error.strerror}") from error

        keys = [
            (Path(folder) / name).relative_to(self.root).as_posix()
            for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0], onerror=unreadable)
            for name in names
            if not name.startswith(".")
        ]
        for key in sorted(keys):
            if key.startswith(prefix) and (found := self.stat(key)) is not None:
                yield found

    def delete(self, key: str) -> None:
        path = self.root / key
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise StorageError(f"{path}: cannot be deleted: {error.strerror}") from error

    def tidy(self, prefix: str) -> None:
        before = (datetime.now(UTC) - STALE).timestamp()
        for path in (self.root / prefix).glob(".*.tmp"):
            with contextlib.suppress(OSError):  # another process may be first
                if path.stat().st_mtime >= before:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _stat(self, path: Path) -> Stat:
        # every write creates a new file and renames it, so inode and time distinguish one content from the
        # next
        found = path.stat()
        etag = f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
        return Stat(path.relative_to(self.root).as_posix(), found.st_size, etag)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def _may_be_replaced(path: Path, last: str) -> bool:
    """Whether `path` does not exist, or is an empty folder or a complete one that `write_folder` wrote."""
    return not path.exists() or (path.is_dir() and ((path / last).is_file() or not any(path.iterdir())))
