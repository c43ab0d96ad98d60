"""Where bytes live: a folder or s3://bucket/prefix behind one small protocol that behaves the same.

A key is a relative path with forward slashes. An object that can be seen is complete: folders write aside and
rename, S3 puts are atomic and carry a sha256 that the server checks.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsno_cluster.errors import UserError, WorkError


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
        """Bytes [start, end) of an object, or all of it. Raises MissingObject."""
        ...

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        """Put an object whole. Raises PreconditionFailed where the condition does not hold."""
        ...

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        """Put several objects below `prefix` (ending in /), the last one named last.

        In a folder they appear together; on S3 the last object says that the others are there.
        """
        ...

    def stat(self, key: str) -> Stat | None: ...

    def list(self, prefix: str) -> Iterator[Stat]:
        """Objects whose key starts with `prefix`, in key order."""
        ...

    def delete(self, key: str) -> None: ...


def open_storage(url: str, endpoint_url: str | None = None) -> Storage:
    """The storage at a folder path or at s3://bucket/prefix. Raises UserError for any other scheme."""
    if url.startswith("s3://"):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"{url}: names no bucket; write s3://bucket/prefix")
        return S3Storage(bucket, prefix.strip("/"), endpoint_url)
    if "://" in url:
        raise UserError(f"{url}: storage is a folder or s3://bucket/prefix")
    return FolderStorage(Path(url))


class FolderStorage:
    """Objects as files below a folder, which is made when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.url = str(root)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        try:
            with (self.root / key).open("rb") as file:
                file.seek(start)
                return file.read() if end is None else file.read(end - start)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObject(f"{self.root / key}: no such file") from None
        except OSError as error:
            raise WorkError(f"{self.root / key}: cannot be read: {error.strerror}") from error

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        path = self.root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _written_aside(path, data) as aside:
                if if_absent:
                    os.link(aside, path)  # fails where the file exists, in one step
                elif if_match is not None:
                    with _locked(path):
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
            raise WorkError(f"{path}: cannot be written: {error.strerror}") from error

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        path = self.root / prefix.rstrip("/")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as name:
                new, old = Path(name) / "new", Path(name) / "old"
                inside = FolderStorage(new)
                for key, data in files.items():
                    inside.write(key, data)
                if path.exists():  # a folder cannot be renamed onto another that holds files
                    os.rename(path, old)
                os.rename(new, path)
            sync(path.parent)
        except OSError as error:
            raise WorkError(f"{path}: cannot be written: {error.strerror}") from error

    def stat(self, key: str) -> Stat | None:
        path = self.root / key
        return self._stat(path) if path.is_file() else None

    def list(self, prefix: str) -> Iterator[Stat]:
        below = self.root / prefix.rpartition("/")[0]
        for path in sorted(below.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and path.is_file() and not path.name.startswith("."):
                yield self._stat(path)

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def _stat(self, path: Path) -> Stat:
        # every write makes a new file and renames it, so inode and time tell one content from the next
        found = path.stat()
        etag = f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
        return Stat(path.relative_to(self.root).as_posix(), found.st_size, etag)


@contextlib.contextmanager
def _written_aside(path: Path, data: bytes) -> Iterator[Path]:
    """`data` on disk under a hidden name beside `path`; gone at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())  # mkstemp's 0600 would shut out the rest of a group
        yield aside
    finally:
        aside.unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path.parent / f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class S3Storage:
    """Objects of a bucket below a prefix. Credentials come only from the usual AWS sources."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:  # a client cannot travel to another process; its address can
        return S3Storage, (self.bucket, self.prefix, self.endpoint_url)

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        # "standard" retries what can heal (throttling, 5xx, timeouts), with backoff and jitter
        config = Config(retries={"mode": "standard", "max_attempts": 6}, connect_timeout=10, read_timeout=60)
        # a session of its own: the default one is not safe across threads and never reads credentials again
        return boto3.session.Session().client("s3", endpoint_url=self.endpoint_url, config=config)

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        """botocore's errors as ours: bucket, key and attempts in one line."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        where = f"s3://{self.bucket}/{self._name(key)}"
        try:
            yield
        except NoCredentialsError:
            raise WorkError(
                f"{where}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
            ) from None
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "?"))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            attempts = 1 + error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
            if code == "NoSuchBucket":
                raise WorkError(f"{where}: there is no bucket {self.bucket}") from None
            if code in ("NoSuchKey", "404"):
                raise MissingObject(f"{where}: no such object") from None
            if code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412:
                raise PreconditionFailed(
                    f"{where}: exists already or was changed by another writer"
                ) from None
            raise WorkError(
                f"{where}: {action} failed after {attempts} attempt(s): {code} (HTTP {status})"
            ) from error
        except ValueError as error:  # botocore's word for an endpoint that is not a URL
            raise UserError(f"{where}: {error}") from None
        except BotoCoreError as error:
            raise WorkError(f"{where}: {action} failed: {error}") from error

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        span = (
            {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        )
        with self._errors("get", key):
            answer = self._client.get_object(Bucket=self.bucket, Key=self._name(key), **span)
            data = answer["Body"].read()
        return bytes(data)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        with self._errors("put", key):
            self._client.put_object(
                Bucket=self.bucket, Key=self._name(key), Body=data, ChecksumSHA256=checksum, **condition
            )

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        self.delete(
            prefix + [*files][-1]
        )  # nothing under the old last object may be taken for whole meanwhile
        for key, data in files.items():
            self.write(prefix + key, data)

    def stat(self, key: str) -> Stat | None:
        try:
            with self._errors("head", key):
                answer = self._client.head_object(Bucket=self.bucket, Key=self._name(key))
        except MissingObject:
            return None
        return Stat(key, answer["ContentLength"], answer["ETag"])

    def list(self, prefix: str) -> Iterator[Stat]:
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._name(prefix)
            )
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(f"{self.prefix}/" if self.prefix else "")
                    yield Stat(key, item["Size"], item["ETag"])

    def delete(self, key: str) -> None:
        with self._errors("delete", key):
            self._client.delete_object(Bucket=self.bucket, Key=self._name(key))
