"""What gen-trajectories will do and cost: arithmetic first, measured seconds and accuracy where asked.

The arithmetic needs neither the teacher nor torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dsno_cluster.config import Config
from dsno_cluster.diffusion.noise import GENERATOR, noise_checksum
from dsno_cluster.diffusion.solvers import count_evaluations
from dsno_cluster.errors import UserError
from dsno_cluster.trajectories.shards import canonical_hash

if TYPE_CHECKING:
    from dsno_cluster.diffusion.teachers import Teacher

FORMAT_VERSION = 1

_HOW = (
    "point teacher.path=FOLDER_OR_URL at a teacher's model.safetensors, config.yaml and meta.json, the form that "
    "`dsno-cluster train-teacher` writes"
)


@dataclass(frozen=True)
class Size:
    """How much there is to do; sizes are in bytes."""

    num_samples: int
    num_shards: int
    evaluations_per_sample: int
    bytes_per_shard: int

    @property
    def evaluations(self) -> int:
        return self.num_samples * self.evaluations_per_sample

    @property
    def bytes(self) -> int:
        return self.num_shards * self.bytes_per_shard


@dataclass(frozen=True)
class Plan:
    """`folder` is the key prefix of the data set below storage.root."""

    spec: dict[str, Any]
    folder: str
    size: Size


@dataclass(frozen=True)
class Cost:
    """Measured on `device`: seconds of one network evaluation of one sample, and what that makes of a plan."""

    device: str
    seconds_per_evaluation: float
    device_hours: float
    devices: int
    wall_hours: float


def size_of(config: Config) -> Size:
    """The arithmetic of a config."""
    settings, network = config.trajectories, config.network
    numbers = settings.num_points * network.channels * network.image_size**2
    size = {"float16": 2, "float32": 4}[settings.dtype]
    return Size(
        num_samples=settings.num_samples,
        num_shards=settings.num_samples // settings.samples_per_shard,
        evaluations_per_sample=count_evaluations(
            settings.solver, settings.steps, settings.guidance_scale, settings.time_points
        ),
        bytes_per_shard=settings.samples_per_shard * (numbers * size + (8 if network.num_classes else 0)),
    )


def make_plan(config: Config) -> Plan:
    """The plan of a config. Raises UserError where it names no teacher or one that is not there."""
    spec = trajectory_spec(config, find_teacher(config))
    return Plan(spec=spec, folder=f"trajectories/{canonical_hash(spec)}/", size=size_of(config))


def measure_cost(config: Config, teacher: Teacher, devices: int) -> Cost:
    """Time the teacher on this machine's device, at the config's batch size and threads, for about two seconds.

    `devices` of them (GPUs, or actors of `trajectories.threads` CPU threads) then share the work.
    """
    import statistics
    import time

    import torch

    from dsno_cluster.device import device_name
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    settings = config.trajectories
    device = teacher.device
    indices = range(settings.batch_size)
    noise = sample_noise(config.seed, indices, teacher.shape).to(device)
    labels = None
    if teacher.num_classes:
        labels = sample_labels(config.seed, indices, teacher.num_classes).to(device)
    seconds: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for _ in range(100):
            began = time.perf_counter()
            teacher(noise, 0.5, labels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            if len(seconds) > 3 and sum(seconds) > 2.0:
                break
    finally:
        torch.set_num_threads(threads)
    each = statistics.median(seconds[1:]) / settings.batch_size
    hours = each * size_of(config).evaluations / 3600
    return Cost(device_name(), each, hours, devices, hours / devices)


def report(config: Config, *, measured: Cost | None = None, error: dict[str, float] | None = None) -> str:
    """The plan as lines for people."""
    size, settings = size_of(config), config.trajectories
    guided = ", guided" if settings.guidance_scale != 1.0 else ""
    lines = [
        f"trajectories  {size.num_samples:,} of {settings.num_points} time points, {settings.dtype}",
        f"shards        {size.num_shards:,} of {settings.samples_per_shard:,} trajectories, {_bytes(size.bytes_per_shard)} each",
        f"storage       {_bytes(size.bytes)} below {config.storage.root}/trajectories/",
        f"evaluations   {size.evaluations_per_sample} a trajectory ({settings.solver}, {settings.steps} steps{guided}), "
        f"{size.evaluations:,} in all",
    ]
    if measured is None:
        lines.append("time          not measured: --measure times the teacher on this machine's device")
    else:
        unit = "device" if measured.devices == 1 else f"{measured.devices} devices"
        lines += [
            f"device        {measured.device}: {measured.seconds_per_evaluation:.3g} s an evaluation of one image "
            f"at batch {settings.batch_size}",
            f"time          {measured.device_hours:,.2f} device-hours; {_hours(measured.wall_hours)} on {unit}",
        ]
    if error is not None:
        lines.append(
            "accuracy      relative error at t: "
            + ", ".join(f"{t} {value:.2g}" for t, value in error.items())
            + " (probe samples, against a very fine solution)"
        )
    return "\n".join(lines)


def as_json(config: Config, *, measured: Cost | None, error: dict[str, float] | None) -> str:
    """The plan as one JSON object: sizes in bytes, times in seconds and hours."""
    size, settings = size_of(config), config.trajectories
    content = {
        **asdict(size),
        "evaluations": size.evaluations,
        "bytes": size.bytes,
        "solver": settings.solver,
        "steps": settings.steps,
        "times": list(settings.time_points),
        "measured": None if measured is None else asdict(measured),
        "relative_error": error,
    }
    return json.dumps(content)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:,.1f} h"


def teacher_path(config: Config) -> str:
    """The config's teacher; UserError that says how to get one where it names none."""
    if config.teacher.path is None:
        raise UserError(f"teacher.path: none is set; {_HOW}")
    return config.teacher.path


def find_teacher(config: Config) -> dict[str, Any]:
    """What a spec records of the config's teacher. UserError that says how to get one where it is not there."""
    from dsno_cluster.diffusion.teachers import teacher_identity

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
