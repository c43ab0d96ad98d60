"""sample --shards: Ray actors draw images from a student and write them as shards; `eval --samples` measures those.

A shard is a function of checkpoint, seed and index, so an interrupted run continues with those that are
missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

from pydantic import ValidationError

from dsno_cluster import console
from dsno_cluster.cluster.crew import ANY_CREW, Crew, actor_count
from dsno_cluster.cluster.ray_pool import (
    CONCURRENCY,
    PoolActor,
    import_ray,
    open_ray,
    run_pool,
)
from dsno_cluster.config.base import Named, PositiveInt, Seed, later
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.sample import (
    Drawing,
    Refinement,
    draw_images,
    open_drawing,
    states_of_student,
)
from dsno_cluster.images import to_uint8
from dsno_cluster.model_folder import find_model, model_address
from dsno_cluster.provenance import Environment, environment
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.teachers import DecoderIdentity
from dsno_cluster.trajectories.generate import (
    ROUNDS,
    check_alike,
    check_same_environment,
    collect_shards,
)
from dsno_cluster.trajectories.shards import (
    MADE_SHARDS,
    MANIFEST,
    MadeShards,
    Manifest,
    Shard,
    commit_manifest,
    keep_vanishing,
    make_manifest,
    put_shard,
    read_made_shards,
    read_manifest,
    shard_key,
    write_made_shards,
)

THREADS = 1  # of an actor


class SampleSpec(Named):
    """Everything that can change a byte of a set of samples; `student` is the sha256 of its weights."""

    student: str
    seed: Seed
    samples_per_shard: PositiveInt
    threads: PositiveInt
    precision: Literal["float32", "bfloat16"]
    compile: bool
    refinement: Refinement | None = later(None)
    label: int | None = later(None)
    decoder: DecoderIdentity | None = later(None)


def sample_spec(manifest: Manifest) -> SampleSpec | None:
    """The spec of a data set of samples; None if it holds something else."""
    return _read_spec(manifest.spec)


def noted_spec(made: MadeShards) -> SampleSpec | None:
    """The spec of an unfinished set of samples; None if it holds something else."""
    return _read_spec(made.spec)


def _read_spec(content: object) -> SampleSpec | None:
    try:
        return SampleSpec.model_validate_json(json.dumps(content))
    except ValidationError:
        return None


def sample_to_shards(
    drawing: Drawing,
    url: str,
    num: int,
    seed: int,
    batch_size: int,
    crew: Crew = ANY_CREW,
) -> None:
    """Write `num` images as shards of `batch_size` below `url`, a folder or an S3 address, and their manifest.

    Image i depends only on (seed, i). Raises UserError if `num` is not a multiple of `batch_size`, if the
    student was trained on that seed's noise, or if other samples exist there, and WorkError if shards cannot
    be made.
    """
    if num % batch_size:
        more = -(-num // batch_size) * batch_size
        raise UserError(
            f"--num {num}: shards are of --batch-size {batch_size} images; take {more}, or another size"
        )
    storage = open_storage(url, drawing.endpoint_url)
    # a training that continues moves `latest`, and every actor opens the student by itself
    address = model_address(drawing.checkpoint, drawing.endpoint_url)
    found = find_model(address, drawing.endpoint_url)
    found.check_weights()  # before the actors read them
    meta = found.meta
    drawing = replace(drawing, checkpoint=address, sha256=meta.sha256)
    drawing = replace(drawing, states=drawing.states or states_of_student(drawing))
    if meta.seed == seed:
        raise UserError(
            f"--seed {seed}: the student at {address} was trained on the noise of that seed, so figures of these images would "
            "not be those of a sampler; take another"
        )
    spec = SampleSpec(
        student=meta.sha256,
        seed=seed,
        samples_per_shard=batch_size,
        threads=THREADS,
        precision=drawing.precision,
        compile=drawing.compile,
        refinement=drawing.refinement,
        label=drawing.label,
        decoder=drawing.decoder(),
    )
    lines, made_by = _there_already(storage, spec)
    shards = num // batch_size
    todo = [index for index in range(shards) if shard_key(index) not in lines]
    console.say(
        f"{num} images of {drawing.checkpoint} in {shards} shards below {storage.url}, "
        f"{actor_count(crew, THREADS)}; {shards - len(todo)} shards exist already"
    )
    began = time.monotonic()
    for number in range(ROUNDS + 1):
        if not todo:
            break
        if number == ROUNDS:
            raise keep_vanishing(f"{storage.url}/{shard_key(todo[0])}", ROUNDS)
        made_by = _draw(storage, drawing, url, spec, todo, lines, made_by, crew)
        # some may be gone by now: what the manifest names must be there
        sizes = {stat.key: stat.size for stat in storage.list("shard-")}
        todo = [i for i in range(shards) if sizes.get(shard_key(i)) != lines[shard_key(i)][0].size]
    made = tuple(lines[shard_key(index)][0] for index in range(shards))
    commit_manifest(storage, "", make_manifest(spec, made, made_by or environment()))
    storage.delete(MADE_SHARDS)
    console.say(
        f"{num} images in {time.monotonic() - began:.1f} s: {url}; `dsno-cluster eval CONFIG --samples {url}` measures them"
    )


def _draw(
    storage: Storage,
    drawing: Drawing,
    url: str,
    spec: SampleSpec,
    todo: list[int],
    lines: dict[str, tuple[Shard, str]],
    made_by: Environment | None,
    crew: Crew,
) -> Environment:
    """Draw the shards `todo` and add them to `lines`, noted now and then; returns what made them.

    `made_by` is what made the existing shards. Raises UserError if an actor's device differs.
    """
    present: list[Environment] = []

    def welcome(environment: Environment) -> None:
        check_same_environment(environment, [made_by] if made_by else [], storage.url)
        if not present:
            present.append(environment)
            note()  # before the first shard, so that the spec of every existing shard is known
        check_alike(environment, present[0])

    def note() -> None:
        if present:
            made = MadeShards(
                environment=present[0], spec=spec.model_dump(mode="json"), shards=tuple(lines.values())
            )
            write_made_shards(storage, "", made)

    size, here = spec.samples_per_shard, os.getcwd()
    with open_ray(crew, THREADS) as cluster:
        remote = import_ray().remote(max_concurrency=CONCURRENCY, **cluster.actor_options())(SampleActor)
        with console.progress("sampling", len(todo) * size, "images") as advance:
            pool = run_pool(
                lambda: remote.remote(drawing, url, spec.seed, size, here),
                lambda actor, index: actor.make_shard.remote(index),
                todo,
                cluster.capacity,
                in_flight=2,
                greet=lambda actor: actor.environment.remote(),
                welcome=welcome,
            )
            collect_shards(pool, lines, note, lambda _: advance(size))
    return present[0]


def _there_already(
    storage: Storage, spec: SampleSpec
) -> tuple[dict[str, tuple[Shard, str]], Environment | None]:
    """The existing shards of this spec, and what made them, if there are any.

    Raises UserError for those of another.
    """
    manifest, progress = read_manifest(storage, ""), read_made_shards(storage, "")
    found = {stat.key: stat for stat in storage.list("shard-")}
    theirs = sample_spec(manifest[0]) if manifest else noted_spec(progress)
    if theirs != spec and (found or manifest):
        raise UserError(
            f"{storage.url}: holds other samples ({MANIFEST if manifest else 'shards'} of another student, --seed, --label, "
            "--batch-size or decoder); name an empty folder"
        )
    noted = progress.by_key if theirs == spec else {}
    if manifest:
        noted |= {s.key: (s, found[s.key].etag) for s in manifest[0].shards if s.key in found}
    kept = {
        key: (shard, etag)
        for key, (shard, etag) in noted.items()
        if key in found and found[key].etag == etag and found[key].size == shard.size
    }
    made_by = manifest[0].environment if manifest else progress.environment
    return kept, made_by if kept else None


class SampleActor(PoolActor):
    """A Ray actor that draws shards of `size` images from a student, below `url`.

    Paths are relative to `folder`.
    """

    def __init__(self, drawing: Drawing, url: str, seed: int, size: int, folder: str) -> None:
        import torch

        super().__init__()
        with contextlib.suppress(OSError):  # not on this node: then all that is used is on S3
            os.chdir(folder)
        torch.set_num_threads(THREADS)
        # one thread draws, so that the next shard is drawn while one is written
        self.drawing = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(THREADS,))
        self.opened = open_drawing(drawing)
        self.storage, self.seed, self.size = open_storage(url, drawing.endpoint_url), seed, size

    def make_shard(self, index: int) -> tuple[Shard, str]:
        """Draw and write a shard.

        Its line for the manifest and its object's etag. Raises WorkError as `put_shard` does.
        """
        start = index * self.size
        tensors = self.drawing.submit(self._draw, start).result()
        return put_shard(self.storage, "", index, start, tensors)

    def _draw(self, start: int) -> dict[str, Any]:
        images, labels = draw_images(self.opened, self.seed, range(start, start + self.size))
        return {"images": to_uint8(images)} | ({} if labels is None else {"labels": labels})
