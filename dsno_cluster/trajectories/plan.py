"""What gen-trajectories will do: the spec and its folder, the shards, the network evaluations, the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsno_cluster.config import Config
from dsno_cluster.diffusion.noise import GENERATOR, noise_checksum
from dsno_cluster.diffusion.solvers import count_evaluations
from dsno_cluster.diffusion.teachers import teacher_identity
from dsno_cluster.errors import UserError
from dsno_cluster.trajectories.shards import canonical_hash

FORMAT_VERSION = 1

_HOW = (
    "point teacher.path=FOLDER_OR_URL at a teacher's model.safetensors, config.yaml and meta.json, the form that "
    "`dsno-cluster train-teacher` writes"
)


@dataclass(frozen=True)
class Plan:
    """`folder` is the key prefix of the data set below storage.root; sizes are in bytes."""

    spec: dict[str, Any]
    folder: str
    num_samples: int
    num_shards: int
    evaluations_per_sample: int
    bytes_per_shard: int


def make_plan(config: Config) -> Plan:
    """The plan of a config. Raises UserError where it names no teacher or one that is not there."""
    spec = trajectory_spec(config, find_teacher(config))
    settings, network = config.trajectories, config.network
    numbers = settings.num_points * network.channels * network.image_size**2
    size = {"float16": 2, "float32": 4}[settings.dtype]
    return Plan(
        spec=spec,
        folder=f"trajectories/{canonical_hash(spec)}/",
        num_samples=settings.num_samples,
        num_shards=settings.num_samples // settings.samples_per_shard,
        evaluations_per_sample=count_evaluations(settings.solver, settings.steps, settings.guidance_scale),
        bytes_per_shard=settings.samples_per_shard * (numbers * size + (8 if network.num_classes else 0)),
    )


def teacher_path(config: Config) -> str:
    """The config's teacher; UserError that says how to get one where it names none."""
    if config.teacher.path is None:
        raise UserError(f"teacher.path: none is set; {_HOW}")
    return config.teacher.path


def find_teacher(config: Config) -> dict[str, Any]:
    """What a spec records of the config's teacher. UserError that says how to get one where it is not there."""
    path, network = teacher_path(config), config.network
    try:
        identity = teacher_identity(path, config.storage.endpoint_url)
    except UserError as error:
        raise UserError(f"teacher.path: {error}; {_HOW}") from None
    for key in ("image_size", "channels", "num_classes", "null_class"):
        ours, theirs = getattr(network, key), identity["network"].get(key)
        if ours != theirs:
            raise UserError(f"network.{key}: the config says {ours}, the teacher at {path} has {theirs}")
    return identity


def trajectory_spec(config: Config, teacher: dict[str, Any]) -> dict[str, Any]:
    """Everything that can change a byte of a shard. Its hash names the folder, so two specs never mix."""
    settings, network = config.trajectories, config.network
    shape = (network.channels, network.image_size, network.image_size)
    return {
        "format_version": FORMAT_VERSION,
        "teacher": teacher,
        "solver": settings.solver,
        "steps": settings.steps,
        "grid": "uniform between time points",
        "times": list(settings.time_points),
        "schedule": "cosine",
        "clip_denoised": settings.clip_denoised,
        "guidance_scale": settings.guidance_scale,
        "labels": {"rule": "uniform", "num_classes": network.num_classes},
        "seed": config.seed,
        "shape": list(shape),
        "dtype": settings.dtype,
        "inference_precision": "float32",
        "samples_per_shard": settings.samples_per_shard,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
        "noise": {"generator": GENERATOR, "first_sample_sha256": noise_checksum(config.seed, shape)},
    }
