"""Folders and S3 behave the same. The S3 server is a real one (SeaweedFS), on loopback."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
import s3_server
from s3_server import KEYS
from teacher_models import PUBLISHED
from tiny import TINY, answer, dsno

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.storage import (
    MissingObject,
    PreconditionFailed,
    Storage,
    absolute_address,
    open_storage,
    write_file,
)
from dsno_cluster.teachers import teacher_info


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running S3 server with the bucket `bucket`."""
    folder = tmp_path_factory.mktemp("s3")
    ports = s3_server.Ports.free()
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(s3_server.command(folder, "127.0.0.1", ports), stdout=log, stderr=log)
    url = f"http://127.0.0.1:{ports.s3}"
    deadline = time.monotonic() + 90
    while not s3_server.answers(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise AssertionError((folder / "log").read_text()[-2000:])
        time.sleep(0.5)
    yield url
    server.kill()  # it takes half a minute to end by itself
    server.wait(30)
    s3_server.remove_sockets(ports)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path))
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    name = request.node.name.replace("[", "-").replace("]", "")
    return open_storage(f"s3://bucket/{name}", request.getfixturevalue("s3_endpoint"))


def test_reads_back_what_was_written(storage: Storage) -> None:
    storage.write("a/b.bin", b"0123456789")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 2, 5) == b"234"
    assert storage.read("a/b.bin", 7) == b"789"
    found = storage.stat("a/b.bin")
    assert found is not None and found.size == 10
    assert storage.stat("a/c.bin") is None
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    with pytest.raises(MissingObject, match=r"a/b\.bin"):
        storage.read("a/b.bin")


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (7, 12, b"789"),
        (10, 12, b""),
        (10, None, b""),
        (25, 30, b""),
        (25, None, b""),
        (4, 4, b""),
        (6, 4, b""),
    ],
)
def test_a_range_beyond_the_end_holds_what_there_is(
    storage: Storage, start: int, end: int | None, found: bytes
) -> None:
    storage.write("x", b"0123456789")
    assert storage.read("x", start, end) == found
    storage.write("empty", b"")
    assert storage.read("empty", start, end) == storage.read("empty") == b""
    with pytest.raises(MissingObject):
        storage.read("nothing", start, end)


