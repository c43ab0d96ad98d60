"""Addresses as people write them: s3://bucket/prefix, and the URL of an endpoint."""

from __future__ import annotations

import re
import urllib.parse

from dsno_cluster.errors import UserError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(?=:/)|(s3|file)(?=:)", re.IGNORECASE)
_NO_PASSWORDS = (
    "an address {}://... holds a bucket's name, no user or password; credentials come from AWS_* or a profile"
)
_BUCKET = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def checked_address(address: str) -> str:
    """A folder's path as it is, or an S3 address with its scheme in small letters.

    Raises UserError for an address of any other kind, such as gs://bucket or s3:/bucket, which would otherwise
    name a folder `gs:` or `s3:`.
    """
    found = _SCHEME.match(address)
    if found is None:
        return address
    scheme, rest = found[0].lower(), address[found.end() + 1 :]
    if scheme == "s3" and rest.startswith("//"):
        return f"s3:{rest}"
    path = rest.lstrip("/")
    if "@" in path.partition("/")[0]:
        raise UserError(_NO_PASSWORDS.format(scheme))
    if scheme in ("s3", "s3a", "s3n"):
        raise UserError(f"{address}: did you mean s3://{path}?")
    if scheme == "file":
        raise UserError(f"{address}: write a folder as its path, /{path}")
    if scheme in ("http", "https"):
        raise UserError(
            f"{address}: storage is a folder or s3://bucket/prefix; the URL of an S3 server is storage.endpoint_url"
        )
    raise UserError(f"{address}: storage is a folder or s3://bucket/prefix")


def split_address(url: str) -> tuple[str, str]:
    """Bucket and prefix of s3://bucket/prefix. Raises UserError; its message never repeats a password."""
    url = checked_address(url)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if _BUCKET.fullmatch(bucket):
        return bucket, prefix.strip("/")
    if ":" in bucket or "@" in bucket:
        raise UserError(_NO_PASSWORDS.format("s3"))
    if not bucket:
        raise UserError(f"{url}: names no bucket; write s3://bucket/prefix")
    raise UserError(
        f"{url}: {bucket!r} is not a bucket name, which is 3 to 63 lower-case letters, digits, dots and hyphens"
    )


def endpoint_problem(url: str) -> str | None:
    """What is wrong with an endpoint, without repeating a password; None for http(s)://host[:port]."""
    if "@" in url:
        return "must not carry a password; credentials come from AWS_* or a profile"
    try:
        parts = urllib.parse.urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, an incomplete IPv6 address
        right = False
    return None if right else f"{url!r} is not a URL like https://host:port"
