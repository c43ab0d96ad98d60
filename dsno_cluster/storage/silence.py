"""Says so while S3 does not answer: after ten seconds, then once a minute, for all threads of the process together."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsno_cluster import console

FIRST_SECONDS = 10.0
AGAIN_SECONDS = 60.0
SLOWEST_BYTES = 1e6  # a second: a slower upload is taken for silence


@dataclass(eq=False)
class Call:
    """A call of a server, with retries; `began` is later than it was for one that sends many bytes."""

    server: Server
    attempts: int
    began: float
    attempt: int = 1

    def heard(self) -> None:
        """Note that the server answers, or sends a part of its answer."""
        self.server.heard = time.monotonic()


@dataclass(eq=False)
class Server:
    """What this process knows of the server of a bucket, whose address is `url`."""

    url: str
    heard: float = 0.0
    said: float | None = None  # when its silence was last reported, None while it answers
    calls: set[Call] = field(default_factory=set)

    def silence(self) -> str | None:
        """Its silence in words; None if it has answered a moment ago, or nothing waits for it."""
        if not self.calls:
            return None
        oldest = min(self.calls, key=lambda call: call.began)
        seconds = time.monotonic() - max(oldest.began, self.heard)
        if seconds < FIRST_SECONDS:
            return None
        return (
            f"{self.url}: no answer for {console.duration(seconds)}, still waiting "
            f"(attempt {oldest.attempt} of {oldest.attempts})"
        )


_servers: dict[tuple[str, str | None], Server] = {}
_changed = threading.Condition()  # guards the servers and their calls
_watcher: threading.Thread | None = None


@contextlib.contextmanager
def watched(url: str, endpoint_url: str | None, attempts: int, size: int = 0) -> Iterator[Call]:
    """In this context a call waits for the server of a bucket; `size` is the number of bytes that it sends."""
    global _watcher
    with _changed:
        server = _servers.setdefault((url, endpoint_url), Server(url))
        call = Call(server, attempts, time.monotonic() + size / SLOWEST_BYTES)
        server.calls.add(call)
        if _watcher is None:
            _watcher = threading.Thread(target=_watch, name="silence of S3", daemon=True)
            _watcher.start()
        _changed.notify()
    try:
        yield call
    finally:
        with _changed:
            server.calls.discard(call)
            if not server.calls and server.said is not None and server.heard < server.said:
                server.said = None  # given up: there is no end of the silence to report


def silence_now() -> str | None:
    """The silence that this process waits in now, in words; None if all servers answer."""
    with _changed:
        return next((text for server in _servers.values() if (text := server.silence())), None)


def _watch() -> None:
    while True:
        with _changed:
            while not any(server.calls or server.said is not None for server in _servers.values()):
                _changed.wait()
            lines = [line for server in _servers.values() if (line := _news(server))]
        for line in lines:
            # if the log is full or closed, the call itself continues
            with contextlib.suppress(OSError, ValueError):
                console.say(line)
        time.sleep(1.0)


def _news(server: Server) -> str | None:
    """What is to be said of a server now."""
    now = time.monotonic()
    if (text := server.silence()) is None:
        if server.said is None or server.heard < server.said:
            return None
        server.said = None
        return f"{server.url}: answers again"
    if server.said is not None and now - server.said < AGAIN_SECONDS:
        return None
    server.said = now
    return text
