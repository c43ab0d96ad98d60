"""sample --shards: Ray actors draw images from a student and write them as shards; `eval --samples` measures those.

A shard is a function of checkpoint, seed and number, so an interrupted run goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from dsno_cluster import console
from dsno_cluster.cluster.ray_pool import actor_count, given_address, import_ray, open_ray, run_pool
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.sample import Drawing, draw_images, open_drawing
from dsno_cluster.images import to_uint8
from dsno_cluster.model_folder import model_address, read_meta
from dsno_cluster.provenance import environment
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.trajectories.generate import (
    check_alike,
    check_same_environment,
    collect_shards,
)
from dsno_cluster.trajectories.shards import (
    MANIFEST,
    PROGRESS,
    Manifest,
    Progress,
    Shard,
    commit_manifest,
    put_shard,
    read_manifest,
    read_progress,
    shard_key,
    write_progress,
)

THREADS = 1  # of an actor


def sample_to_shards(
    drawing: Drawing,
    url: str,
    num: int,
    seed: int,
    batch_size: int,
    actors: int | None = None,
    ray_address: str | None = None,
) -> None:
    """Write `num` images as shards of `batch_size` below `url`, a folder or an S3 address, and their manifest.

    Image i is a function of (seed, i) alone. Raises UserError where `num` is no multiple of `batch_size`, where the student
    was trained on that seed's noise, or where other samples are there, and WorkError where shards cannot be made.
    """
    if num % batch_size:
        more = -(-num // batch_size) * batch_size
        raise UserError(
            f"--num {num}: shards are of --batch-size {batch_size} images; take {more}, or another size"
        )
    storage = open_storage(url, drawing.endpoint_url)
    # a training that goes on moves `latest`, and every actor opens the student by itself
    address = model_address(drawing.checkpoint, drawing.endpoint_url)
    meta = read_meta(address, drawing.endpoint_url)
    drawing = replace(drawing, checkpoint=address, sha256=meta.sha256)
    if meta.seed == seed:
        raise UserError(
            f"--seed {seed}: the student at {address} was trained on the noise of that seed, so figures of these images would "
            "not be those of a sampler; take another"
        )
    spec = {
        "student": meta.sha256,
        "seed": seed,
        "samples_per_shard": batch_size,
        "threads": THREADS,
        "precision": drawing.precision,
        "compile": drawing.compile,
        "refinement": None if drawing.refinement is None else asdict(drawing.refinement),
        "label": drawing.label,
    }
    lines, made_by = _there_already(storage, spec)
    shards = num // batch_size
    todo = [index for index in range(shards) if shard_key(index) not in lines]
    console.say(
        f"{num} images of {drawing.checkpoint} in {shards} shards below {storage.url}, "
        f"{actor_count(actors, THREADS)}; {shards - len(todo)} shards are there"
    )
    began = time.monotonic()
    if todo:
        made_by = _draw(storage, drawing, url, spec, todo, lines, made_by, actors, ray_address)
    made = tuple(lines[shard_key(index)][0] for index in range(shards))
    commit_manifest(storage, "", Manifest(spec, made, made_by or environment()))
    storage.delete(PROGRESS)
    console.say(
        f"{num} images in {time.monotonic() - began:.1f} s: {url}; `dsno-cluster eval CONFIG --samples {url}` measures them"
    )


def _draw(
    storage: Storage,
    drawing: Drawing,
    url: str,
    spec: dict[str, Any],
    todo: list[int],
    lines: dict[str, tuple[Shard, str]],
    made_by: dict[str, Any] | None,
    actors: int | None,
    ray_address: str | None,
) -> dict[str, Any]:
    """Draw the shards `todo`, adding to `lines`, which is noted in the storage now and then; returns what made them.

    `made_by` is what made those that are there. Raises UserError where actors are on a device that differs.
    """
    present: list[dict[str, Any]] = []

    def welcome(environment: dict[str, Any]) -> None:
        check_same_environment(environment, [made_by] if made_by else [], storage.url)
        if not present:
            present.append(environment)
            note()  # before the first shard, so that a shard that is there can be told what it is of
        check_alike(environment, present[0])

    def note() -> None:
        if present:
            write_progress(storage, "", Progress(lines, {"spec": spec} | present[0]))

    size, here = spec["samples_per_shard"], os.getcwd()
    with open_ray(given_address(ray_address), actors, THREADS) as cluster:
        remote = import_ray().remote(max_concurrency=2, **cluster.actor_options())(SampleActor)
        with console.progress("sampling", len(todo) * size, "images") as advance:
            pool = run_pool(
                lambda: remote.remote(drawing, url, spec["seed"], size, here),
                lambda actor, index: actor.make_shard.remote(index),
                todo,
                cluster.capacity,
                in_flight=2,
                greet=lambda actor: actor.environment.remote(),
                welcome=welcome,
            )
            collect_shards(pool, lines, note, lambda: advance(size))
    return present[0]


def _there_already(
    storage: Storage, spec: dict[str, Any]
) -> tuple[dict[str, tuple[Shard, str]], dict[str, Any] | None]:
    """The shards of this spec that are there, and what made them, if any are. Raises UserError where those of another are."""
    manifest, progress = read_manifest(storage, ""), read_progress(storage, "")
    found = {stat.key: stat for stat in storage.list("shard-")}
    theirs = manifest[0].spec if manifest else (progress.environment or {}).get("spec")
    if theirs != spec and (found or manifest):
        raise UserError(
            f"{storage.url}: holds other samples ({MANIFEST if manifest else 'shards'} of another student, --seed, --label or "
            "--batch-size); name an empty folder"
        )
    noted = dict(progress.shards) if theirs == spec else {}
    if manifest:
        noted |= {s.key: (s, found[s.key].etag) for s in manifest[0].shards if s.key in found}
    kept = {
        key: (shard, etag)
        for key, (shard, etag) in noted.items()
        if key in found and found[key].etag == etag and found[key].size == shard.size
    }
    made_by = manifest[0].environment if manifest else progress.environment
    return kept, {part: made_by[part] for part in made_by if part != "spec"} if kept and made_by else None


class SampleActor:
    """A Ray actor that holds a student and draws shards of `size` images below `url`; relative paths are those of `folder`."""

    def __init__(self, drawing: Drawing, url: str, seed: int, size: int, folder: str) -> None:
        import torch

        with contextlib.suppress(OSError):  # not on this node: then what is used lies on S3
            os.chdir(folder)
        torch.set_num_threads(THREADS)
        # one thread draws, so that while a shard is written the next is drawn
        self.drawing = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(THREADS,))
        self.opened = open_drawing(drawing)
        self.storage, self.seed, self.size = open_storage(url, drawing.endpoint_url), seed, size

    def environment(self) -> dict[str, Any]:
        return environment()

    def make_shard(self, index: int) -> tuple[Shard, str]:
        """Draw and write a shard; its line for the manifest and its object's etag. Raises WorkError as `put_shard`."""
        start = index * self.size
        tensors = self.drawing.submit(self._draw, start).result()
        return put_shard(self.storage, "", index, start, tensors)

    def _draw(self, start: int) -> dict[str, Any]:
        images, labels = draw_images(self.opened, self.seed, range(start, start + self.size))
        return {"images": to_uint8(images)} | ({} if labels is None else {"labels": labels})
