"""A proxy before a real S3 server that does what networks and busy servers do, request by request."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Fault = str
"""500, 503, reset, reset-body, cut-body, flip, stall, freeze, skewed, lost-answer, or "" for none."""

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
SKEWED = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class FaultyS3:
    """`url` speaks S3. `fault(method, path, number)` names what happens to the request; `seen` counts them."""

    def __init__(self, endpoint: str, port: int = 0) -> None:
        self.fault: Callable[[str, str, int], Fault] = lambda method, path, number: ""
        self.seen: list[tuple[str, str, Fault]] = []
        self.lock = threading.Lock()
        self.thaw = threading.Event()  # ends `freeze`
        proxy, target = self, urlsplit(endpoint)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                if self.headers.get("Expect") == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                body = self.rfile.read(size)
                with proxy.lock:
                    path = self.path.split("?")[0]
                    fault = proxy.fault(self.command, path, len(proxy.seen))
                    proxy.seen.append((self.command, path, fault))
                if fault in ("500", "503"):
                    return self.reply(int(fault), {}, INTERNAL if fault == "500" else SLOW_DOWN)
                if fault == "reset":
                    return self.reset()
                if fault == "skewed":  # by a server whose clock is an hour ahead
                    later = email.utils.formatdate(time.time() + 3605, usegmt=True)
                    return self.reply(403, {"Date": later}, SKEWED)
                if fault == "freeze":
                    proxy.thaw.wait()
                if fault == "stall":
                    time.sleep(30)
                    return self.reset()
                upstream = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
                try:
                    upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() != "expect":
                            upstream.putheader(name, value)
                    upstream.endheaders(body)
                    response = upstream.getresponse()
                    data = response.read()
                except OSError:  # the server is away
                    return self.reset()
                finally:
                    upstream.close()
                if fault == "lost-answer":
                    return self.reset()
                headers = dict(response.getheaders())
                if fault == "flip" and data:
                    data = (
                        data[: len(data) // 2]
                        + bytes([data[len(data) // 2] ^ 1])
                        + data[len(data) // 2 + 1 :]
                    )
                broken = {"cut-body": len(data) // 2, "reset-body": len(data) // 2}.get(fault)
                return self.reply(response.status, headers, data, broken)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def reply(
                self, status: int, headers: dict[str, str], data: bytes, broken: int | None = None
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
                if status != 204:
                    self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data if broken is None else data[:broken])
                if broken is not None:
                    self.wfile.flush()
                    self.close_connection = True

            def reset(self) -> None:
                linger = struct.pack("ii", 1, 0)  # close sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextlib.contextmanager
def faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    """The proxy, running, before the server at `endpoint`."""
    proxy = FaultyS3(endpoint)
    thread = threading.Thread(target=proxy.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
