"""Reading trajectories: every sample once, from anywhere, checked, through a cache that nothing breaks."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import a_spec

from dsno_cluster.config import Reader
from dsno_cluster.diffusion.noise import sample_noise
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.storage import FolderStorage, Stat
from dsno_cluster.trajectories.reader import ShardReader, cached_shard, epoch_order, read_batches
from dsno_cluster.trajectories.shards import Manifest, Shard, make_manifest, write_shard

SHAPE, TIMES = (1, 4, 4), (0.5, 0.25, 0.0)


class Remote:
    """A folder that is read as S3 is: through `read` alone. It counts what is read of each key."""

    def __init__(self, root: Path, counts: str | None = None) -> None:
        self.inner, self.url = FolderStorage(root), f"remote:{root}"
        self.reads: list[tuple[str, int]] = []
        self.counts = counts

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = self.inner.read(key, start, end)
        self.reads.append((key, len(data)))
        if self.counts is not None:  # shared by processes
            with open(self.counts, "a") as file:
                file.write(key + "\n")
        return data

    def stat(self, key: str) -> Stat | None:
        return self.inner.stat(key)


def make_data(
    root: Path, shards: int = 5, per_shard: int = 8, labels: bool = True, dtype: Any = torch.float16
) -> Manifest:
    """Sample i at time m is (i + m / 10) everywhere."""
    storage, lines = FolderStorage(root), []
    for index in range(shards):
        samples = torch.arange(index * per_shard, (index + 1) * per_shard)
        values = samples[None, :] + torch.arange(len(TIMES))[:, None] / 10
        states = values[:, :, None, None, None].expand(-1, -1, *SHAPE).to(dtype)
        tensors = {"states": states} | ({"labels": samples % 7} if labels else {})
        lines.append(write_shard(storage, "d/", index, index * per_shard, tensors))
    spec = a_spec(SHAPE, TIMES, per_shard=per_shard, classes=7 if labels else 0)
    return make_manifest(spec, lines, NOWHERE)


def batches(manifest: Manifest, storage: Any, **options: Any) -> Iterator[Any]:
    given = {"seed": 1, "first_sample": 0, "batch_size": 8, "rank": 0, "world_size": 1} | options
    shards = ShardReader(storage, "d/", manifest, given.pop("settings", Reader()))
    return read_batches(shards, **given)


def read_order(manifest: Manifest, storage: Any, count: int, world: int, **options: Any) -> list[int]:
    """The indices of `count` global batches, put together from all ranks."""
    ranks = [batches(manifest, storage, rank=rank, world_size=world, **options) for rank in range(world)]
    order: list[int] = []
    for _ in range(count):
        parts = [next(rank) for rank in ranks]
        for micro in zip(*parts, strict=True):
            order += [int(i) for part in micro for i in part.indices]
    return order


@pytest.mark.parametrize("shuffle", ["window", "none"])
@pytest.mark.parametrize(
    ("batch_size", "world", "accumulation"), [(8, 1, 1), (8, 4, 2), (12, 2, 3), (16, 8, 1)]
)
def test_every_sample_once_per_epoch(
    tmp_path: Path, shuffle: str, batch_size: int, world: int, accumulation: int
) -> None:
    manifest, settings = make_data(tmp_path), Reader(shuffle=shuffle, window_shards=2)
    options = {"batch_size": batch_size, "accumulation": accumulation, "settings": settings}
    count = 3 * 40 // batch_size  # three epochs; batches straddle them
    order = read_order(manifest, FolderStorage(tmp_path), count, world, **options)
    alone = read_order(manifest, FolderStorage(tmp_path), count, 1, batch_size=batch_size, settings=settings)
    assert order == alone
    for epoch in range(len(order) // 40):
        assert sorted(order[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
    assert (order[:40] == list(range(40))) == (shuffle == "none")


def test_a_run_of_four_ranks_goes_on_with_two_and_another_batch_size(tmp_path: Path) -> None:
    manifest, storage = make_data(tmp_path), FolderStorage(tmp_path)
    whole = read_order(manifest, storage, 10, 1, batch_size=8)
    before = read_order(manifest, storage, 3, 4, batch_size=8)
    after = read_order(manifest, storage, 14, 2, batch_size=4, first_sample=24)
    assert before + after == whole
    assert sorted((before + after)[:40]) == list(range(40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("labels", [True, False])
def test_samples_are_put_together_right(tmp_path: Path, dtype: Any, labels: bool) -> None:
    manifest = make_data(tmp_path, labels=labels, dtype=dtype)
    for storage in (FolderStorage(tmp_path), Remote(tmp_path)):
        for batch in itertools.islice(batches(manifest, storage), 6):
            (part,) = batch
            expected = torch.from_numpy(part.indices)[:, None] + torch.arange(3) / 10
            assert torch.equal(part.states[:, :, 0, 0, 0], expected.to(dtype).float())
            assert part.states.dtype == torch.float32 and part.states.shape == (8, 3, *SHAPE)
            assert torch.equal(part.noise, sample_noise(4, map(int, part.indices), SHAPE))
            if labels:
                assert torch.equal(part.labels, torch.from_numpy(part.indices) % 7)
            else:
                assert part.labels is None


@pytest.mark.parametrize("where", ["folder", "remote", "cache"])
def test_a_corrupt_shard_is_fetched_once_more_and_named(tmp_path: Path, where: str) -> None:
    manifest = make_data(tmp_path / "data")
    path = tmp_path / "data" / "d" / manifest.shards[3].key
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    remote = Remote(tmp_path / "data")
    storage: Any = FolderStorage(tmp_path / "data") if where == "folder" else remote
    settings = Reader(cache_dir=str(tmp_path / "cache") if where == "cache" else None)
    with pytest.raises(WorkError, match=r"shard-000003.*sha256"):
        read_order(manifest, storage, 5, 1, settings=settings)
    if where != "folder":
        fetched = Counter(key for key, _ in remote.reads)["d/shard-000003.safetensors"]
        assert fetched >= 2 and fetched % 2 == 0  # twice at each batch that was read ahead


def test_an_error_of_the_background_reaches_the_reader(tmp_path: Path) -> None:
    manifest = make_data(tmp_path)
    reading = batches(manifest, FolderStorage(tmp_path), settings=Reader(shuffle="none"))
    assert len(next(reading)[0].indices) == 8
    (tmp_path / "d" / manifest.shards[4].key).unlink()
    with pytest.raises(WorkError, match="shard-000004"):
        for _ in range(5):
            next(reading)


def test_the_cache_reads_each_shard_once_and_mends_itself(tmp_path: Path) -> None:
    manifest, settings = make_data(tmp_path / "data"), Reader(cache_dir=str(tmp_path / "cache"))
    remote = Remote(tmp_path / "data")
    order = read_order(manifest, remote, 15, 1, settings=settings)
    assert len(remote.reads) == 5 and sorted(order[:40]) == list(range(40))
    again = Remote(tmp_path / "data")
    assert read_order(manifest, again, 15, 1, settings=settings) == order and not again.reads
    bad = tmp_path / "cache" / f"{manifest.shards[2].sha256}.safetensors"
    cut = tmp_path / "cache" / f"{manifest.shards[1].sha256}.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    cut.write_bytes(b"")
    assert read_order(manifest, again, 5, 1, settings=settings) == order[:40]
    assert sorted(key for key, _ in again.reads) == [f"d/{manifest.shards[i].key}" for i in (1, 2)]


def test_the_cache_keeps_its_limit_and_what_is_in_use(tmp_path: Path) -> None:
    manifest, remote = make_data(tmp_path / "data"), Remote(tmp_path / "data")
    size = manifest.shards[0].size
    settings = Reader(cache_dir=str(tmp_path / "cache"), cache_gb=2.5 * size / 1e9)
    mapped = cached_shard(settings, remote, "d/", manifest.shards[0])  # type: ignore[arg-type]
    for shard in manifest.shards[1:]:
        cached_shard(settings, remote, "d/", shard)  # type: ignore[arg-type]
        assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.safetensors")) <= 2.5 * size
    left = {p.stem for p in (tmp_path / "cache").glob("*.safetensors")}
    assert left == {shard.sha256 for shard in manifest.shards[3:]}
    assert bytes(mapped) == (tmp_path / "data" / "d" / manifest.shards[0].key).read_bytes()


def test_the_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, remote = make_data(tmp_path / "data"), Remote(tmp_path / "data")
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    cached_shard(Reader(cache_dir="$NODE_DISK/cache"), remote, "d/", manifest.shards[0])  # type: ignore[arg-type]
    cache = tmp_path / "cache"
    assert cache.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UserError, match="names a variable that is not set"):
        cached_shard(Reader(cache_dir="$NO_SUCH/cache"), remote, "d/", manifest.shards[0])  # type: ignore[arg-type]
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (lock,) = cache.glob(f".{manifest.shards[0].sha256[:2]}.lock")
    lock.unlink()
    lock.symlink_to(mine)  # as somebody might where all may write
    with pytest.raises(WorkError, match=r"reader\.cache_dir"):
        cached_shard(Reader(cache_dir=str(cache)), remote, "d/", manifest.shards[0])  # type: ignore[arg-type]
    assert mine.read_text() == "precious"
    if os.geteuid() == 0:
        os.chown(cache, 12345, 12345)
        with pytest.raises(WorkError, match="belongs to another user"):
            cached_shard(Reader(cache_dir=str(cache)), remote, "d/", manifest.shards[1])  # type: ignore[arg-type]


def _read_all(root: Path, cache: Path, counts: str, manifest: Manifest, results: Any) -> None:
    reader = ShardReader(Remote(root, counts), "d/", manifest, Reader(cache_dir=str(cache)))  # type: ignore[arg-type]
    states, _ = reader.samples(np.arange(manifest.num_samples))
    results.put(states[:, 0, 0, 0, 0].tolist())


def test_processes_share_a_cache_and_one_that_is_killed_leaves_it_whole(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "data", shards=20)
    context = multiprocessing.get_context("spawn")
    results, counts = context.Queue(), str(tmp_path / "counts")
    arguments = (tmp_path / "data", tmp_path / "cache", counts, manifest, results)
    victim = context.Process(target=_read_all, args=arguments)
    victim.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    processes = [context.Process(target=_read_all, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    expected = torch.arange(manifest.num_samples).half().tolist()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(results.get(timeout=10) == expected for _ in processes)
    fetched = Counter(Path(counts).read_text().split())
    assert set(fetched) == {f"d/{shard.key}" for shard in manifest.shards}
    assert sum(fetched.values()) <= len(manifest.shards) + 1  # one may have been under way when it was killed


def test_the_order_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    shards = [Shard(key=f"{i}", start=i * 4, stop=i * 4 + 4, size=1, sha256="") for i in range(6)]
    manifest = make_manifest(a_spec(per_shard=4), shards, NOWHERE)
    orders = [tuple(epoch_order(manifest, seed, epoch, 2)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(set(orders)) == 3
    first_window = {i // 4 for i in orders[0][:8]}
    assert len(first_window) == 2  # samples are shuffled within a window of two shards
