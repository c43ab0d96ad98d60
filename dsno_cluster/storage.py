"""Where bytes live: a folder or s3://bucket/prefix behind one small protocol that behaves the same.

A key is a relative path with forward slashes. An object that can be seen is complete: folders write aside and
rename, S3 puts are atomic and carry a sha256 that the server checks. What can heal on S3 is tried again, with
growing, random pauses; what cannot, and what did not, is a StorageError that names bucket, key and attempts.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import hashlib
import os
import random
import re
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dsno_cluster.errors import StorageError, UserError, WorkError, without_passwords


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


Result = TypeVar("Result")

STALE = timedelta(days=1)  # what an interrupted write left is removed when it is older


@dataclass(frozen=True)
class Patience:
    """How long S3 is tried: attempts, the pause after the first one and the longest one, and the socket's time-out."""

    attempts: int = 8
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 8.0
    timeout_seconds: float = 60.0
    first_attempts: int = 4  # for an endpoint that has not answered yet: it may well be written wrong


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

    def tidy(self, prefix: str) -> None:
        """Remove what interrupted writes below `prefix` left more than a day ago."""
        ...


def open_storage(url: str, endpoint_url: str | None = None, patience: Patience | None = None) -> Storage:
    """The storage at a folder path or at s3://bucket/prefix.

    Raises UserError for any other scheme, for what cannot be a bucket, and for an endpoint that is not a URL;
    also where either carries a password.
    """
    if "://" not in url:
        return FolderStorage(Path(url))
    return S3Storage(*split_address(url), endpoint_url, patience or Patience())


_BUCKET = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def split_address(url: str) -> tuple[str, str]:
    """Bucket and prefix of s3://bucket/prefix. Raises UserError, without a password that stands there."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme == "s3" and _BUCKET.fullmatch(bucket):
        return bucket, prefix.strip("/")
    if ":" in bucket or "@" in bucket:
        raise UserError(
            f"an address {scheme}://... holds a bucket's name, no user or password; credentials come from AWS_* or a profile"
        )
    if scheme != "s3":
        raise UserError(f"{url}: storage is a folder or s3://bucket/prefix")
    if not bucket:
        raise UserError(f"{url}: names no bucket; write s3://bucket/prefix")
    raise UserError(
        f"{url}: {bucket!r} is no bucket's name: those are 3 to 63 lower-case letters, digits, dots and hyphens"
    )


def endpoint_problem(url: str) -> str | None:
    """What is wrong with an endpoint, in words that hold no password; None for http(s)://host or host:port."""
    if "@" in url:
        return "must not carry a password; credentials come from AWS_* or a profile"
    try:
        parts = urllib.parse.urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        right = False
    return None if right else f"{url!r} is not a URL like https://host:port"


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
            raise StorageError(f"{self.root / key}: cannot be read: {error.strerror}") from error

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
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

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
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

    def stat(self, key: str) -> Stat | None:
        path = self.root / key
        try:
            return self._stat(path) if path.is_file() else None
        except FileNotFoundError:  # it went meanwhile
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
                if path.is_file() and path.stat().st_mtime < before:
                    path.unlink()

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
    except OSError as error:  # which names no file by itself
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


MULTIPART_ABOVE = (
    64 << 20
)  # bytes; S3 takes at most 5 GiB in one put, and a part that fails is sent again alone
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4

# what S3 and its kin answer while they are busy or broken for a moment; every 5xx status is taken so too
_HEALING_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestTimeout",
    "RequestTimeTooSkewed", "InternalError", "ServiceUnavailable", "BadDigest", "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch", "OperationAborted",
}  # fmt: skip


# Endpoints (None: Amazon's, or the environment's) that have answered this process: what fails there now may heal.
_answered: set[str | None] = set()


