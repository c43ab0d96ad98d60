"""Online mode: Ray actors make trajectories while training reads them, with a bounded number of shards on disk.

Samples, and so weights, are those of an offline run that reads in production order (`reader.shuffle: none`).
Rank 0 starts a process that drives the actors; they write shards below `<run.dir>/students/<name>/staging/`,
which every rank reads, and shards that all ranks have read are deleted. The process ends when its standard
input does, and so also when rank 0 is killed.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsno_cluster import console, liveness
from dsno_cluster.cluster.crew import Crew
from dsno_cluster.cluster.ray_pool import CONCURRENCY, import_ray, open_ray, run_pool
from dsno_cluster.config import Config, dump_config, validate
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.storage import FolderStorage
from dsno_cluster.torch_internals import check_rank_0_answers
from dsno_cluster.trajectories.generate import kernels_folder, say_compiling
from dsno_cluster.trajectories.plan import Plan, make_plan
from dsno_cluster.trajectories.reader import Arrays, ShardReader, parse_shard
from dsno_cluster.trajectories.shards import (
    Manifest,
    Shard,
    make_manifest,
    shard_key,
    shard_tensors,
    vouches_for_itself,
)
from dsno_cluster.trajectories.solve_actor import SolveActor
from dsno_cluster.yaml_text import parse_yaml

_CONFIG = "the config of online training"
FAILED = "failed"  # a file of the staging folder with the reason why no more shards will come
POLL_SECONDS = 0.05
IN_FLIGHT = 2  # shards that an actor works on: one is solved while another is written


def staging_root(config: Config) -> Path:
    return config.run_dir / config.student_prefix / "staging"


def planned_manifest(plan: Plan) -> Manifest:
    """The manifest of a plan whose shards are still to be made, without their sizes and sha256."""
    size = plan.spec.samples_per_shard
    shards = [
        Shard(key=shard_key(index), start=index * size, stop=(index + 1) * size, size=0, sha256="")
        for index in range(plan.size.num_shards)
    ]
    return make_manifest(plan.spec, shards, NOWHERE)


class StagedShards(ShardReader):
    """Reads shards from the staging folder, waiting for those that do not exist yet."""

    def __init__(self, config: Config, folder: str, manifest: Manifest, producer: Producer | None) -> None:
        super().__init__(FolderStorage(staging_root(config)), folder, manifest, config.reader)
        self.expected, self.producer = shard_tensors(self.spec), producer
        self.stopped = threading.Event()

    def _open(self, number: int) -> Arrays:
        shard = self.manifest.shards[number]
        said = asked = time.monotonic()
        while self.storage.stat(self.folder + shard.key) is None:
            liveness.moved()
            if self.storage.stat(FAILED) is not None:
                raise WorkError(f"no more trajectories come: {self.storage.read(FAILED).decode()}")
            if self.producer is not None and self.producer.process.poll() is not None:
                raise WorkError(
                    "no more trajectories come: the process that makes them ended without a reason"
                )
            if self.stopped.wait(POLL_SECONDS):
                raise WorkError("reading was stopped")
            if time.monotonic() - asked > 5.0:
                asked = time.monotonic()
                if self.producer is None:
                    check_rank_0_answers()
            if time.monotonic() - said > 60.0:
                said = time.monotonic()
                console.say(f"waiting for {shard.key} to be made")
        data = self.storage.read(self.folder + shard.key)
        if not vouches_for_itself(data, shard.start, self.expected):
            raise WorkError(
                f"{self.storage.url}/{self.folder}{shard.key}: is damaged; delete it and run again"
            )
        return parse_shard(np.frombuffer(data, np.uint8))


class Producer:
    """The process that makes shards ahead of training; rank 0 starts and closes it."""

    def __init__(self, config: Config, start: int) -> None:
        FolderStorage(staging_root(config)).delete(FAILED)
        work = {"config": dump_config(config), "start": start}
        # a new session: Ctrl-C reaches only training, which saves first
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        self._tell(work)

    def trained(self, step: int) -> None:
        """Note that all ranks are done with the batches before `step`."""
        self._tell(step)

    def _tell(self, message: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: the reader says why
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """End the process, with its actors and its Ray."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make_ahead(config: Config, start: int, trained: list[int]) -> None:
    """Make the shards that training from step `start` reads, at most `online_staged_shards` ahead.

    `trained[0]` is the step that training has reached, set by another thread.
    """
    plan, settings = make_plan(config), config.training
    per_shard, num_shards = config.trajectories.samples_per_shard, plan.size.num_shards
    staged = FolderStorage(staging_root(config))
    ends = settings.steps + config.reader.prefetch_batches + 1  # some are read ahead and never trained on
    first, last = start * settings.batch_size // per_shard, -(-ends * settings.batch_size // per_shard)
    # positions along the epochs: the shard at position p has number p % num_shards, and not all are on disk
    # at once
    keeps_all = num_shards <= settings.online_staged_shards
    dropped = first
    positions = range(min(num_shards, last)) if keeps_all else range(first, last)

    def key(position: int) -> str:
        return plan.folder + shard_key(position % num_shards)

    def drop_trained() -> int:
        """Delete the shards that no later step reads; returns the first position that a later step reads."""
        nonlocal dropped
        needed = trained[0] * settings.batch_size // per_shard
        for position in range(dropped, needed if not keeps_all else dropped):
            staged.delete(key(position))
        dropped = needed
        return needed

    window = settings.online_staged_shards if keeps_all else max(1, settings.online_staged_shards // 2)
    _drop_strangers(staged, plan, {key(p): p % num_shards for p in positions[: 2 * window]}, per_shard)
    # keeps the endpoint, for a teacher on S3
    there = config.storage.model_copy(update={"root": str(staging_root(config))})
    actors_config = config.model_copy(update={"storage": there})
    say_compiling(config, plan.spec)
    with open_ray(Crew(settings.online_actors), config.trajectories.threads) as cluster:
        remote = import_ray().remote(max_concurrency=CONCURRENCY, **cluster.actor_options())(SolveActor)
        # like SIGUSR2, but only now, because Ray sets a handler when it starts
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        idle: list[Any] = []  # actors between one window and the next
        for begin in range(positions.start, positions.stop, window):
            part = positions[begin - positions.start : begin - positions.start + window]
            while not keeps_all and part.stop > drop_trained() + settings.online_staged_shards:
                time.sleep(POLL_SECONDS)
            for _ in run_pool(
                lambda: (
                    idle.pop()
                    if idle
                    else remote.remote(
                        plan.spec, actors_config.teacher, there, plan.folder, kernels_folder(config)
                    )
                ),
                lambda actor, position: actor.make_shard.remote(position % num_shards),
                [p for p in part if staged.stat(key(p)) is None],
                cluster.capacity,
                in_flight=IN_FLIGHT,
                in_order=True,
                release=idle.append,
            ):
                drop_trained()


def _drop_strangers(staged: FolderStorage, plan: Plan, wanted: dict[str, int], per_shard: int) -> None:
    """Delete what an earlier run left, except complete shards of the `wanted` keys (to indices)."""
    expected = shard_tensors(plan.spec)
    for key in [stat.key for stat in staged.list(plan.folder)]:
        index = wanted.get(key)
        if index is None or not vouches_for_itself(staged.read(key), index * per_shard, expected):
            staged.delete(key)


def main() -> int:
    """The process of `Producer`: reads its work, and then each step trained, from standard input."""
    # Slurm sends it to all processes; training ends this one when it has saved
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    work = json.loads(sys.stdin.readline())
    config = validate(Config, parse_yaml(work["config"], _CONFIG), _CONFIG)
    trained = [work["start"]]

    def listen() -> None:
        for line in sys.stdin:
            trained[0] = json.loads(line)
        _thread.interrupt_main()

    threading.Thread(target=listen, daemon=True).start()
    try:
        make_ahead(config, work["start"], trained)
        while True:  # until training ends
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0
    except Exception as error:  # whatever it is, the ranks must not wait for more shards
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # `listen` must not interrupt any more
        FolderStorage(staging_root(config)).write(FAILED, str(error).encode())
        if not isinstance(error, UserError | WorkError):
            raise
        return 1


if __name__ == "__main__":
    sys.exit(main())
