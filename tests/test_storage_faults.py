"""S3 that fails: what can heal is tried again, what cannot is one line, and nothing wrong is ever taken for right."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from faulty_s3 import FaultyS3, faulty_s3
from s3_server import KEYS
from test_storage import s3_endpoint  # noqa: F401
from tiny import TINY, answer, dsno
from training_runs import wait_for

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.storage import (
    MissingObject,
    Patience,
    PreconditionFailed,
    Storage,
    open_storage,
    s3,
    silence_now,
)
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


SAVED_KEYS = "aws_access_key_id = a\naws_secret_access_key = b\n"
IN_SETTINGS = "the AWS settings (AWS_* variables, ~/.aws/config and ~/.aws/credentials): "
# what ~/.aws/config says, further variables, and what is said of it
SETTINGS: dict[str, tuple[str, dict[str, str], str]] = {
    "a program that fails": (
        "[default]\ncredential_process = /bin/sh -c 'echo log in first >&2; exit 3'\n",
        {},
        "credential_process of the AWS profile default failed: log in first",
    ),
    "a program that prints a page": (
        "[default]\ncredential_process = /bin/echo '<html>'\n",
        {},
        "credential_process of the AWS profile default printed something other than credentials in JSON",
    ),
    "a program that prints no keys": (
        """[default]\ncredential_process = /bin/echo '{"Version": 1}'\n""",
        {},
        "credential_process of the AWS profile default failed: Missing required key in response: 'AccessKeyId'",
    ),
    "no such program": (
        "[profile corp]\ncredential_process = /nonexistent/login\n",
        {"AWS_PROFILE": "corp"},
        "credential_process of the AWS profile corp cannot be started: [Errno 2] No such file or directory",
    ),
    "an open quotation": (
        "[default]\ncredential_process = /bin/echo 'x\n",
        {},
        "credential_process of the AWS profile default is not a command line: No closing quotation",
    ),
    "no such profile": (
        "",
        {"AWS_PROFILE": "corp"},
        "AWS_PROFILE: there is no profile corp in ~/.aws/config or ~/.aws/credentials",
    ),
    "half of the keys": (
        "",
        {"AWS_ACCESS_KEY_ID": "a"},
        "half of the AWS credentials is missing: Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY",
    ),
    "no keys": ("", {}, "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "no section": (SAVED_KEYS, {}, "the AWS settings: Unable to parse config file"),
    "no such region": (
        f"[default]\nregion = us east 1\n{SAVED_KEYS}",
        {},
        f"{IN_SETTINGS}Provided region_name 'us east 1'",
    ),
    "a role of no profile": (
        "[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = y\n",
        {},
        f'{IN_SETTINGS}The source_profile "y" referenced',
    ),
    "no login": (
        "[default]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n"
        "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://x\n",
        {},
        "log in again, for example with `aws sso login --profile default`",
    ),
    "a token's file that is missing": (
        "",
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nonexistent/token", "AWS_ROLE_ARN": "arn:aws:iam::1:role/x"},
        f"{IN_SETTINGS}[Errno 2] No such file or directory: '/nonexistent/token'",
    ),
}


def set_aws_config(monkeypatch: pytest.MonkeyPatch, folder: Path, config: str, **variables: str) -> None:
    """Only these AWS settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (folder / "config").write_text(config)
    files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
    for name, value in ({k: str(folder / v) for k, v in files.items()} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("what", SETTINGS)
def test_credentials_that_cannot_be_had_say_whose_error_it_is(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of an address where nothing listens, which is never reached."""
    config, variables, said = SETTINGS[what]
    set_aws_config(monkeypatch, tmp_path, config, **variables)
    with pytest.raises(WorkError) as caught:
        open_storage("s3://bucket/x", "http://127.0.0.1:1").read("k")
    message = str(caught.value)
    assert message.startswith("s3://bucket/x/k: ") and said in message, message
    assert len(message.splitlines()) == 1 and "endpoint" not in message


def test_credentials_that_fail_once_in_a_run_are_asked_for_again(
    proxy: FaultyS3, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program whose credentials must be renewed at each call, and which fails once."""
    program, calls, fails = tmp_path / "login", tmp_path / "calls", tmp_path / "fails"
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    keys = {"AccessKeyId": KEYS["AWS_ACCESS_KEY_ID"], "SecretAccessKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    program.write_text(
        f"#!/bin/sh\necho call >> {calls}\nrm {fails} 2>/dev/null && echo busy >&2 && exit 1\n"
        f"echo '{json.dumps({'Version': 1, **keys, 'Expiration': soon})}'\n"
    )
    program.chmod(0o755)
    config = f"[default]\nregion = us-east-1\ncredential_process = {program}\n"
    set_aws_config(monkeypatch, tmp_path, config)
    storage = through(proxy, request)
    storage.write("k", DATA)
    fails.touch()
    before = calls.read_text()
    assert storage.read("k") == DATA and not fails.exists() and len(calls.read_text()) > len(before)


@pytest.mark.parametrize("method", ["read", "stat"])
def test_a_clock_that_is_off_is_named(proxy: FaultyS3, request: pytest.FixtureRequest, method: str) -> None:
    """Also where the answer has no code, as that to `stat`."""
    proxy.fault = lambda method, path, number: "skewed"
    with pytest.raises(WorkError, match="this machine's clock is 1 h 0 min behind the server's") as caught:
        getattr(through(proxy, request), method)("k")
    assert "denied" not in str(caught.value) and len(proxy.seen) == 1


def test_silence_and_its_end_are_reported_once_for_all_threads(
    proxy: FaultyS3,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dsno_cluster.storage.silence.FIRST_SECONDS", 0.5)
    storage = through(proxy, request)
    storage.write("k", DATA)
    proxy.fault = lambda method, path, number: "freeze"
    patient = open_storage(storage.url, proxy.url)
    readers = [threading.Thread(target=patient.read, args=("k",)) for _ in range(4)]
    said = []

    def is_said(words: str) -> bool:
        said.append(capsys.readouterr().err)
        return words in "".join(said)

    for reader in readers:
        reader.start()
    wait_for(lambda: is_said("no answer for "), pause=0.05)
    assert "still waiting (attempt 1 of 8)" in str(silence_now())
    proxy.thaw.set()
    for reader in readers:
        reader.join()
    wait_for(lambda: is_said("s3://bucket: answers again"), pause=0.05)
    assert silence_now() is None and "".join(said).count("no answer") == 1


def started(proxy: FaultyS3, root: str, folder: Path) -> subprocess.Popen[str]:
    """gen-trajectories of the tiny experiment through the proxy."""
    root_words = [f"storage.root={root}", f"storage.endpoint_url={proxy.url}", f"run.dir={folder}"]
    words = ["gen-trajectories", *TINY, *root_words, "--launcher", "local", "--actors", "1"]
    command = [sys.executable, "-m", "dsno_cluster.cli", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **KEYS})


@pytest.mark.slow
def test_an_actor_whose_first_call_meets_an_outage_waits(
    s3_endpoint: str,  # noqa: F811
    proxy: FaultyS3,
    tmp_path: Path,
) -> None:
    """As any later call does: the command that started it has had answers."""
    port, again = int(proxy.url.rpartition(":")[2]), []
    notes: list[bool] = []

    def restart() -> None:
        again.append(FaultyS3(s3_endpoint, port))
        again[0].server.serve_forever()

    def close() -> None:
        proxy.server.shutdown()
        proxy.server.server_close()
        timer = threading.Timer(6.0, restart)  # longer than the four attempts of a first call take
        timer.daemon = True
        timer.start()

    def fault(method: str, path: str, number: int) -> str:
        notes.append(method == "PUT" and path.endswith("progress.json"))
        if notes[-1] and sum(notes) == 1:  # the driver's, before any shard
            threading.Thread(target=close, daemon=True).start()
        return ""

    proxy.fault = fault
    run = started(proxy, "s3://bucket/outage", tmp_path)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    again[0].server.shutdown()
    again[0].server.server_close()


@pytest.mark.slow
def test_what_an_actor_waits_for_is_said_by_the_driver(proxy: FaultyS3, tmp_path: Path) -> None:
    proxy.fault = lambda method, path, number: (
        "freeze" if method == "PUT" and "/shard-" in path and not proxy.thaw.is_set() else ""
    )
    run = started(proxy, "s3://bucket/frozen", tmp_path)
    assert run.stderr is not None
    lines = []
    for line in run.stderr:
        lines.append(line)
        if "an actor reports: s3://bucket: no answer for " in line:
            proxy.thaw.set()
    assert run.wait(timeout=300) == 0, "".join(lines)
    assert proxy.thaw.is_set(), "".join(lines)


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
    monkeypatch.setattr(
        "dsno_cluster.storage.s3._expected", False
    )  # a test that ran a task in this process set it
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
