"""S3 that fails: what can heal is tried again, what cannot is one line, and nothing wrong is ever taken for right."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_s3 import FaultyS3, faulty_s3
from s3_server import KEYS
from test_storage import s3_endpoint  # noqa: F401
from tiny import TINY, answer, dsno

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.storage import MissingObject, Patience, PreconditionFailed, Storage, open_storage, s3
from dsno_cluster.trajectories.shards import Shard, read_shard, write_shard

QUICK = Patience(attempts=4, first_pause_seconds=0.01, longest_pause_seconds=0.05, timeout_seconds=2.0)
DATA = os.urandom(300_000)


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:  # noqa: F811
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    with faulty_s3(s3_endpoint) as running:
        yield running


def through(proxy: FaultyS3, request: pytest.FixtureRequest) -> Storage:
    return open_storage(f"s3://bucket/faults/{request.node.name}", proxy.url, QUICK)


def faults(proxy: FaultyS3, method: str) -> list[str]:
    return [fault for seen, _, fault in proxy.seen if seen == method]


def first(count: int, method: str, fault: str, proxy: FaultyS3) -> None:
    """The first `count` requests of a method fail."""
    left = [count]

    def choose(seen: str, path: str, number: int) -> str:
        if seen != method or not left[0]:
            return ""
        left[0] -= 1
        return fault

    proxy.fault = choose


@pytest.mark.parametrize("fault", ["500", "503", "reset", "reset-body", "cut-body", "stall"])
def test_a_read_heals(proxy: FaultyS3, request: pytest.FixtureRequest, fault: str) -> None:
    storage = through(proxy, request)
    storage.write("k", DATA)
    first(2 if fault != "stall" else 1, "GET", fault, proxy)
    assert storage.read("k") == DATA
    assert faults(proxy, "GET") == [fault] * (2 if fault != "stall" else 1) + [""]
    first(1, "GET", fault, proxy)
    assert storage.read("k", 1000, 200_000) == DATA[1000:200_000]


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost-answer", "stall"])
def test_a_write_heals(proxy: FaultyS3, request: pytest.FixtureRequest, fault: str) -> None:
    storage = through(proxy, request)
    first(1, "PUT", fault, proxy)
    storage.write("k", DATA)
    assert faults(proxy, "PUT") == [fault, ""]
    assert storage.read("k") == DATA


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_what_does_not_heal_names_bucket_key_and_attempts(
    proxy: FaultyS3, request: pytest.FixtureRequest, fault: str
) -> None:
    storage = through(proxy, request)
    proxy.fault = lambda method, path, number: fault
    with pytest.raises(WorkError, match=r"s3://bucket/faults/.*/k: put failed after 4 attempts") as caught:
        storage.write("k", DATA)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(WorkError, match=r"/k: get failed after 4 attempts"):
        storage.read("k")
    assert len(proxy.seen) == 8


def test_a_flipped_byte_is_never_accepted(proxy: FaultyS3, request: pytest.FixtureRequest) -> None:
    storage = through(proxy, request)
    storage.write("shard", DATA)
    shard = Shard(key="shard", start=0, stop=1, size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    proxy.fault = lambda method, path, number: "flip" if method == "GET" else ""
    with pytest.raises(WorkError, match="shard"):  # by the server's checksum, or by the manifest's
        read_shard(storage, "", shard)


def test_a_conditional_put_whose_answer_was_lost(proxy: FaultyS3, request: pytest.FixtureRequest) -> None:
    storage = through(proxy, request)
    first(1, "PUT", "lost-answer", proxy)
    storage.write("m", b"one", if_absent=True)  # it was done; the second attempt meets its own object
    assert faults(proxy, "PUT") == ["lost-answer", ""]
    with pytest.raises(PreconditionFailed):
        storage.write("m", b"two", if_absent=True)
    found = storage.stat("m")
    assert found is not None
    first(1, "PUT", "lost-answer", proxy)
    storage.write("m", b"three", if_match=found.etag)
    with pytest.raises(PreconditionFailed):
        storage.write("m", b"four", if_match=found.etag)
    assert storage.read("m") == b"three"
    first(1, "PUT", "reset", proxy)  # not done, and meanwhile another one wins: that is no success
    with pytest.raises(PreconditionFailed):
        storage.write("m", b"five", if_absent=True)


def test_what_cannot_heal_is_told_at_once(
    proxy: FaultyS3, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = through(proxy, request)
    with pytest.raises(MissingObject):
        storage.read("nothing")
    with pytest.raises(WorkError, match="no bucket missing-bucket"):
        open_storage("s3://missing-bucket/x", proxy.url, QUICK).read("k")
    assert len(proxy.seen) == 2
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(WorkError, match=r"after 1 attempt\(s\): .*403") as caught:
        through(proxy, request).write("k", b"x")
    assert "wrong-secret" not in str(caught.value) and len(proxy.seen) == 3
    with pytest.raises(WorkError, match=r"127\.0\.0\.1:1/"):
        open_storage("s3://bucket/x", "http://127.0.0.1:1", QUICK).read("k")
    for wrong in ("127.0.0.1:8333", "http://", "ftp://host"):
        with pytest.raises(UserError, match="is not a URL"):
            open_storage("s3://bucket/x", wrong)
    with pytest.raises(UserError, match="must not carry a password") as caught:
        open_storage("s3://bucket/x", "http://user:hidden@host:1")
    assert "hidden" not in str(caught.value)


def test_a_missing_bucket_is_not_a_missing_object(proxy: FaultyS3, request: pytest.FixtureRequest) -> None:
    """A HEAD's 404 has no body to tell them apart: the bucket is asked for, once."""
    for words in (["verify", "s3://no-such-bucket/x"], ["inspect", "s3://no-such-bucket/x"]):
        failed = dsno(*words, "--endpoint-url", proxy.url, **KEYS)
        assert failed.returncode == 1, failed.stderr
        assert failed.stderr.endswith("there is no bucket no-such-bucket\n"), failed.stderr
    proxy.seen.clear()
    storage = through(proxy, request)
    assert [storage.stat(f"nothing-{i}") for i in range(4)] == [None] * 4
    assert [path for method, path, _ in proxy.seen if not path.startswith("/bucket/faults/")] == ["/bucket"]


