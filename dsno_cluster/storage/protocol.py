"""The protocol of a storage, and the errors that it raises besides StorageError."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from dsno_cluster.errors import WorkError

STALE = timedelta(days=1)  # leftovers of interrupted writes are removed once they are older than this


class MissingObject(WorkError):
    """No object has that key."""


class PreconditionFailed(WorkError):
    """The object exists already, or is no longer the one that was read."""


@dataclass(frozen=True)
class Stat:
    """One object: key, size in bytes, `etag` for conditional replacement."""

    key: str
    size: int
    etag: str


class Storage(Protocol):
    url: str

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of an object, or all of it. Raises MissingObject.

        If the range extends beyond the end, the result is the bytes that exist; it is empty if the range
        begins at the end or after it.
        """
        ...

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        """Write an object atomically. Raises PreconditionFailed if the condition does not hold."""
        ...

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        """Write several objects below `prefix` (ending in /); the last of `files` is written last.

        In a folder they appear together and replace an earlier such folder; raises PreconditionFailed if the
        existing folder lacks that last object. On S3 nothing else below `prefix` is touched, and the last
        object marks the others as complete.
        """
        ...

    def stat(self, key: str) -> Stat | None: ...

    def list(self, prefix: str) -> Iterator[Stat]:
        """Objects whose key starts with `prefix`, in key order, without folders and S3's folder markers."""
        ...

    def delete(self, key: str) -> None: ...

    def tidy(self, prefix: str) -> None:
        """Remove what writes below `prefix` left behind that were interrupted more than a day ago."""
        ...