class S3Storage:
    """Objects of a bucket below a prefix. Credentials come only from the usual AWS sources.

    Objects above 64 MiB go up in parts. A process that is killed meanwhile leaves an unfinished upload, which no
    reader sees; `tidy` removes it, as does a lifecycle rule of the bucket (AbortIncompleteMultipartUpload).
    """

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None, patience: Patience) -> None:
        if endpoint_url is not None and (problem := endpoint_problem(endpoint_url)):
            raise UserError(f"storage.endpoint_url: {problem}")
        self.bucket, self.prefix, self.endpoint_url, self.patience = bucket, prefix, endpoint_url, patience
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket_is_there = False

    def __reduce__(self) -> tuple[Any, ...]:  # a client cannot travel to another process; its address can
        return S3Storage, (self.bucket, self.prefix, self.endpoint_url, self.patience)

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        # one owner of retrying, `_try`: botocore would not try again a body that broke off
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=min(10.0, self.patience.timeout_seconds),
            read_timeout=self.patience.timeout_seconds,
            max_pool_connections=16,
        )
        # a session of its own: the default one is not safe across threads and never reads credentials again
        session, found_there = boto3.session.Session(), "AWS_ENDPOINT_URL, or endpoint_url of the AWS profile"
        try:
            client = session.client("s3", endpoint_url=self.endpoint_url, config=config)
        except BotoCoreError:
            raise
        except ValueError:  # of the endpoint; its text may hold a password
            raise UserError(f"{found_there}: is not a URL like https://host:port") from None
        if problem := endpoint_problem(client.meta.endpoint_url):
            raise UserError(f"{found_there}: {problem}")
        return client

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _try(self, action: str, key: str, call: Callable[[int], Result]) -> Result:
        """`call(attempt)`, again and again where a failure can heal; botocore's errors as ours, in one line."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            FlexibleChecksumError,
            HTTPClientError,
            IncompleteReadError,
            NoCredentialsError,
            PartialCredentialsError,
        )
        from botocore.exceptions import ConnectionError as NoConnection  # refused, unknown host, TLS, proxy

        where = f"s3://{self.bucket}/{self._name(key)}"
        healing = (NoConnection, HTTPClientError, IncompleteReadError, FlexibleChecksumError, OSError)
        attempts = self.patience.attempts
        pause = self.patience.first_pause_seconds
        attempt = 1
        while True:
            try:
                result = call(attempt)
                _answered.add(self.endpoint_url)
                return result
            except (NoCredentialsError, PartialCredentialsError):
                raise StorageError(
                    f"{where}: no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
                ) from None
            except ClientError as error:
                _answered.add(self.endpoint_url)
                code = str(error.response.get("Error", {}).get("Code", "?"))
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
                if code == "NoSuchBucket":
                    raise StorageError(f"{where}: there is no bucket {self.bucket}") from None
                if code in ("NoSuchKey", "404"):
                    raise MissingObject(f"{where}: no such object") from None
                if code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412:
                    raise PreconditionFailed(
                        f"{where}: exists already or was changed by another writer"
                    ) from None
                problem, cause = f"{code} (HTTP {status})", error
                heals = status >= 500 or status == 429 or code in _HEALING_CODES
                if not heals or status == 501:  # 501: this server will never do it
                    raise StorageError(
                        f"{where}: {action} failed after {attempt} attempt(s): {problem}"
                    ) from error
            except healing as error:
                problem, cause = without_passwords(f"{type(error).__name__}: {error}"), error
                if isinstance(error, NoConnection) and self.endpoint_url not in _answered:
                    attempts = min(attempts, self.patience.first_attempts)
            except BotoCoreError as error:
                raise StorageError(f"{where}: {action} failed: {without_passwords(str(error))}") from error
            if attempt >= attempts:
                raise StorageError(f"{where}: {action} failed after {attempt} attempts: {problem}") from cause
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self.patience.longest_pause_seconds)
            attempt += 1

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        whole = start == 0 and end is None
        span = {} if whole else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}

        def get(attempt: int) -> bytes:
            from botocore.exceptions import IncompleteReadError

            answer = self._client.get_object(
                Bucket=self.bucket, Key=self._name(key), ChecksumMode="ENABLED", **span
            )
            data = bytes(answer["Body"].read())
            expected = answer["ContentLength"]
            if len(data) != expected:
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
            return data

        if end is not None and end <= start:
            return b""
        return self._try("get", key, get)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        if len(data) > MULTIPART_ABOVE:
            self._write_parts(key, data, condition)
            return

        def put(attempt: int) -> None:
            try:
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=self._name(key),
                    Body=data,
                    ChecksumSHA256=_sha256(data),
                    **condition,
                )
            except self._client.exceptions.ClientError as error:
                # an earlier attempt may have succeeded and its answer been lost: then what is there is ours
                refused = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)
                if not (attempt > 1 and refused and self._holds(key, data)):
                    raise

        self._try("put", key, put)

    def _write_parts(self, key: str, data: bytes, condition: dict[str, str]) -> None:
        client, target = self._client, {"Bucket": self.bucket, "Key": self._name(key)}
        upload: str = self._try(
            "put",
            key,
            lambda attempt: client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256")["UploadId"],
        )
        target["UploadId"] = upload

        def send(number: int) -> dict[str, Any]:
            part = data[(number - 1) * PART_BYTES : number * PART_BYTES]
            checksum = _sha256(part)
            answer = self._try(
                "put of a part",
                key,
                lambda attempt: client.upload_part(
                    **target, PartNumber=number, Body=part, ChecksumSHA256=checksum
                ),
            )
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

        def complete(attempt: int) -> None:
            try:
                client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, **condition)
            except client.exceptions.ClientError:
                if not (
                    attempt > 1 and self._holds(key, data)
                ):  # as in `write`: the answer may have been lost
                    raise

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
                parts = list(threads.map(send, range(1, -(-len(data) // PART_BYTES) + 1)))
            self._try("put", key, complete)
        except BaseException:
            with contextlib.suppress(WorkError):  # what failed is what must be told; `tidy` comes again
                self._try("abort", key, lambda attempt: client.abort_multipart_upload(**target))
            raise

    def _holds(self, key: str, data: bytes) -> bool:
        found = self.stat(key)
        return found is not None and found.size == len(data) and self.read(key) == data

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        self.delete(
            prefix + [*files][-1]
        )  # nothing under the old last object may be taken for whole meanwhile
        for key, data in files.items():
            self.write(prefix + key, data)

    def stat(self, key: str) -> Stat | None:
        def head(attempt: int) -> Any:
            return self._client.head_object(Bucket=self.bucket, Key=self._name(key))

        try:
            answer = self._try("head", key, head)
        except MissingObject:
            self._check_bucket()
            return None
        self._bucket_is_there = True
        return Stat(key, answer["ContentLength"], answer["ETag"])

    def _check_bucket(self) -> None:
        """Raises WorkError where there is no bucket: the 404 of a head, which has no body, does not tell. Asks once."""

        def head(attempt: int) -> None:
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except self._client.exceptions.ClientError as error:
                # any other answer, such as 403 for want of a permission, says nothing against the bucket
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                    raise

        if self._bucket_is_there:
            return
        try:
            self._try("head of the bucket", "", head)
        except MissingObject:
            raise StorageError(f"{self.url}: there is no bucket {self.bucket}") from None
        self._bucket_is_there = True

    def list(self, prefix: str) -> Iterator[Stat]:
        token: dict[str, str] = {}
        while True:
            page = self._try(
                "list",
                prefix,
                lambda attempt, token=token: self._client.list_objects_v2(  # type: ignore[misc]
                    Bucket=self.bucket, Prefix=self._name(prefix), **token
                ),
            )
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(f"{self.prefix}/" if self.prefix else "")
                yield Stat(key, item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        self._try(
            "delete",
            key,
            lambda attempt: self._client.delete_object(Bucket=self.bucket, Key=self._name(key)),
        )

    def tidy(self, prefix: str) -> None:
        def unfinished(attempt: int) -> Any:
            return self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=self._name(prefix))

        for upload in self._try("list uploads", prefix, unfinished).get("Uploads", []):
            if datetime.now(UTC) - upload["Initiated"] > STALE:
                target = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._try(
                    "abort",
                    prefix,
                    lambda attempt, target=target: self._client.abort_multipart_upload(**target),  # type: ignore[misc]
                )


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
