"""One writer at a time, for files that belong together: each puts its record, on condition that there is none."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Literal

from dsno_cluster import console
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.records import Record, read_record, record_bytes
from dsno_cluster.storage.protocol import MissingObject, PreconditionFailed, Storage

POLL_SECONDS = 0.5
ENDED_SECONDS = 300.0  # a record that lies there for longer was left by a writer that was killed


class Writer(Record):
    """Who writes now; `id` is random."""

    schema_version: Literal[1] = 1
    id: str
    host: str
    process: int


@contextlib.contextmanager
def only_writer(storage: Storage, key: str) -> Iterator[None]:
    """In this context no other process writes what the record at `key` stands for. It waits for one that does."""
    ours = record_bytes(Writer(id=secrets.token_hex(8), host=socket.gethostname(), process=os.getpid()))
    seen, since = "", time.monotonic()
    while not _put(storage, key, ours, None):
        there = storage.stat(key)
        if there is not None and there.etag != seen:
            console.say(
                f"{storage.url}/{key}: {_who(storage, key)} writes there now; waiting for its end, for at most "
                f"{console.duration(ENDED_SECONDS)}"
            )
            seen, since = there.etag, time.monotonic()
        elif (
            there is not None and time.monotonic() - since > ENDED_SECONDS and _put(storage, key, ours, seen)
        ):
            break
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        with contextlib.suppress(WorkError):  # report what went wrong inside
            if storage.read(key) == ours:
                storage.delete(key)


def _put(storage: Storage, key: str, ours: bytes, replaced: str | None) -> bool:
    try:
        storage.write(key, ours, if_absent=replaced is None, if_match=replaced)
    except PreconditionFailed:
        return False
    return True


def _who(storage: Storage, key: str) -> str:
    try:
        writer = read_record(Writer, storage.read(key), key)
    except (MissingObject, UserError):
        return "another process"
    return f"process {writer.process} on {writer.host}"
