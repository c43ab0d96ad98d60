"""The pool of actors that measures sets of images; each is handed on as soon as it is whole, and then no more held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsno_cluster import console
from dsno_cluster.cluster.ray_pool import RayCluster, given_address, import_ray, open_ray, run_pool
from dsno_cluster.config import Config
from dsno_cluster.evaluation.actor import STUDENT, Block, EvaluationActor, Source
from dsno_cluster.evaluation.features import BATCH, Reading, WeightsFile
from dsno_cluster.evaluation.metrics import Collected, Reference
from dsno_cluster.evaluation.pictures import Pictured
from dsno_cluster.evaluation.reference import RealData, finished_reference
from dsno_cluster.provenance import Environment
from dsno_cluster.storage import absolute_address, open_storage
from dsno_cluster.trajectories.shards import Shard


@dataclass(frozen=True)
class ImagesOf:
    """`count` images of a source, and what is read of each, by metric."""

    source: Source
    count: int
    read: dict[str, Reading]

    def block_size(self, batch_size: int) -> int:
        """Images of a block. Those that are there already are extracted in the batches that torch-fidelity makes of them, so
        that features are the same to the last bit however they are split."""
        return -(-batch_size // BATCH) * BATCH if self.source.kind == "images" else batch_size


@dataclass(frozen=True)
class Measured:
    """What is not of one set: the reference, the student's trajectory error by time point, kept shards, its cost and on what,
    and what the pictures show of it."""

    reference: Reference | None
    trajectory_error: list[float]
    shards: list[Shard]
    cost: dict[str, float]
    environment: Environment | None
    pictured: Pictured | None


def measure(
    config: Config,
    weights: dict[str, WeightsFile],
    sets: Sequence[ImagesOf],
    real: RealData,
    finish: Callable[[ImagesOf, Collected, Reference | None], None],
    *,
    student: tuple[str, str] | None = None,
    keep: str | None = None,
    actors: int | None = None,
    ray_address: str | None = None,
    title: str = "evaluating",
    reached: int = 0,
) -> Measured:
    """Have actors measure the sets, and the reference's images where they are not known yet.

    `finish` gets each set with what was collected of it, once it is whole and the reference is there. With a `student`'s
    address and sha256 also its trajectory error, where the config asks for it, and its cost; `keep` is where its samples are
    stored.
    `title`, and how many samples former runs `reached`, are for the progress.
    """
    settings, storage = config.evaluation, open_storage(config.storage.root, config.storage.endpoint_url)
    reference = finished_reference(storage, real, None) if real.source is None else None
    by_source = {images.source: images for images in sets}
    if real.source is not None:
        assert real.images is not None
        by_source[real.source] = ImagesOf(real.source, real.images.count, real.read)
    blocks, collected = [], {}
    for images in by_source.values():
        size = images.block_size(settings.batch_size)
        blocks += _blocks("features", images.source, images.count, size)
        collected[images.source] = Collected(images.count, size)
    if student is not None and "trajectory_error" in settings.metrics:
        blocks += _blocks("trajectory", STUDENT, settings.trajectory_samples, settings.batch_size)
    console.say(_in_words(blocks, by_source, real.source))
    # the reference, without which no set is finished; then the dearest, so that no actor is left alone with a long one
    blocks.sort(key=lambda block: (block.source != real.source, -block.source.steps))
    left = {source: sum(b.source == source and b.work == "features" for b in blocks) for source in by_source}
    whole: list[Source] = []
    errors: dict[Block, tuple[np.ndarray, np.ndarray]] = {}
    shards: dict[int, Shard] = {}
    read = {images.source: images.read for images in by_source.values()}
    student_there = student and (absolute_address(student[0]), student[1])
    with open_ray(given_address(ray_address), actors, settings.threads) as cluster:
        # two calls at a time: while one block's features are extracted the next is drawn or read
        remote = import_ray().remote(max_concurrency=2, **cluster.actor_options())(EvaluationActor)

        def make_actor() -> Any:
            return remote.remote(config, weights, read, student_there, keep)

        idle: list[Any] = []
        for block, result in _run_blocks(make_actor, blocks, cluster, idle, title, reached):
            source = block.source
            if block.work == "trajectory":
                errors[block] = result
                continue
            found, shard = result
            collected[source].add(block.start, found)
            if shard is not None:
                shards[block.start] = shard
            left[source] -= 1
            if left[source]:
                continue
            if source == real.source:
                reference = finished_reference(storage, real, collected.pop(source))
            else:
                whole.append(source)
            if real.source is None or not left[real.source]:
                for one in whole:
                    finish(by_source[one], collected.pop(one), reference)
                whole.clear()
        cost, made_by, pictured = {}, None, None
        if student is not None:
            probe = idle[0]  # alone now, so that nothing disturbs the timing
            cost = import_ray().get(probe.measure_cost.remote())
            made_by, pictured = import_ray().get([probe.environment.remote(), probe.pictured.remote()])
    parts = [errors[block] for block in sorted(errors, key=lambda b: b.start)]
    error = np.sqrt(sum(p[0] for p in parts) / sum(p[1] for p in parts)).tolist() if parts else []
    return Measured(reference, error, [shards[start] for start in sorted(shards)], cost, made_by, pictured)


def _in_words(blocks: list[Block], sets: dict[Source, ImagesOf], reference: Source | None) -> str:
    """What the progress counts: images of each kind, and trajectories."""
    parts = []
    if STUDENT in sets:
        parts.append(f"{sets[STUDENT].count:,} samples of the student")
    if of_teacher := [images.count for source, images in sets.items() if source.kind == "teacher"]:
        parts.append(f"{sum(of_teacher):,} of the teacher in {len(of_teacher)} row(s)")
    for source, images in sets.items():
        if source.kind == "images":
            whose = "the reference" if source == reference else source.address
            parts.append(f"{images.count:,} images of {whose}")
    if trajectories := sum(b.stop - b.start for b in blocks if b.work == "trajectory"):
        parts.append(f"{trajectories:,} trajectories")
    return f"to measure: {', '.join(parts)}"


def _blocks(work: str, source: Source, count: int, size: int) -> list[Block]:
    return [Block(work, source, start, min(start + size, count)) for start in range(0, count, size)]


def _run_blocks(
    make_actor: Callable[[], Any],
    blocks: list[Block],
    cluster: RayCluster,
    idle: list[Any],
    title: str,
    reached: int,
) -> Iterator[tuple[Block, Any]]:
    """Pairs of a block and its result, as they come. One actor stays, in `idle`, for what comes after them."""

    def release(actor: Any) -> None:
        if idle:
            import_ray().kill(actor)
        else:
            idle.append(actor)

    total = sum(b.stop - b.start for b in blocks)
    with console.progress(title, total, "samples", reached=reached) as advance:
        pool = run_pool(
            make_actor,
            lambda actor, block: actor.run.remote(block),
            blocks,
            cluster.capacity,
            in_flight=2,
            release=release,
        )
        for block, result in pool:
            yield block, result
            advance(block.stop - block.start)
