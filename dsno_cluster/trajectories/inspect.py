"""inspect: the contents of a data set - its spec, sizes, ranges, statistics by time point, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from dsno_cluster import console
from dsno_cluster.provenance import Environment
from dsno_cluster.records import Record
from dsno_cluster.storage import write_file
from dsno_cluster.trajectories.shards import Shard, open_data_set, read_shard, trajectory_spec
from dsno_cluster.trajectories.spec import AnySpec, TrajectorySpec

if TYPE_CHECKING:
    from torch import Tensor

PICTURED = 8


class StatesAtTime(Record):
    """Statistics of the states at one time point, over the samples read."""

    time: float
    mean: float
    std: float
    min: float
    max: float


class Inspection(Record):
    """The result of `inspect`: `samples` in `shards` of `bytes` in total.

    `classes` counts labels of `samples_read`.
    """

    address: str
    samples: int
    shards: int
    bytes: int
    spec: AnySpec
    environment: Environment
    samples_read: int
    by_time: tuple[StatesAtTime, ...]
    classes: list[int] | None


def inspect(
    address: str, num_shards: int, picture: str | None, endpoint_url: str | None = None
) -> Inspection:
    """Read `num_shards` shards, evenly spread over a data set, and describe them.

    `address` is a folder, an S3 address or a manifest. `picture` is the .png to write, a row per trajectory,
    from noise to image. Raises UserError if there is no manifest and WorkError for a shard whose bytes are
    not those of the manifest.
    """
    storage, manifest = open_data_set(address, endpoint_url)
    spec = trajectory_spec(manifest, address)
    chosen = _spread(manifest.shards, num_shards)
    moments: list[np.ndarray] = []
    classes: np.ndarray | None = None
    with (
        ThreadPoolExecutor(4) as threads,
        console.progress("inspecting", len(chosen), "shards") as advance,
    ):
        # reduced in the reading thread: no more shards are in memory than there are threads
        for sums, counts in threads.map(lambda shard: _reduce(spec, read_shard(storage, "", shard)), chosen):
            moments.append(sums)
            if counts is not None:
                classes = counts if classes is None else classes + counts
            advance(1)
    if picture is not None:
        _draw(spec, read_shard(storage, "", chosen[0]), picture, endpoint_url)
    samples_read = sum(shard.stop - shard.start for shard in chosen)
    numbers = samples_read * int(np.prod(spec.shape))
    parts = np.stack(moments)
    mean = parts[:, 0].sum(0) / numbers
    # states are of order one, so the plain sum of squares in float64 loses no digit that is shown
    std = np.sqrt(np.maximum(parts[:, 1].sum(0) / numbers - mean**2, 0.0))
    by_time = zip(spec.times, mean, std, parts[:, 2].min(0), parts[:, 3].max(0), strict=True)
    return Inspection(
        address=address,
        samples=manifest.num_samples,
        shards=len(manifest.shards),
        bytes=sum(shard.size for shard in manifest.shards),
        spec=spec,
        environment=manifest.environment,
        samples_read=samples_read,
        by_time=tuple(
            StatesAtTime(time=t, mean=float(m), std=float(s), min=float(low), max=float(high))
            for t, m, s, low, high in by_time
        ),
        classes=None if classes is None else classes.tolist(),
    )


def describe(found: Inspection) -> str:
    """What `inspect` found, as lines for people."""
    spec, versions = found.spec, found.environment.versions
    shape = "x".join(map(str, spec.shape))
    lines = [
        f"{found.samples:,} trajectories of {shape} at t = {', '.join(map(str, spec.times))}, {spec.dtype}",
        f"{found.shards:,} shards, {found.bytes:,} bytes, made on {found.environment.device} "
        f"with torch {versions.get('torch')}",
        *_made_how(spec),
    ]
    if found.classes is not None:
        counts = found.classes
        lines.append(f"{len(counts)} classes, {min(counts)} to {max(counts)} samples each among those read")
    return "\n".join(lines)


def _made_how(spec: AnySpec) -> list[str]:
    if isinstance(spec, TrajectorySpec):
        identity = spec.teacher.model_dump(mode="json")
        teacher = {key: value for key, value in identity.items() if not isinstance(value, dict)}
        return [
            f"solver {spec.solver}, {spec.steps} steps, {_guidance(spec)}, seed {spec.seed}",
            f"teacher {json.dumps(teacher)}",
        ]
    source = spec.source
    return [
        f"imported from {source.format} parts of sha256 {source.sha256}, scale {source.scale}, noise stored",
        f"their times {', '.join(f'{t:g}' for t in source.timesteps)}, and 0",
    ]


def rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table by time point."""
    return ["t", "mean", "std", "min", "max"], [
        [f"{at.time:.4g}", f"{at.mean:+.4f}", f"{at.std:.4f}", f"{at.min:+.4f}", f"{at.max:+.4f}"]
        for at in found.by_time
    ]


def _spread(shards: Sequence[Shard], count: int) -> list[Shard]:
    picks = np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(int)
    return [shards[i] for i in sorted(set(picks.tolist()))]


def _reduce(spec: AnySpec, tensors: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray | None]:
    """Sum, sum of squares, minimum and maximum of a shard's states by time, (4, M) float64.

    And its class counts.
    """
    sums = []
    for states_NCHW in tensors["states"]:  # one time point at a time, as float64 takes four times the memory
        values = states_NCHW.double().numpy()
        sums.append([values.sum(), np.square(values).sum(), values.min(), values.max()])
    counts = None
    if "labels" in tensors:
        counts = np.bincount(tensors["labels"].numpy(), minlength=spec.labels.num_classes)
    return np.array(sums).T, counts


def _draw(spec: AnySpec, tensors: dict[str, Tensor], path: str, endpoint_url: str | None) -> None:
    import torch

    from dsno_cluster.diffusion.noise import sample_noise
    from dsno_cluster.images import grid_png

    states_NMCHW = tensors["states"][:, :PICTURED].transpose(0, 1).float()
    if isinstance(spec, TrajectorySpec):
        noise_NCHW = sample_noise(spec.seed, range(len(states_NMCHW)), spec.shape)
    else:
        noise_NCHW = tensors["noise"][:PICTURED]
    columns = torch.cat([noise_NCHW[:, None], states_NMCHW], dim=1)
    data = grid_png(columns.flatten(0, 1), columns.shape[1])
    write_file(path, data, endpoint_url)


def _guidance(spec: TrajectorySpec) -> str:
    """How a data set was guided, in words."""
    text = f"guidance {spec.guidance_scale}"
    if spec.guide is not None:
        text += f" from a {spec.guide.kind} teacher"
    if spec.guidance_interval is not None:
        text += " at noise levels above {:g} and up to {:g}".format(*spec.guidance_interval)
    if spec.guidance_channels is not None:
        text += f" of the first {spec.guidance_channels} channels"
    return text
