"""gen-trajectories: Ray actors solve the teacher's ODE, the driver keeps them busy and commits the manifest.

A shard is a pure function of (spec, index), so any actor may make any shard, again if need be.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsno_cluster import console
from dsno_cluster.cluster.ray_pool import actor_resources, import_ray, local_ray, run_pool
from dsno_cluster.config import Config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.trajectories.plan import Plan, make_plan, teacher_path
from dsno_cluster.trajectories.shards import (
    Manifest,
    Shard,
    commit_manifest,
    decode_shard,
    read_manifest,
    shard_key,
    write_shard,
)


def describe_plan(config: Config, plan: Plan, actors: int) -> str:
    """What will be done, in one line."""
    settings = config.trajectories
    return (
        f"{plan.num_samples} trajectories of {settings.num_points} time points in {plan.num_shards} shards "
        f"({plan.num_shards * plan.bytes_per_shard / 1e6:.1f} MB) below {config.storage.root}/{plan.folder}: "
        f"{settings.solver}, {plan.evaluations_per_sample} network evaluations each, "
        f"{actors} actors of {settings.threads} thread(s)"
    )


def generate(config: Config, actors: int) -> str:
    """Make every shard that is missing, then commit the manifest; returns the address of the data set.

    Raises UserError for a teacher that does not fit the config and WorkError where shards cannot be made.
    """
    plan = make_plan(config)
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    address = f"{storage.url}/{plan.folder.rstrip('/')}"
    console.say(describe_plan(config, plan, actors))
    current = read_manifest(storage, plan.folder)
    here = environment()
    if current and current[0].environment["device"] != here["device"]:
        raise UserError(
            f"{address}: was made on {current[0].environment['device']}, this is {here['device']}, whose bits may differ; "
            "go on with the device that began, or change the seed for a data set of its own"
        )
    named = {shard.key: shard for shard in current[0].shards} if current else {}
    sizes = {s.key.removeprefix(plan.folder): s.size for s in storage.list(plan.folder + "shard-")}
    done = {key: shard for key, shard in named.items() if sizes.get(key) == shard.size}
    if len(named) >= plan.num_shards and len(done) == len(named):
        console.say(f"all {plan.num_shards} shards are there already: {address}")
        return address
    num_shards = max(plan.num_shards, len(named))  # what a manifest names is made again where it is gone
    done |= _finished_shards(storage, plan, [key for key in sizes if key not in named])
    todo = [index for index in range(num_shards) if shard_key(index) not in done]
    if done:
        console.say(
            f"{plan.num_shards - len(todo)} of {plan.num_shards} shards are done, {len(todo)} to make"
        )
    if todo:
        try:
            done |= {shard.key: shard for shard in _make_shards(config, plan, todo, actors)}
        except KeyboardInterrupt:
            console.say("interrupted: finished shards are kept, the same command makes the others")
            raise
    shards = tuple(done[shard_key(index)] for index in range(num_shards))
    commit_manifest(storage, plan.folder, Manifest(plan.spec, shards, here))
    console.say(f"done: {address}")
    return address


def environment() -> dict[str, Any]:
    """Device model and versions that made the bytes; recorded, not part of the spec."""
    from dsno_cluster.device import device_name
    from dsno_cluster.models.weights import software_versions

    return {"device": device_name(), "versions": software_versions()}


def _finished_shards(storage: Storage, plan: Plan, keys: list[str]) -> dict[str, Shard]:
    """Those of `keys` that are whole shards of an interrupted run, which no manifest names yet, with their hash."""
    wanted = {shard_key(index): index for index in range(plan.num_shards)}
    per_shard = plan.num_samples // plan.num_shards
    shape = [len(plan.spec["times"]), per_shard, *plan.spec["shape"]]

    def hashed(key: str) -> Shard | None:
        data, start = storage.read(plan.folder + key), wanted[key] * per_shard
        try:
            whole = list(decode_shard(data)["states"].shape) == shape
        except (WorkError, KeyError):
            whole = False  # not of ours: made again
        return (
            Shard(key, start, start + per_shard, len(data), hashlib.sha256(data).hexdigest())
            if whole
            else None
        )

    with ThreadPoolExecutor(8) as threads:
        found = threads.map(hashed, [key for key in keys if key in wanted])
        return {shard.key: shard for shard in found if shard is not None}


def _make_shards(config: Config, plan: Plan, todo: list[int], actors: int) -> list[Shard]:
    shards: list[Shard] = []
    per_shard = config.trajectories.samples_per_shard
    total = max(plan.num_samples, len(todo) * per_shard)
    before = total - len(todo) * per_shard
    with local_ray(actors, config.trajectories.threads):
        remote = import_ray().remote(**actor_resources(config.trajectories.threads))(SolveActor)
        began = time.monotonic()
        with console.progress("solving", total, "trajectories", done=before) as advance:
            pool = run_pool(
                lambda: remote.remote(config),
                lambda actor, index: actor.make_shard.remote(index),
                todo,
                actors,
            )
            for _, shard in pool:
                shards.append(shard)
                rate = len(shards) * per_shard / (time.monotonic() - began)
                advance(
                    per_shard, **{"trajectories/s": rate, "evaluations/s": rate * plan.evaluations_per_sample}
                )
    return shards


class SolveActor:
    """A Ray actor that holds the teacher and makes shards."""

    def __init__(self, config: Config) -> None:
        import torch

        from dsno_cluster.device import compute_device
        from dsno_cluster.diffusion.teachers import load_teacher

        torch.set_num_threads(config.trajectories.threads)  # bits depend on it: part of the spec
        self.config = config
        self.plan = make_plan(config)
        self.teacher = load_teacher(teacher_path(config), config.storage.endpoint_url).to(compute_device())
        self.storage = open_storage(config.storage.root, config.storage.endpoint_url)

    def make_shard(self, index: int) -> Shard:
        """Solve, encode and write shard `index`; returns its line for the manifest."""
        import torch

        settings = self.config.trajectories
        start = index * settings.samples_per_shard
        states, labels = [], []
        stop = start + settings.samples_per_shard
        for first in range(start, stop, settings.batch_size):
            indices = range(first, min(first + settings.batch_size, stop))
            batch = solve_batch(self.config, self.teacher, self.config.seed, indices)
            states.append(batch[0].to("cpu", getattr(torch, settings.dtype)))
            labels.append(batch[1])
        states_MNCHW = torch.cat(states).transpose(0, 1)
        if not bool(states_MNCHW.isfinite().all()):
            raise WorkError(f"shard {index}: the teacher gave states that are not finite in {settings.dtype}")
        tensors = {"states": states_MNCHW}
        if self.config.network.num_classes:
            tensors["labels"] = torch.cat(labels)
        return write_shard(self.storage, self.plan.folder, index, start, tensors)


def solve_batch(config: Config, teacher: Any, seed: int, indices: range) -> tuple[Any, Any]:
    """States (N, M, C, H, W), on the teacher's device, and labels (N,) or None, of the given samples of `seed`."""
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise
    from dsno_cluster.diffusion.solvers import solve

    settings = config.trajectories
    noise = sample_noise(seed, indices, teacher.shape)
    labels = sample_labels(seed, indices, teacher.num_classes) if teacher.num_classes else None
    device = teacher.device
    states = solve(
        teacher,
        noise.to(device),
        settings.time_points,
        settings.solver,
        settings.steps,
        None if labels is None else labels.to(device),
        settings.guidance_scale,
        settings.clip_denoised,
    )
    return states, labels