def test_an_endpoint_that_never_answered_is_not_waited_for(
    proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = socket.create_server(("127.0.0.1", 0))  # listens, and speaks no TLS
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nonexistent/ca.pem")
    for endpoint in (
        "http://127.0.0.1:1",
        "http://no-such-host.invalid",
        f"https://127.0.0.1:{closed.getsockname()[1]}",
    ):
        began = time.monotonic()
        with pytest.raises(WorkError, match="get failed after 4 attempts"):
            open_storage("s3://bucket/x", endpoint).read("k")
        assert time.monotonic() - began < 5  # a little of which is boto3's own import
    closed.close()


def test_a_server_that_restarts_is_waited_for(s3_endpoint: str, proxy: FaultyS3) -> None:  # noqa: F811
    """Also by a client made meanwhile: this process has had answers from there."""
    open_storage("s3://bucket/restart", proxy.url).write("k", DATA)
    proxy.server.shutdown()
    proxy.server.server_close()
    again: list[FaultyS3] = []
    port = int(proxy.url.rpartition(":")[2])

    def restart() -> None:
        again.append(FaultyS3(s3_endpoint, port))
        again[0].server.serve_forever()

    timer = threading.Timer(3.0, restart)  # longer than the four attempts of a first call take
    timer.daemon = True
    timer.start()
    try:
        assert open_storage("s3://bucket/restart", proxy.url).read("k") == DATA
    finally:
        again[0].server.shutdown()
        again[0].server.server_close()


def test_large_objects_go_up_in_parts(
    proxy: FaultyS3, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_ABOVE", 6 << 20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
    storage, data = through(proxy, request), os.urandom(12 << 20)
    failed: set[str] = set()

    def once_each(method: str, path: str, number: int) -> str:
        if method == "PUT" and len(failed) < 2:
            failed.add(str(number))
            return "503" if len(failed) == 1 else "reset"
        return ""

    proxy.fault = once_each
    storage.write("large", data)
    assert storage.read("large") == data and faults(proxy, "PUT").count("") == 3
    proxy.fault = lambda method, path, number: "500" if method == "PUT" else ""
    with pytest.raises(WorkError, match="put of a part failed after 4 attempts"):
        storage.write("broken", data)
    proxy.fault = lambda method, path, number: ""
    assert storage.stat("broken") is None
    uploads = storage._client.list_multipart_uploads(Bucket="bucket")  # type: ignore[attr-defined]
    assert not [u for u in uploads.get("Uploads", []) if "large_objects" in u["Key"]]


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_shard_is_not_put_over_another(
    proxy: FaultyS3, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    import torch

    if in_parts:
        monkeypatch.setattr(s3, "MULTIPART_ABOVE", 6 << 20)
        monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    storage = through(proxy, request)
    ours = {"states": torch.zeros(2, 1 << 20, 1, 1, 1)}
    theirs = {"states": torch.ones(2, 1 << 20, 1, 1, 1)}
    put = 3 if in_parts else 0  # the request that makes the object: after the upload's start and two parts
    proxy.fault = lambda method, path, number: "lost-answer" if number == put else ""
    line = write_shard(storage, "d/", 0, 0, theirs)  # the second attempt meets its own object
    assert [method for method, _, fault in proxy.seen if fault] == ["POST" if in_parts else "PUT"]
    with pytest.raises(WorkError, match="made with other bits"):
        write_shard(storage, "d/", 0, 0, ours)
    assert write_shard(storage, "d/", 0, 0, theirs) == line
    (bad,) = storage.list("d/")
    replaced = write_shard(storage, "d/", 0, 0, ours, replace=bad.etag)
    with pytest.raises(WorkError, match="made with other bits"):
        write_shard(storage, "d/", 0, 0, theirs, replace=bad.etag)
    assert replaced != line and torch.equal(read_shard(storage, "d/", replaced)["states"], ours["states"])


@pytest.mark.slow
def test_a_run_through_a_bad_network_gives_the_same_bytes(
    proxy: FaultyS3, tiny_data: Path, tmp_path: Path
) -> None:
    kinds = ["500", "503", "reset", "reset-body", "cut-body", "lost-answer"]
    proxy.fault = lambda method, path, number: kinds[number // 3 % len(kinds)] if number % 3 == 2 else ""
    root = ["storage.root=s3://bucket/badnet", f"storage.endpoint_url={proxy.url}", f"run.dir={tmp_path}"]
    made = dsno("gen-trajectories", *TINY, *root, "--launcher", "local", "--actors", "2", **KEYS)
    assert made.returncode == 0, made.stderr
    assert {fault for _, _, fault in proxy.seen} >= {*kinds}
    folder = next((tiny_data / "trajectories").iterdir())
    url = f"s3://bucket/badnet/trajectories/{folder.name}"
    verified = answer("verify", url, "--endpoint-url", proxy.url, "--json", **KEYS)
    assert verified.returncode == 0, verified.stderr
    proxy.fault = lambda method, path, number: ""
    manifest = json.loads(open_storage(url, proxy.url).read("manifest.json"))
    assert manifest["shards"] == json.loads((folder / "manifest.json").read_text())["shards"]


def test_old_leftovers_are_swept_and_young_ones_are_not(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("d/shard-0", b"x")
    old, young = tmp_path / "d" / ".shard-1.abc.tmp", tmp_path / "d" / ".shard-2.abc.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    folder = tmp_path / "d" / ".step-1.abc.tmp"
    (folder / "new").mkdir(parents=True)
    for path in (old, folder):
        os.utime(path, (time.time() - 90_000,) * 2)
    storage.tidy("d/")
    assert not old.exists() and not folder.exists() and young.exists() and storage.read("d/shard-0") == b"x"
