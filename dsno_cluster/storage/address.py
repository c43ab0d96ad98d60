"""Addresses as people write them: s3://bucket/prefix, and the URL of an endpoint."""

from __future__ import annotations

import re
import urllib.parse

from dsno_cluster.errors import UserError

_BUCKET = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def split_address(url: str) -> tuple[str, str]:
    """Bucket and prefix of s3://bucket/prefix. Raises UserError; its message never repeats a password."""
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
