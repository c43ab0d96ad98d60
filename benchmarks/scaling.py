"""What one driver and one Ray head can carry, with teachers that cost nothing. The figures of docs/scaling.md.

1. `shards`: many tiny shards of a closed-form teacher through the real path, to a real S3 server on loopback (SeaweedFS):
   the driver's and Ray's CPU seconds a shard, requests a shard as the server counts them, the manifest's size, and what the
   same command then takes to see that all is done.
2. `actors`: many actors that do nothing for a while and answer as `make_shard` does: what it costs the driver and Ray's head
   to keep them busy.
3. `pool`: the driver's loop with as many workers as a thousand nodes have; eight asynchronous actors stand for all of them.

    python benchmarks/scaling.py shards --shards 100000
    python benchmarks/scaling.py actors --actors 64
    python benchmarks/scaling.py pool --actors 8000
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import s3_server

from dsno_cluster.cluster.crew import Crew
from dsno_cluster.cluster.ray_pool import import_ray, local_ray, run_pool
from dsno_cluster.config import load_config
from dsno_cluster.storage import open_storage
from dsno_cluster.trajectories.generate import generate
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.shards import Shard

HEAD = ("gcs_server", "raylet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("shards", "actors", "pool"), help="default: all of them")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument(
        "--actors", type=int, default=None, help="default: 2 for shards, 64 for actors, 8000 for pool"
    )
    parser.add_argument("--tasks", type=int, help="default: 10000 for actors, 32000 for pool")
    parser.add_argument("--seconds", type=float, help="that a task takes; default: 1 for actors, 20 for pool")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # there is no work for GPUs, and more actors than any machine has of them
    )
    if options.what in ("shards", None):
        tiny_shards(options.shards, options.actors or 2)
    if options.what in ("actors", None):
        busy_actors(options.actors or 64, options.tasks or 10_000, options.seconds or 1.0)
    if options.what in ("pool", None):
        many_workers(options.actors or 8000, options.tasks or 32_000, options.seconds or 20.0)


def tiny_shards(count: int, actors: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(s3_server.KEYS)
        ports, metrics = s3_server.Ports.free(), s3_server.Ports.free().s3
        command = [*s3_server.command(Path(folder), "127.0.0.1", ports), f"-metricsPort={metrics}"]
        with (Path(folder) / "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{ports.s3}"
            while not s3_server.answers(url):
                time.sleep(0.5)
            config = load_config(
                "configs/digits.yaml",
                [
                    "storage.root=s3://bucket/scaling", f"storage.endpoint_url={url}", f"run.dir={folder}",
                    "teacher.path=closed-form:gaussian", "network.num_classes=0",
                    "teacher.options={mean: 0.0, std: 1.0, shape: [1, 8, 8]}",
                    "network.null_class=false", "student.warm_start=false", "evaluation.metrics=[fid]",
                    f"trajectories.num_samples={count}", "trajectories.samples_per_shard=1", "trajectories.batch_size=1",
                    "trajectories.solver=ddim", "trajectories.steps=1", "trajectories.times=[0.0]", "student.modes=1",
                ],
            )  # fmt: skip
            before = requests(metrics)
            with head_seconds() as head:
                seconds, cpu = timed(lambda: generate(config, plan=make_plan(config), crew=Crew(actors)))
            made = {kind: n - before.get(kind, 0) for kind, n in requests(metrics).items()}
            manifest = open_storage(config.storage.root, url).stat(make_plan(config).folder + "manifest.json")
            again, _ = timed(lambda: generate(config, plan=make_plan(config), crew=Crew(actors)))
        finally:
            server.kill()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} shards in {seconds:.0f} s, {count / seconds:.0f} shards/s, {actors} actors")
    print(f"driver: {1e3 * cpu / count:.2f} ms of CPU a shard, peak {peak:.0f} MB")
    print(f"Ray's head: {1e3 * head[0] / count:.2f} ms of CPU a shard")
    print(
        "S3 requests a shard: "
        + ", ".join(f"{kind} {n / count:.3f}" for kind, n in sorted(made.items()) if n)
    )
    print(
        f"manifest: {manifest.size / count:.0f} bytes a shard, {manifest.size / 1e6:.1f} MB"
        if manifest
        else "no manifest"
    )
    print(f"the same command once all is there: {again:.1f} s")


def busy_actors(actors: int, tasks: int, pause: float) -> None:
    with local_ray(Crew(actors), 1) as cluster:
        ray = import_ray()

        class Idle:
            def make_shard(self, index: int) -> tuple[Shard, str]:
                time.sleep(pause)
                key = f"shard-{index:06d}.safetensors"
                return Shard(key=key, start=index, stop=index + 1, size=1000, sha256="0" * 64), "0" * 32

        remote = ray.remote(max_concurrency=2, **cluster.actor_options())(Idle)
        handles = [remote.remote() for _ in range(actors)]
        ray.get([handle.make_shard.remote(0) for handle in handles])
        spare = list(handles)
        with head_seconds() as head:
            pool = run_pool(
                spare.pop,
                lambda actor, index: actor.make_shard.remote(index),
                range(tasks),
                cluster.capacity,
                in_flight=2,
                release=lambda actor: None,
            )
            seconds, cpu = timed(lambda: sum(1 for _ in pool))
    ideal = tasks * pause / (2 * actors)  # two calls at a time
    print(
        f"{actors} actors, {tasks} tasks of {pause:g} s, two at a time: {seconds:.1f} s, {ideal / seconds:.1%} of ideal"
    )
    print(
        f"driver: {1e3 * cpu / tasks:.2f} ms of CPU a task; busy {cpu / seconds:.1%} at {tasks / seconds:.0f} tasks/s"
    )
    print(f"Ray's head: {1e3 * head[0] / tasks:.2f} ms of CPU a task")


def many_workers(count: int, tasks: int, pause: float) -> None:
    with local_ray(Crew(8), 1) as cluster:
        ray = import_ray()

        class StandIn:
            async def make_shard(self, index: int, seconds: float) -> int:
                await asyncio.sleep(seconds)
                return index

        remote = ray.remote(max_concurrency=2 * count, **cluster.actor_options())(StandIn)
        handles = [remote.remote() for _ in range(8)]
        ray.get([handle.make_shard.remote(0, 0.0) for handle in handles])
        again = itertools.cycle(handles)
        pool = run_pool(
            lambda: next(again),
            lambda actor, index: actor.make_shard.remote(index, pause),
            range(tasks),
            lambda: count,
            in_flight=2,
            greet=lambda actor: actor.make_shard.remote(0, 0.0),
            release=lambda actor: None,
        )
        seconds, cpu = timed(lambda: sum(1 for _ in pool))
    ideal = tasks * pause / (2 * count)
    print(
        f"{count} workers, {tasks} tasks of {pause:g} s, two at a time: {seconds:.1f} s, ideal {ideal:.1f} s"
    )
    print(f"driver: {1e3 * cpu / tasks:.2f} ms of CPU a task")


def timed(work: Any) -> tuple[float, float]:
    """Wall seconds and this process's CPU seconds of some work."""
    began, before = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - before


class head_seconds:
    """CPU seconds of Ray's GCS and raylet within the context, as the first item of a list."""

    def __enter__(self) -> list[float]:
        self.found: list[float] = [0.0]
        self.seen: dict[int, float] = {}
        self.began = time.time()
        self.stop = False
        import threading

        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self.found

    def _watch(self) -> None:
        first: dict[int, float] = {}
        while not self.stop:  # they may start and end within the context
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name() in HEAD:
                        spent = sum(process.cpu_times()[:2])
                        born_within = process.create_time() >= self.began
                        first.setdefault(process.pid, 0.0 if born_within else spent)
                        self.seen[process.pid] = spent - first[process.pid]
                except psutil.NoSuchProcess:
                    continue
            self.found[0] = sum(self.seen.values())
            time.sleep(0.5)

    def __exit__(self, *error: object) -> None:
        self.stop = True
        self.thread.join()


def requests(port: int) -> dict[str, float]:
    """Requests that the S3 server has counted, by kind."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("SeaweedFS_s3_request_total{"):
            labels, _, value = line.rpartition(" ")
            kind = labels.split('type="')[1].split('"')[0]
            found[kind] = found.get(kind, 0.0) + float(value)
    return found


if __name__ == "__main__":
    main()