def test_folder_markers_are_no_objects(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The AWS console makes an empty object `folder/` for a folder that is made there."""
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    weights = PUBLISHED / "teacher_flax_x"
    for name in ("teacher", "config.yaml"):
        client.upload_file(str(weights / name), "bucket", f"marked/{name}")
    for marker in ("marked/", "marked/later/"):
        client.put_object(Bucket="bucket", Key=marker, Body=b"")
    listed = client.list_objects_v2(Bucket="bucket", Prefix="marked/")["Contents"]
    assert "marked/later/" in [item["Key"] for item in listed]
    storage = open_storage("s3://bucket/marked", s3_endpoint)
    assert [stat.key for stat in storage.list("")] == ["config.yaml", "teacher"]
    found = teacher_info("s3://bucket/marked", s3_endpoint)
    assert found.identity == teacher_info(str(weights)).identity


def test_lists_a_prefix_in_key_order(storage: Storage) -> None:
    for key in ("d/shard-1", "d/shard-0", "d/manifest", "e/shard-2"):
        storage.write(key, b"x")
    assert [s.key for s in storage.list("d/shard-")] == ["d/shard-0", "d/shard-1"]
    assert list(storage.list("nothing/")) == []


def test_conditions_hold(storage: Storage) -> None:
    storage.write("m", b"one", if_absent=True)
    with pytest.raises(PreconditionFailed):
        storage.write("m", b"two", if_absent=True)
    first = storage.stat("m")
    assert first is not None
    storage.write("m", b"three", if_match=first.etag)
    with pytest.raises(PreconditionFailed):
        storage.write("m", b"four", if_match=first.etag)
    assert storage.read("m") == b"three"


def test_a_condition_is_compared_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    storage = open_storage(str(tmp_path))
    storage.write("rows.json", b"one")
    before = storage.stat("rows.json")
    assert before is not None
    storage.write("rows.json", b"two", if_match=before.etag)
    with pytest.raises(PreconditionFailed):
        storage.write("rows.json", b"three", if_match=before.etag)
    assert storage.read("rows.json") == b"two"


def test_of_many_writers_at_once_one_wins(storage: Storage) -> None:
    def attempt(i: int) -> bool:
        try:
            storage.write("once", b"%d" % i, if_absent=True)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(attempt, range(8)))
    assert sum(won) == 1
    assert storage.read("once") == b"%d" % won.index(True)


def test_folders_appear_whole_and_replace_older_ones(storage: Storage) -> None:
    storage.write_folder("s/step-1/", {"model": b"1", "meta.json": b"{}"})
    storage.write_folder("s/step-1/", {"model": b"2", "meta.json": b"{}"})
    assert storage.read("s/step-1/model") == b"2"
    assert [s.key for s in storage.list("s/")] == ["s/step-1/meta.json", "s/step-1/model"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    (tmp_path / "empty").mkdir()
    storage.write_folder("empty/", {"meta.json": b"{}"})
    storage.write("teachers/precious/meta.json", b"{}")
    storage.write("file", b"x")
    for there in ("teachers/", "file/"):
        with pytest.raises(PreconditionFailed, match="holds other files, which would be lost"):
            storage.write_folder(there, {"model": b"2", "meta.json": b"{}"})
    assert [s.key for s in storage.list("")] == ["empty/meta.json", "file", "teachers/precious/meta.json"]


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path))
    storage.write_folder("model/", {"weights": b"1", "meta.json": b"{}"})
    rename = os.rename

    def fails(old: Path, new: Path) -> None:
        if old.name == "new":
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        storage.write_folder("model/", {"weights": b"2", "meta.json": b"{}"})
    assert storage.read("model/weights") == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_bucket_alone_is_no_file() -> None:
    for address in ("s3://bucket", "s3://bucket/"):
        with pytest.raises(UserError, match="names a bucket and no file in it"):
            write_file(address, b"")
    assert absolute_address("~/x") == str(Path.home() / "x")  # as FolderStorage takes it


def test_a_folder_shows_no_half_written_file(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("d/shard-0", b"x")
    (tmp_path / "d" / ".shard-1.abc.tmp").write_bytes(b"half")
    assert [s.key for s in storage.list("d/")] == ["d/shard-0"]


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    """Root may read everything, so a name that no file system takes stands for every refusal."""
    storage, name = open_storage(str(tmp_path)), "n" * 300
    storage.write("folder/file", b"x")
    for refused in (
        lambda: storage.stat(name),
        lambda: list(storage.list(f"{name}/")),
        lambda: storage.delete(name),
        lambda: storage.delete("folder"),
    ):
        with pytest.raises(WorkError, match=r"cannot be (read|listed|deleted): \w+") as caught:
            refused()
        assert len(str(caught.value).splitlines()) == 1
    storage.delete("folder/file/below")  # there is none, as on S3
    failed = answer("verify", str(tmp_path / name))
    assert failed.returncode == 1 and "File name too long" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_a_folder_of_somebody_else_is_not_an_empty_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        storage.write("mine/shard-0", b"x")
        Path(folder).chmod(0o755)
        Path(folder, "mine").chmod(0o700)
        os.seteuid(65534)
        try:
            for refused in (lambda: storage.stat("mine/shard-0"), lambda: list(storage.list("mine/"))):
                with pytest.raises(WorkError, match="Permission denied"):
                    refused()
        finally:
            os.seteuid(0)


PASSWORDS = [
    "s3://AK:hunter2@bucket/x",
    "s3://AK:hun/ter2@bucket/x",
    "s3://AK:hun/ter2",
    "gs://AK:hunter2@bucket",
]


@pytest.mark.parametrize("address", PASSWORDS)
def test_a_password_in_an_address_is_refused_and_not_repeated(address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no user or password; credentials come from AWS_\*") as caught:
        open_storage(address)
    root = [f"storage.root={address}"]
    people = [str(caught.value)]
    for words in (["verify", address], ["plan", *root], ["train", *root], ["eval", "--student", address]):
        refused = answer(*words, cwd=tmp_path)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
        people += [refused.stderr, refused.stdout]
    assert not [text for text in people if "hun" in text or "ter2" in text]


@pytest.mark.parametrize("endpoint", ["http://bob:hunter2@127.0.0.1:1", "bob:hunter2@127.0.0.1:1"])
def test_a_password_in_an_endpoint_is_refused_and_not_repeated(endpoint: str, tmp_path: Path) -> None:
    as_option = ["verify", "s3://bucket/x", "--endpoint-url", endpoint]
    as_key = ["plan", "storage.root=s3://bucket/x", f"storage.endpoint_url={endpoint}"]
    for words in (as_option, as_key):
        refused = answer(*words, cwd=tmp_path)
        assert refused.returncode == 2 and "storage.endpoint_url: must not carry" in refused.stderr
        assert "hunter2" not in refused.stderr + refused.stdout
    (tmp_path / "profile").write_text(f"[default]\nendpoint_url = {endpoint}\n")
    for source in ({"AWS_ENDPOINT_URL": endpoint}, {"AWS_CONFIG_FILE": str(tmp_path / "profile")}):
        refused = answer("verify", "s3://bucket/x", cwd=tmp_path, **KEYS, **source)
        assert refused.returncode == 2 and "AWS_ENDPOINT_URL" in refused.stderr, refused.stderr
        assert "hunter2" not in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_word_that_holds_a_password_by_mistake_is_not_repeated(tmp_path: Path) -> None:
    for words in (["plan", "s3://AK:hun/ter2@bucket/x.yaml"], ["plan", "x=[s3://AK:hunter2@bucket"]):
        refused = answer(*words, cwd=tmp_path)
        assert refused.returncode == 2 and "s3://***@bucket" in refused.stderr, refused.stderr
        assert "hun" not in refused.stderr


@pytest.mark.parametrize("bucket", ["", "ab", "Bucket", "my_bucket", "-bucket", "a..b", "b" * 64])
def test_what_cannot_be_a_bucket_is_said_before_any_request(bucket: str) -> None:
    with pytest.raises(UserError, match="bucket"):
        open_storage(f"s3://{bucket}/x")


def test_errors_are_for_people(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(WorkError, match="no-such-bucket"):
        open_storage("s3://no-such-bucket/x", s3_endpoint).read("k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(WorkError, match=r"s3://bucket/x/k: put failed after 1 attempt.*403"):
        open_storage("s3://bucket/x", s3_endpoint).write("k", b"")
    for key in KEYS:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(WorkError, match="no AWS credentials"):
        open_storage("s3://bucket/x", s3_endpoint).read("k")
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        open_storage("gs://bucket/x")


def test_shards_on_s3_are_those_of_a_folder(s3_endpoint: str, tiny_data: Path, tmp_path: Path) -> None:
    root = [
        *TINY,
        "storage.root=s3://bucket/tiny",
        f"storage.endpoint_url={s3_endpoint}",
        f"run.dir={tmp_path}",
    ]
    made = dsno("gen-trajectories", *root, "--launcher", "local", "--actors", "1", **KEYS)
    assert made.returncode == 0, made.stderr
    folder = next((tiny_data / "trajectories").iterdir())
    url = f"s3://bucket/tiny/trajectories/{folder.name}"
    verified = answer("verify", url, "--endpoint-url", s3_endpoint, "--json", cwd=tmp_path, **KEYS)
    assert verified.returncode == 0 and json.loads(verified.stdout)["samples"] == 96
    there = json.loads(_read(f"{url}/manifest.json", s3_endpoint))
    here = json.loads((folder / "manifest.json").read_text())
    assert there["shards"] == here["shards"]
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in json.dumps(there) + made.stderr

    trained = dsno("train", *root, "--launcher", "local", **KEYS)
    assert trained.returncode == 0, trained.stderr
    grid = "s3://bucket/tiny/grid.png"
    address = ["s3://bucket/tiny/students/digits", "--endpoint-url", s3_endpoint]
    sampled = answer("sample", *address, "--num", "4", "--out", grid, cwd=tmp_path, **KEYS)
    assert sampled.returncode == 0, sampled.stderr
    assert _read(grid, s3_endpoint).startswith(b"\x89PNG")


def _read(url: str, endpoint: str) -> bytes:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def test_a_file_where_a_folder_should_be_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file/x.png", "file/below/x.png"):
        with pytest.raises(WorkError, match=r"file/.*x\.png: cannot be written: Not a directory"):
            write_file(str(tmp_path / path), b"")
    with pytest.raises(WorkError, match=r"file/step: cannot be written: Not a directory"):
        open_storage(str(tmp_path / "file")).write_folder("step/", {"a": b""})
