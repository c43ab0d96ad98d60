"""Objects of an S3 bucket: puts checked by sha256, large ones in parts, and one place for retries."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from dsno_cluster.errors import StorageError, UserError, WorkError, without_passwords
from dsno_cluster.storage.address import endpoint_problem
from dsno_cluster.storage.aws_errors import CredentialsError, explain_refusal, explain_settings
from dsno_cluster.storage.protocol import STALE, MissingObject, PreconditionFailed, Stat
from dsno_cluster.storage.silence import Call, watched

Result = TypeVar("Result")

# bytes; S3 accepts at most 5 GiB in one put, and only a part that failed is sent again
MULTIPART_ABOVE = 64 << 20
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
READ_BYTES = 1 << 20  # read at a time, so that it is known that bytes arrive

# errors of S3 and compatible servers that are transient; so is every 5xx status
_HEALING_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestTimeout",
    "RequestTimeTooSkewed", "InternalError", "ServiceUnavailable", "BadDigest", "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch", "OperationAborted",
}  # fmt: skip

# Endpoints (None: Amazon's, or the environment's) that have answered this process: a failure there may be
# transient.
_answered: set[str | None] = set()
_expected = False  # whether the command that started this process has had answers


def expect_answers() -> None:
    """From now on wait for any endpoint that cannot be reached, even if this process has had no answer from it yet.

    For the processes of a run: the command that started them has checked the address.
    """
    global _expected
    _expected = True


@dataclass(frozen=True)
class Patience:
    """How S3 is retried: attempts, the first and the longest pause between them, the socket's time-out."""

    attempts: int = 8
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 8.0
    timeout_seconds: float = 60.0
    first_attempts: int = 4  # for an endpoint that has not answered yet: its URL may be wrong


