"""Samples/s of our reader beside LitData and MosaicML Streaming, on the same tensors, from the same place.

20 000 samples of (5, 3, 32, 32) float16 with a label, batches of 64, one process, shuffled, from a local folder
(warm) and, with `--s3 ENDPOINT`, from that S3 server (bucket `bench`; credentials from AWS_*). Every reader gives
float16 torch batches; ours is also timed with what training gets besides: noise made again, float32. Rounds
are run in turn; medians. The peers want older libraries than diffusers does, so they come with `pip install '.[bench]'` in
an environment of their own: `make bench` makes it, `.venv-bench`. LitData's client (0.2.76) takes https endpoints alone;
against a server on plain http it says so and drops out.

    python benchmarks/reader.py [--rounds 5] [--s3 http://127.0.0.1:8333]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from data_sets import a_spec

from dsno_cluster import console
from dsno_cluster.config import Reader
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.trajectories.reader import ShardReader, epoch_order, read_batches
from dsno_cluster.trajectories.shards import Manifest, make_manifest, write_shard

SAMPLES, PER_SHARD, BATCH = 20_000, 1000, 64
SHAPE = (5, 3, 32, 32)
SPEC = a_spec(SHAPE[1:], (0.8, 0.6, 0.4, 0.2, 0.0), seed=0, per_shard=PER_SHARD, classes=10)
Read = Callable[[int], int]  # (round) -> samples read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--s3", metavar="ENDPOINT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = np.random.default_rng(0).standard_normal((SAMPLES, *SHAPE), np.float32).astype(np.float16)
        manifest = write_ours(open_storage(str(folder / "ours")), samples)
        local: dict[str, Read] = ours(open_storage(str(folder / "ours")), manifest)
        for peer in (litdata, streaming):
            with peer_or_word(peer.__name__):
                local[peer.__name__] = peer(samples, folder / peer.__name__)
        show("from a local folder, warm", local, options.rounds)
        if options.s3:
            os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"] = options.s3
            storage = open_storage("s3://bench/ours", options.s3)
            write_ours(storage, samples)
            remote: dict[str, Read] = {"ours": ours(storage, manifest)["ours"]}
            for peer, remote_reader in ((streaming, streaming_s3), (litdata, litdata_s3)):
                with peer_or_word(peer.__name__):
                    remote[peer.__name__] = remote_reader(folder / peer.__name__, folder, options.s3)
            show("from S3, nothing cached", remote, options.rounds)


@contextlib.contextmanager
def peer_or_word(name: str) -> Any:
    try:
        yield
    except ModuleNotFoundError as error:
        print(
            f"{name}: not measured: there is no {error.name} here; `make bench` makes an environment of its own for the peers, "
            ".venv-bench: run .venv-bench/bin/python benchmarks/reader.py"
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{name}: not measured: {type(error).__name__}: {error}")


def show(where: str, readers: dict[str, Read], rounds: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, read in list(readers.items()):
            began = time.perf_counter()
            try:
                count = read(number)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                print(f"{name}: cannot read {where}: {type(error).__name__}: {error}")
                del readers[name], rates[name]
                continue
            assert count >= SAMPLES - BATCH, (name, count)
            if number:  # the first round warms
                rates[name].append(count / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        [name, f"{medians[name]:,.0f}", f"{min(rates[name]):,.0f}..{max(rates[name]):,.0f}"] for name in rates
    ]
    console.table(f"samples/s {where}", ["reader", "median", "rounds"], rows)
    peers = {name: value for name, value in medians.items() if not name.startswith("ours")}
    if peers:
        best = max(peers, key=lambda name: peers[name])
        print(f"ours / {best}, {where}: {medians['ours'] / peers[best]:.2f}")


def write_ours(storage: Storage, samples: np.ndarray) -> Manifest:
    lines = []
    for index in range(SAMPLES // PER_SHARD):
        part = samples[index * PER_SHARD : (index + 1) * PER_SHARD]
        tensors = {"states": torch.from_numpy(part).transpose(0, 1), "labels": torch.arange(PER_SHARD) % 10}
        lines.append(write_shard(storage, "d/", index, index * PER_SHARD, tensors))
    return make_manifest(SPEC, lines, NOWHERE)


def ours(storage: Storage, manifest: Manifest) -> dict[str, Read]:
    """Our order, checks and resume; `training` adds noise and float32, read ahead as training does."""
    warm = ShardReader(storage, "d/", manifest, Reader(window_shards=16))

    def plain(number: int) -> int:
        # from S3 a new reader each time, so that everything is fetched again
        reader = warm if "://" not in storage.url else ShardReader(storage, "d/", manifest, Reader())
        order = epoch_order(manifest, 0, number)
        for first in range(0, SAMPLES, BATCH):
            reader.samples(order[first : first + BATCH])
        return SAMPLES

    def training(number: int) -> int:
        batches = read_batches(
            ShardReader(storage, "d/", manifest),
            seed=0,
            first_sample=number * SAMPLES,
            batch_size=BATCH,
            rank=0,
            world_size=1,
        )
        return sum(len(next(batches)[0].indices) for _ in range(SAMPLES // BATCH))

    return {"ours": plain, "ours, as training reads": training}


def streaming(samples: np.ndarray, folder: Path) -> Read:
    from streaming import MDSWriter, StreamingDataset

    columns = {"states": f"ndarray:float16:{','.join(map(str, SHAPE))}", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=64 << 20) as writer:
        for index, sample in enumerate(samples):
            writer.write({"states": sample, "label": index % 10})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return _epochs_of_streaming(dataset)


def _epochs_of_streaming(dataset: Any) -> Read:
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=0)
    return lambda number: sum(len(batch["states"]) for batch in loader)


def streaming_s3(local: Path, folder: Path, endpoint: str) -> Read:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    _upload(local, "streaming", endpoint)

    def read(number: int) -> int:
        clean_stale_shared_memory()
        target = folder / f"streaming-{number}"
        dataset = StreamingDataset(
            remote="s3://bench/streaming", local=str(target), shuffle=True, batch_size=BATCH
        )
        count = _epochs_of_streaming(dataset)(number)
        shutil.rmtree(target)
        return count

    return read


def litdata(samples: np.ndarray, folder: Path) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=64 << 20)
    for index, sample in enumerate(samples):
        writer[index] = {"states": torch.from_numpy(sample), "label": index % 10}
    writer.done()
    writer.merge()
    return _epochs_of_litdata(StreamingDataset(str(folder), shuffle=True))


def _epochs_of_litdata(dataset: Any) -> Read:
    from litdata import StreamingDataLoader

    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    return lambda number: sum(len(batch["states"]) for batch in loader)


def litdata_s3(local: Path, folder: Path, endpoint: str) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming import async_prefetch, downloader

    if endpoint.startswith("http:"):  # its faster client, obstore, wants TLS; it has boto3 besides
        async_prefetch.obstore_usable = downloader.obstore_usable = lambda: False
    _upload(local, "litdata", endpoint)
    storage_options = {"endpoint_url": endpoint}

    def read(number: int) -> int:
        target = folder / f"litdata-{number}"
        target.mkdir()
        dataset = StreamingDataset(
            "s3://bench/litdata", cache_dir=str(target), shuffle=True, storage_options=storage_options
        )
        count = _epochs_of_litdata(dataset)(number)
        shutil.rmtree(target)
        return count

    return read


def _upload(local: Path, name: str, endpoint: str) -> None:
    storage = open_storage(f"s3://bench/{name}", endpoint)
    for path in local.rglob("*"):
        if path.is_file():
            storage.write(path.relative_to(local).as_posix(), path.read_bytes())


if __name__ == "__main__":
    main()
