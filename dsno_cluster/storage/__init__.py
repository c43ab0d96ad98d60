"""Storage of bytes under keys: a folder or s3://bucket/prefix, behind one small protocol.

A key is a relative path with forward slashes. An object that can be seen is complete: in a folder it is
written to a temporary file and renamed; S3 puts are atomic and carry a sha256 that the server checks.
Transient errors of S3 are retried with growing, random pauses; permanent ones, and those that outlast the
attempts, raise a StorageError that names bucket, key and attempts.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsno_cluster.errors import UserError
from dsno_cluster.files import in_home, not_there
from dsno_cluster.storage.address import checked_address, endpoint_problem, split_address
from dsno_cluster.storage.folder import FolderStorage
from dsno_cluster.storage.protocol import MissingObject, PreconditionFailed, Stat, Storage
from dsno_cluster.storage.s3 import Patience, S3Storage, expect_answers
from dsno_cluster.storage.silence import silence_now
from dsno_cluster.storage.writer import only_writer

__all__ = [
    "FolderStorage",
    "MissingObject",
    "Patience",
    "PreconditionFailed",
    "S3Storage",
    "Stat",
    "Storage",
    "absolute_address",
    "endpoint_problem",
    "expect_answers",
    "only_writer",
    "open_storage",
    "read_file",
    "silence_now",
    "split_address",
    "split_path",
    "write_file",
]


def absolute_address(address: str, folder: Path = Path()) -> str:
    """The folder or S3 address as an absolute one; a relative path is relative to `folder`.

    Raises UserError for an address of any other kind.
    """
    address = checked_address(address)
    if "://" in address or address.startswith("package:"):
        return address
    return str((folder / in_home(address)).absolute())


def open_storage(url: str, endpoint_url: str | None = None, patience: Patience | None = None) -> Storage:
    """The storage at a folder path or at s3://bucket/prefix.

    Raises UserError for any other scheme, for an invalid bucket name, for an endpoint that is not a URL, and
    if either contains a password.
    """
    url = checked_address(url)
    if "://" not in url:
        return FolderStorage(Path(in_home(url)))
    return S3Storage(*split_address(url), endpoint_url, patience or Patience())


def split_path(path: str) -> tuple[str, str]:
    """The folder or S3 prefix that holds `path`, for `open_storage`, and the last name in it."""
    parent, slash, name = path.rstrip("/").rpartition("/")
    return (parent or (slash or ".")), name


def read_file(path: str, endpoint_url: str | None) -> bytes:
    """The bytes at a path or S3 address. Raises UserError if the file does not exist."""
    parent, name = split_path(path)
    if "://" not in path and Path(path).is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    try:
        return open_storage(parent, endpoint_url).read(name)
    except MissingObject:
        why = "no such file" if "://" in path else not_there(path)
        raise UserError(f"{path}: {why}") from None


def write_file(path: str, data: bytes, endpoint_url: str | None = None) -> None:
    """Write a file at a path or S3 address atomically.

    Raises UserError as `open_storage` does, and WorkError if the file cannot be written.
    """
    if re.fullmatch(r"\w+://[^/]*/*", path):
        raise UserError(f"{path}: names a bucket and no file in it")
    parent, name = split_path(path)
    open_storage(parent, endpoint_url).write(name, data)
