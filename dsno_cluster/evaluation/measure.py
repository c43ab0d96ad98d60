"""The pool of actors that measures sets of images, yielding each set as soon as it is complete.

The figures depend only on the arguments and the storage: blocks are merged in a tree over their numbers, so
neither the number of actors, nor the loss of some, changes a figure.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsno_cluster import console
from dsno_cluster.cluster.crew import ANY_CREW, Crew
from dsno_cluster.cluster.ray_pool import (
    CONCURRENCY,
    RayCluster,
    import_ray,
    open_ray,
    run_pool,
)
from dsno_cluster.config import Config, Evaluation
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.evaluation.actor import EvaluationActor, StudentAtWork
from dsno_cluster.evaluation.metrics import Collected, Reference, best_draw, distance_of_copies, figures
from dsno_cluster.evaluation.pictures import Pictured
from dsno_cluster.evaluation.records import Cost, Figures
from dsno_cluster.evaluation.reference import RealData, finished_reference
from dsno_cluster.evaluation.sources import (
    HELD_OUT,
    STUDENT,
    Block,
    ImageSource,
    MeasuredBlock,
    TrajectoryError,
)
from dsno_cluster.features.extractors import BATCH, Readings, WeightsFile
from dsno_cluster.provenance import Environment
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.trajectories.generate import check_alike
from dsno_cluster.trajectories.shards import Shard

MOST_IN_BLOCK = 1024
FEWEST_BLOCKS = 16  # so that many actors have work
LARGEST_OF_SMALL = 3 * 64 * 64  # numbers in an image


@dataclass(frozen=True)
class ImagesOf:
    """`draws` times `count` images (C, H, W) of a source, and the layers that metrics read."""

    source: ImageSource
    count: int
    readings: Readings
    shape: Sequence[int]
    draws: int = 1

    def block_size(self, batch_size: int) -> int:
        """Number of images in a block: a multiple of `batch_size`, in which an actor draws them.

        Each block's moments are sent and merged, which takes longer than their images do on a GPU: of many small images
        1000 are a block. Existing images are extracted in torch-fidelity's batches, so that features are the same
        to the last bit however the images are split.
        """
        size = -(-batch_size // BATCH) * BATCH if self.source.kind == "images" else batch_size
        if math.prod(self.shape) > LARGEST_OF_SMALL:
            return size
        return size * max(1, min(MOST_IN_BLOCK // size, self.count // (FEWEST_BLOCKS * size)))


@dataclass(frozen=True)
class MeasuredSet:
    """A set that is complete, with its figures."""

    images: ImagesOf
    figures: Figures


@dataclass(frozen=True)
class MeasuredStudent:
    """The student besides its figures: error by time if asked for, kept shards, cost, pictures.

    Cost or pictures that failed for good are None, and the `warnings` say why.
    """

    trajectory_error: tuple[float, ...]
    shards: tuple[Shard, ...]
    cost: Cost | None
    pictured: Pictured | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """The reference of the figures, and the `environment` of the actors that measured them."""

    reference: Reference | None
    environment: Environment


Measured = MeasuredSet | MeasuredStudent | Surroundings


def measure(
    config: Config,
    weights: dict[str, WeightsFile],
    sets: Sequence[ImagesOf],
    real: RealData,
    *,
    student: StudentAtWork | None = None,
    crew: Crew = ANY_CREW,
    title: str = "evaluating",
    reached: int = 0,
) -> Generator[Measured]:
    """Measure the sets, and the reference's images if needed, with a pool of actors.

    Yields each set as soon as it and the reference are complete; then the student, if there is one, with its
    trajectory error if the config asks for it; and finally the surroundings. `title`, and the samples that
    earlier runs `reached`, are for the progress. Raises UserError for actors that differ in device or
    versions, and as `run_pool` does.
    """
    settings, storage = config.evaluation, open_storage(config.storage.root, config.storage.endpoint_url)
    if real.source is not None:
        assert real.images is not None
        sets = [*sets, ImagesOf(real.source, real.images.count, real.readings, real.images.shape)]
    blocks = [block for images in sets for block in _blocks_of(images, settings.batch_size)]
    if student is not None and "trajectory_error" in settings.metrics:
        blocks += _blocks("trajectory", STUDENT, range(settings.trajectory_samples), settings.batch_size)
    console.say(_in_words(blocks, sets, real.source))
    # first the reference, without which no set is finished, and the held-out images, by which copies are counted; then the
    # most expensive blocks, so that none runs last
    blocks.sort(
        key=lambda block: (
            block.source != real.source,
            block.source != HELD_OUT,
            -block.source.evaluations,
        )
    )
    collecting = _Collecting(settings, storage, real, sets)
    errors: dict[int, TrajectoryError] = {}
    with open_ray(crew, settings.threads) as cluster:
        readings = {images.source: images.readings for images in sets}
        pool = _Pool(cluster, (config, weights, readings, student))
        with console.progress(
            title, sum(b.stop - b.start for b in blocks), "samples", reached=reached
        ) as advance:
            for block, result in pool.run_all(blocks):
                if isinstance(result, TrajectoryError):
                    errors[block.start] = result
                else:
                    assert isinstance(result, MeasuredBlock)
                    yield from collecting.add(block, result)
                advance(block.stop - block.start)
        if student is not None:
            cost, no_cost = pool.run_alone(Block("cost", STUDENT, 0, settings.batch_size))
            pictured, no_pictures = pool.run_alone(Block("pictures", STUDENT, 0, 0))
            reasons = {
                "the cost could not be measured": no_cost,
                "the pictures could not be made": no_pictures,
            }
            warnings = tuple(f"{what}: {why}" for what, why in reasons.items() if why is not None)
            for warning in warnings:
                console.say(f"note: {warning}")
            yield MeasuredStudent(_relative(errors), collecting.kept_shards(), cost, pictured, warnings)
        yield Surroundings(collecting.reference, pool.environments[0])


def _relative(errors: dict[int, TrajectoryError]) -> tuple[float, ...]:
    """The relative error by time point of all blocks together, in the order of their samples; empty without any."""
    parts = [errors[start] for start in sorted(errors)]
    if not parts:
        return ()
    return tuple(np.sqrt(sum(p.difference for p in parts) / sum(p.target for p in parts)).tolist())


class _Pool:
    """Actors on a cluster, each made with `arguments`. The `environments` of those that answered must be alike."""

    def __init__(self, cluster: RayCluster, arguments: tuple[Any, ...]) -> None:
        # two calls at a time: while one block's features are extracted, the next is drawn or read
        remote = import_ray().remote(max_concurrency=CONCURRENCY, **cluster.actor_options())(EvaluationActor)
        self.cluster = cluster
        self.remote, self.arguments = remote, arguments
        self.idle: list[Any] = []
        self.environments: list[Environment] = []

    def run_all(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, Any]]:
        """Pairs of a block and its result, as they finish. One actor is kept, idle, for `run_alone`."""
        return run_pool(
            self._make,
            lambda actor, block: actor.run.remote(block),
            blocks,
            self.cluster.capacity,
            in_flight=2,
            greet=lambda actor: actor.environment.remote(),
            welcome=self._welcome,
            release=self._release,
        )

    def run_alone(self, block: Block) -> tuple[Any, str | None]:
        """The result of a block that is run on a single actor, so that nothing disturbs the timing, and None.

        An actor that dies is replaced, as in any pool. If the block fails for good: None and the reason, as the
        figures, which may have taken hours, are whole without it.
        """
        running = run_pool(
            lambda: self.idle.pop() if self.idle else self._make(),
            lambda actor, block: actor.run.remote(block),
            [block],
            lambda: min(1, self.cluster.capacity()),
            greet=lambda actor: actor.environment.remote(),
            welcome=self._welcome,
            release=self._release,
        )
        try:
            ((_, result),) = running
        except (UserError, WorkError) as error:
            return None, str(error)
        return result, None

    def _make(self) -> Any:
        return self.remote.remote(*self.arguments)

    def _welcome(self, environment: Environment) -> None:
        self.environments.append(environment)
        check_alike(environment, self.environments[0], "an evaluation")

    def _release(self, actor: Any) -> None:
        if self.idle:
            import_ray().kill(actor)
        else:
            self.idle.append(actor)


class _Collecting:
    """The sets while their blocks arrive.

    A set is finished when it and the reference are complete and, if copies are counted, the held-out images.
    """

    def __init__(
        self, settings: Evaluation, storage: Storage, real: RealData, sets: Sequence[ImagesOf]
    ) -> None:
        self.settings, self.storage, self.real = settings, storage, real
        self.sets = {images.source: images for images in sets}
        self.left = {images.source: len(_blocks_of(images, settings.batch_size)) for images in sets}
        self.collected = {
            images.source: [
                Collected(images.count, images.block_size(settings.batch_size)) for _ in range(images.draws)
            ]
            for images in sets
        }
        self.shards: dict[int, tuple[Shard, ...]] = {}
        self.whole: list[ImageSource] = []
        self.reference = finished_reference(storage, real, None) if real.source is None else None
        self.awaited = [] if real.source is None else [real.source]
        if HELD_OUT in self.sets and "nearest" in self.sets[HELD_OUT].readings:
            self.awaited.append(HELD_OUT)
        self.copies_below: float | None = None

    def add(self, block: Block, measured: MeasuredBlock) -> Iterator[MeasuredSet]:
        """Add a block, each block once; yields the sets that it completes."""
        source = block.source
        draw, start = divmod(block.start, self.sets[source].count)
        self.collected[source][draw].add(start, measured.result)
        self.shards[block.start] = self.shards.get(block.start, ()) + measured.kept
        self.left[source] -= 1
        if self.left[source]:
            return
        if source == self.real.source:
            (collected,) = self.collected.pop(source)
            self.reference = finished_reference(self.storage, self.real, collected)
        else:
            self.whole.append(source)
        while self.whole and not any(self.left[awaited] for awaited in self.awaited):
            if self.copies_below is None and HELD_OUT in self.awaited:
                readings, (held_out,) = self.sets[HELD_OUT].readings, self.collected[HELD_OUT]
                self.copies_below = distance_of_copies(readings, held_out, self.reference)
            images = self.sets[self.whole.pop(0)]
            of_draws = [
                figures(self.settings, images.readings, collected, self.reference, self.copies_below)
                for collected in self.collected.pop(images.source)
            ]
            yield MeasuredSet(images, best_draw(of_draws))

    def kept_shards(self) -> tuple[Shard, ...]:
        return tuple(shard for start in sorted(self.shards) for shard in self.shards[start])


def _in_words(blocks: list[Block], sets: Sequence[ImagesOf], reference: ImageSource | None) -> str:
    """What the progress counts, in words: images of each kind, and trajectories."""
    parts = [
        f"{images.count * images.draws:,} samples of the student"
        for images in sets
        if images.source == STUDENT
    ]
    if of_teacher := [images.count * images.draws for images in sets if images.source.kind == "teacher"]:
        parts.append(f"{sum(of_teacher):,} of the teacher in {len(of_teacher)} row(s)")
    for images in sets:
        if images.source.kind == "images":
            whose = "the reference" if images.source == reference else images.source.address
            parts.append(f"{images.count:,} images of {whose}")
    if trajectories := sum(b.stop - b.start for b in blocks if b.work == "trajectory"):
        parts.append(f"{trajectories:,} trajectories")
    return f"to measure: {', '.join(parts)}"


def _blocks_of(images: ImagesOf, batch_size: int) -> list[Block]:
    size, count = images.block_size(batch_size), images.count
    return [
        block
        for draw in range(images.draws)
        for block in _blocks("features", images.source, range(draw * count, (draw + 1) * count), size)
    ]


def _blocks(work: Any, source: ImageSource, samples: range, size: int) -> list[Block]:
    starts = range(samples.start, samples.stop, size)
    return [Block(work, source, start, min(start + size, samples.stop)) for start in starts]
