"""A stand-in for the Hugging Face hub and for a plain file server, on loopback: nothing else may be reached from tests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """Repositories by name and revision, and what was asked for.

    `cut` breaks off the next answer after so many bytes of a file's body, once; `gated` repositories refuse everyone without
    the token `hf_right`.
    """

    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # repository -> branch -> commit
    files: dict[tuple[str, str], dict[str, bytes]] = field(
        default_factory=dict
    )  # (repository, commit) -> files
    plain: dict[str, bytes] = field(default_factory=dict)  # path -> body
    gated: set[str] = field(default_factory=set)
    cut: int | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    url: str = ""

    def add(self, repository: str, commit: str, files: dict[str, bytes], branch: str = "main") -> None:
        self.commits.setdefault(repository, {})[branch] = commit
        self.files[repository, commit] = files

    def bodies_sent(self) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET" and "/api/" not in path]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            if path in hub.plain:
                self._file(hub.plain[path], body, {})
            elif parts[:2] == ["api", "models"]:
                self._model("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif len(parts) > 4 and parts[2] == "resolve":
                self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
            else:
                self._refuse(404)

        def _refuse(self, status: int, code: str | None = None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _is_refused(self, repository: str) -> bool:
            if repository not in hub.commits:
                self._refuse(401, "RepoNotFound")
                return True
            if repository in hub.gated and self.headers.get("Authorization") != "Bearer hf_right":
                self._refuse(403, "GatedRepo")
                return True
            return False

        def _model(self, repository: str, revision: str) -> None:
            if self._is_refused(repository):
                return
            commit = hub.commits[repository].get(revision, revision)
            if (repository, commit) not in hub.files:
                self._refuse(404, "RevisionNotFound")
                return
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": "0" * 40}
                | (
                    {
                        "lfs": {
                            "sha256": hashlib.sha256(data).hexdigest(),
                            "size": len(data),
                            "pointerSize": 130,
                        }
                    }
                    if name.endswith((".bin", ".safetensors"))
                    else {}
                )
                for name, data in hub.files[repository, commit].items()
            ]
            content = json.dumps(
                {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []}
            )
            self._file(content.encode(), True, {"Content-Type": "application/json"})

        def _resolve(self, repository: str, commit: str, name: str, body: bool) -> None:
            if self._is_refused(repository):
                return
            data = hub.files.get((repository, commit), {}).get(name)
            if data is None:
                self._refuse(404, "EntryNotFound")
                return
            self._file(data, body, {"X-Repo-Commit": commit})

        def _file(self, data: bytes, body: bool, headers: dict[str, str]) -> None:
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            start, wanted = 0, self.headers.get("Range")
            if wanted and self.headers.get("If-Range") in (None, tag):
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", tag)
            self.send_header("Accept-Ranges", "bytes")
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if not body:
                return
            if hub.cut is not None and "/api/" not in self.path:
                stop, hub.cut = hub.cut, None
                self.wfile.write(data[start : start + stop])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(data[start:])

    return Handler


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