class S3Storage:
    """Objects of a bucket below a prefix. Credentials come only from the usual AWS sources.

    Objects above 64 MiB are uploaded in parts. A process that is killed during the upload leaves it
    unfinished and invisible to readers; `tidy` removes it, as does a lifecycle rule of the bucket
    (AbortIncompleteMultipartUpload).
    """

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None, patience: Patience) -> None:
        if endpoint_url is not None and (problem := endpoint_problem(endpoint_url)):
            raise UserError(f"storage.endpoint_url: {problem}")
        self.bucket, self.prefix, self.endpoint_url, self.patience = bucket, prefix, endpoint_url, patience
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket_is_there = False
        self._making = (
            threading.RLock()
        )  # a session is not thread-safe while clients and credentials are made

    def __reduce__(self) -> tuple[Any, ...]:  # a client cannot be pickled; its address can
        return S3Storage, (self.bucket, self.prefix, self.endpoint_url, self.patience)

    @functools.cached_property
    def _session(self) -> Any:
        import botocore.session

        # a separate session for each storage, which reads the settings and credentials of now
        return botocore.session.Session()

    @functools.cached_property
    def _client(self) -> Any:
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        # only `_try` retries: botocore would not retry a body that broke off
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=min(10.0, self.patience.timeout_seconds),
            read_timeout=self.patience.timeout_seconds,
            max_pool_connections=16,
        )
        self._find_credentials()
        found_there = "AWS_ENDPOINT_URL, or endpoint_url of the AWS profile"
        try:
            with self._making:
                client = self._session.create_client("s3", endpoint_url=self.endpoint_url, config=config)
        except BotoCoreError as error:
            raise CredentialsError(explain_settings(error, self._session)) from error
        except ValueError:  # about the endpoint; its text may contain a password
            raise UserError(f"{found_there}: is not a URL like https://host:port") from None
        if problem := endpoint_problem(client.meta.endpoint_url):
            raise UserError(f"{found_there}: {problem}")
        return client

    def _find_credentials(self) -> None:
        """Find the credentials, or renew those that expire.

        Raises CredentialsError if that fails, except for a server of credentials that cannot be reached.
        """
        from botocore.exceptions import ConnectionError, HTTPClientError, NoCredentialsError

        try:
            with self._making:
                credentials = self._session.get_credentials()
            if credentials is None:
                raise NoCredentialsError
            credentials.get_frozen_credentials()
        except (ConnectionError, HTTPClientError):
            raise
        except Exception as error:
            # whatever it is: credentials come from other people's programs and files
            raise CredentialsError(explain_settings(error, self._session)) from error

    def _asked_amazon(self) -> str:
        """A hint for users whose bucket is not Amazon's and who named no endpoint."""
        if (
            self.endpoint_url is not None or "_client" not in self.__dict__
        ):  # it may be credentials that were not reached
            return ""
        if "amazonaws.com" not in self._client.meta.endpoint_url:
            return ""
        return " (Amazon was asked, as no endpoint is named: --endpoint-url, storage.endpoint_url or AWS_ENDPOINT_URL)"

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _try(self, action: str, key: str, call: Callable[[Call], Result], size: int = 0) -> Result:
        """The result of `call`, retried after transient errors; botocore's errors become our own.

        `size` is the number of bytes that it sends.
        """
        pause = self.patience.first_pause_seconds
        with watched(f"s3://{self.bucket}", self.endpoint_url, self.patience.attempts, size) as waiting:
            while True:
                try:
                    self._find_credentials()
                    result = call(waiting)
                    _answered.add(self.endpoint_url)
                    waiting.heard()
                    return result
                except Exception as error:
                    problem = self._transient(error, action, key, waiting)
                    if waiting.attempt >= waiting.attempts:
                        raise StorageError(
                            f"s3://{self.bucket}/{self._name(key)}: {action} failed after {waiting.attempt} attempts: "
                            f"{problem}{self._asked_amazon()}"
                        ) from error
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, self.patience.longest_pause_seconds)
                waiting.attempt += 1

    def _transient(self, error: Exception, action: str, key: str, waiting: Call) -> str:
        """What a transient error is, in words; raises our own error, or this one, for all others."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            FlexibleChecksumError,
            HTTPClientError,
            IncompleteReadError,
        )
        from botocore.exceptions import ConnectionError as NoConnection  # refused, unknown host, TLS, proxy

        where = f"s3://{self.bucket}/{self._name(key)}"
        if isinstance(error, CredentialsError):
            if self.endpoint_url in _answered:  # it had some before
                return str(error)
            raise StorageError(f"{where}: {error}") from error
        if isinstance(error, ClientError):
            _answered.add(self.endpoint_url)
            waiting.heard()
            return self._transient_answer(error, action, where, waiting.attempt)
        healing = (NoConnection, HTTPClientError, IncompleteReadError, FlexibleChecksumError, OSError)
        if isinstance(error, healing):
            if isinstance(error, NoConnection) and not (_expected or self.endpoint_url in _answered):
                waiting.attempts = min(waiting.attempts, self.patience.first_attempts)
            return without_passwords(f"{type(error).__name__}: {error}")
        if isinstance(error, BotoCoreError):
            raise StorageError(f"{where}: {action} failed: {without_passwords(str(error))}") from error
        raise error

    def _transient_answer(self, error: Any, action: str, where: str, attempt: int) -> str:
        """The same for an error answer of the server."""
        code = str(error.response.get("Error", {}).get("Code", "?"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
        if code == "NoSuchBucket":
            raise StorageError(f"{where}: there is no bucket {self.bucket}") from None
        if code in ("NoSuchKey", "404"):
            raise MissingObject(f"{where}: no such object") from None
        if code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412:
            raise PreconditionFailed(f"{where}: exists already or was changed by another writer") from None
        problem, clock = explain_refusal(error)
        heals = status >= 500 or status == 429 or (code in _HEALING_CODES and not clock)
        if not heals or status == 501:  # 501: this server does not support it
            raise StorageError(f"{where}: {action} failed after {attempt} attempt(s): {problem}") from error
        return problem

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        whole = start == 0 and end is None
        span = {} if whole else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}

        def get(call: Call) -> bytes:
            from botocore.exceptions import IncompleteReadError

            try:
                answer = self._client.get_object(
                    Bucket=self.bucket, Key=self._name(key), ChecksumMode="ENABLED", **span
                )
            except self._client.exceptions.ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                    return b""  # the range begins at the end or after it
                raise
            parts = []
            while part := answer["Body"].read(READ_BYTES):
                parts.append(part)
                call.heard()
            data = b"".join(parts)
            expected = answer["ContentLength"]
            if len(data) != expected:
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
            return data

        if end is not None and end <= start:  # no header can ask for an empty range
            self._try("head", key, self._head(key))
            return b""
        return self._try("get", key, get)

    def _head(self, key: str) -> Callable[[Call], Any]:
        return lambda call: self._client.head_object(Bucket=self.bucket, Key=self._name(key))

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        if len(data) > MULTIPART_ABOVE:
            self._write_parts(key, data, condition)
            return

        def put(call: Call) -> None:
            try:
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=self._name(key),
                    Body=data,
                    ChecksumSHA256=_sha256(data),
                    **condition,
                )
            except self._client.exceptions.ClientError as error:
                # an earlier attempt may have succeeded although its answer was lost: then the object is ours
                refused = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)
                if not (call.attempt > 1 and refused and self._holds(key, data)):
                    raise

        self._try("put", key, put, len(data))

    def _write_parts(self, key: str, data: bytes, condition: dict[str, str]) -> None:
        client, target = self._client, {"Bucket": self.bucket, "Key": self._name(key)}
        upload: str = self._try(
            "put",
            key,
            lambda call: client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256")["UploadId"],
        )
        target["UploadId"] = upload

        def send(number: int) -> dict[str, Any]:
            part = data[(number - 1) * PART_BYTES : number * PART_BYTES]
            checksum = _sha256(part)
            answer = self._try(
                "put of a part",
                key,
                lambda call: client.upload_part(
                    **target, PartNumber=number, Body=part, ChecksumSHA256=checksum
                ),
                PARTS_AT_ONCE * len(part),
            )
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

        def complete(call: Call) -> None:
            try:
                client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, **condition)
            except client.exceptions.ClientError:
                # as in `write`: the answer may have been lost
                if not (call.attempt > 1 and self._holds(key, data)):
                    raise

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
                parts = list(threads.map(send, range(1, -(-len(data) // PART_BYTES) + 1)))
            self._try("put", key, complete)
        except BaseException:
            with contextlib.suppress(WorkError):  # report the first failure; `tidy` cleans up later
                self._abort(key, target)
            raise

    def _holds(self, key: str, data: bytes) -> bool:
        found = self.stat(key)
        return found is not None and found.size == len(data) and self.read(key) == data

    def write_folder(self, prefix: str, files: dict[str, bytes]) -> None:
        # while the old last object exists, the folder would be taken for complete
        self.delete(prefix + [*files][-1])
        for key, data in files.items():
            self.write(prefix + key, data)

    def stat(self, key: str) -> Stat | None:
        try:
            answer = self._try("head", key, self._head(key))
        except MissingObject:
            self._check_bucket()
            return None
        self._bucket_is_there = True
        return Stat(key, answer["ContentLength"], answer["ETag"])

    def _check_bucket(self) -> None:
        """Raises StorageError if the bucket does not exist, which the 404 of an object's head does not say.

        Asks once.
        """

        def head(call: Call) -> None:
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except self._client.exceptions.ClientError as error:
                # any other answer, such as 403 for lack of a permission, does not mean that the bucket is
                # missing
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
        asked = {"Bucket": self.bucket, "Prefix": self._name(prefix)}

        def next_page(call: Call) -> Any:
            return self._client.list_objects_v2(**asked)

        while True:
            page = self._try("list", prefix, next_page)
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(f"{self.prefix}/" if self.prefix else "")
                if not item["Key"].endswith("/"):  # a folder marker, as consoles create them
                    yield Stat(key, item["Size"], item["ETag"])
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        self._try(
            "delete",
            key,
            lambda call: self._client.delete_object(Bucket=self.bucket, Key=self._name(key)),
        )

    def tidy(self, prefix: str) -> None:
        def unfinished(call: Call) -> Any:
            return self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=self._name(prefix))

        for upload in self._try("list uploads", prefix, unfinished).get("Uploads", []):
            if datetime.now(UTC) - upload["Initiated"] > STALE:
                self._abort(
                    prefix, {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                )

    def _abort(self, key: str, upload: dict[str, str]) -> None:
        self._try("abort", key, lambda call: self._client.abort_multipart_upload(**upload))


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
