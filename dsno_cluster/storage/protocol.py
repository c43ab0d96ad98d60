"""What every storage answers, and the errors that it raises beside StorageError."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from dsno_cluster.errors import WorkError

STALE = timedelta(days=1)  # what an interrupted write left is removed when it is older


class MissingObject(WorkError):
    """There is no object of that key."""


class PreconditionFailed(WorkError):
    """The object was there already, or is no longer the one that was read."""


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

        Of a range that reaches beyond the end, the bytes that exist: none if it begins there or is empty.
        """
        ...

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        """Put an object whole. Raises PreconditionFailed where the condition does not hold."""
        ...

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        """Put several objects below `prefix` (ending in /), the last one named last.

        In a folder they appear together, in place of such a folder that was there; PreconditionFailed where one without that
        last object would be replaced. On S3, where nothing else below `prefix` is touched, the last object says that the
        others are there.
        """
        ...

    def stat(self, key: str) -> Stat | None: ...

    def list(self, prefix: str) -> Iterator[Stat]:
        """Objects whose key starts with `prefix`, in key order; folders and S3's markers of them are none."""
        ...

    def delete(self, key: str) -> None: ...

    def tidy(self, prefix: str) -> None:
        """Remove what interrupted writes below `prefix` left more than a day ago."""
        ...
