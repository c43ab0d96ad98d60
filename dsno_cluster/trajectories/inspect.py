"""inspect: what a data set holds - its spec, sizes, ranges, statistics by time point, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dsno_cluster import console
from dsno_cluster.errors import UserError
from dsno_cluster.storage import write_file
from dsno_cluster.trajectories.shards import Manifest, Shard, open_data_set, read_shard

PICTURED = 8


def inspect(
    address: str, num_shards: int, picture: str | None, endpoint_url: str | None = None
) -> dict[str, Any]:
    """Read `num_shards` shards, evenly spread over the data set at a folder, S3 address or manifest, and describe them.

    `by_time` gives mean, standard deviation, smallest and largest value of the states at each time point, over
    the samples read. `picture` is the .png to write: a row a trajectory, from noise to image. Raises UserError
    where there is no manifest and WorkError for a shard whose bytes are not those of the manifest.
    """
    storage, manifest = open_data_set(address, endpoint_url)
    if "times" not in manifest.spec:
        raise UserError(f"{address}: holds samples, not trajectories")
    chosen = _spread(manifest.shards, num_shards)
    moments: list[np.ndarray] = []
    classes: np.ndarray | None = None
    with (
        ThreadPoolExecutor(4) as threads,
        console.progress("inspecting", len(chosen), "shards") as advance,
    ):
        # reduced where it is read: no more shards are in memory than there are threads
        for sums, counts in threads.map(
            lambda shard: _reduce(manifest, read_shard(storage, "", shard)), chosen
        ):
            moments.append(sums)
            if counts is not None:
                classes = counts if classes is None else classes + counts
            advance(1)
    if picture is not None:
        _draw(manifest, read_shard(storage, "", chosen[0]), picture, endpoint_url)
    samples_read = sum(shard.stop - shard.start for shard in chosen)
    numbers = samples_read * int(np.prod(manifest.spec["shape"]))
    parts = np.stack(moments)
    mean = parts[:, 0].sum(0) / numbers
    # states are of order one, so the plain sum of squares in float64 loses nothing that is shown
    std = np.sqrt(np.maximum(parts[:, 1].sum(0) / numbers - mean**2, 0.0))
    by_time = zip(manifest.spec["times"], mean, std, parts[:, 2].min(0), parts[:, 3].max(0), strict=True)
    return {
        "address": address,
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "spec": manifest.spec,
        "environment": manifest.environment,
        "samples_read": samples_read,
        "by_time": [
            dict(zip(("time", "mean", "std", "min", "max"), map(float, row), strict=True)) for row in by_time
        ],
        "classes": None if classes is None else classes.tolist(),
    }


def describe(found: dict[str, Any]) -> str:
    """What `inspect` found, as lines for people."""
    spec, versions = found["spec"], found["environment"].get("versions", {})
    teacher = {key: value for key, value in spec["teacher"].items() if not isinstance(value, dict)}
    shape = "x".join(map(str, spec["shape"]))
    lines = [
        f"{found['samples']:,} trajectories of {shape} at t = {', '.join(map(str, spec['times']))}, {spec['dtype']}",
        f"{found['shards']:,} shards, {found['bytes']:,} bytes, made on {found['environment'].get('device')} "
        f"with torch {versions.get('torch')}",
        f"solver {spec['solver']}, {spec['steps']} steps, guidance {spec['guidance_scale']}, seed {spec['seed']}",
        f"teacher {json.dumps(teacher)}",
    ]
    if found["classes"] is not None:
        counts = found["classes"]
        lines.append(f"{len(counts)} classes, {min(counts)} to {max(counts)} samples each among those read")
    return "\n".join(lines)


def rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table by time point."""
    header = ["t", "mean", "std", "min", "max"]
    return header, [
        [
            f"{line['time']:.4g}",
            *(f"{line[key]:+.4f}" if key != "std" else f"{line[key]:.4f}" for key in header[1:]),
        ]
        for line in found["by_time"]
    ]


def _spread(shards: Sequence[Shard], count: int) -> list[Shard]:
    picks = np.linspace(0, len(shards) - 1, min(count, len(shards))).round().astype(int)
    return [shards[i] for i in sorted(set(picks.tolist()))]


def _reduce(manifest: Manifest, tensors: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Of a shard's states: sum, sum of squares, smallest and largest by time, (4, M) float64; and its class counts."""
    sums = []
    for states_NCHW in tensors["states"]:  # one time point at a time, as float64 takes four times the memory
        values = states_NCHW.double().numpy()
        sums.append([values.sum(), np.square(values).sum(), values.min(), values.max()])
    counts = None
    if "labels" in tensors:
        counts = np.bincount(tensors["labels"].numpy(), minlength=manifest.spec["labels"]["num_classes"])
    return np.array(sums).T, counts


def _draw(manifest: Manifest, tensors: dict[str, Any], path: str, endpoint_url: str | None) -> None:
    import torch

    from dsno_cluster.diffusion.noise import sample_noise
    from dsno_cluster.images import grid_png

    states_NMCHW = tensors["states"][:, :PICTURED].transpose(0, 1).float()
    noise_NCHW = sample_noise(manifest.spec["seed"], range(len(states_NMCHW)), tuple(manifest.spec["shape"]))
    columns = torch.cat([noise_NCHW[:, None], states_NMCHW], dim=1)
    data = grid_png(columns.flatten(0, 1), columns.shape[1])
    write_file(path, data, endpoint_url)
