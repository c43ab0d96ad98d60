"""Specs of small data sets for tests that write shards by hand."""

from __future__ import annotations

from typing import Any

from dsno_cluster.diffusion.noise import GENERATOR, noise_checksum
from dsno_cluster.teachers.identity import GaussianIdentity
from dsno_cluster.trajectories.spec import LabelRule, NoiseRule, TrajectorySpec


def a_spec(
    shape: tuple[int, int, int] = (1, 4, 4),
    times: tuple[float, ...] = (0.5, 0.25, 0.0),
    seed: int = 4,
    per_shard: int = 8,
    classes: int = 0,
    **changes: Any,
) -> TrajectorySpec:
    """A spec of trajectories of a Gaussian; the shards need not be theirs."""
    return TrajectorySpec(
        format_version=2,
        teacher=GaussianIdentity(mean=0.1, std=0.5, shape=shape),
        solver="ddim",
        steps=8,
        grid="uniform between time points",
        times=times,
        clip_denoised=False,
        guidance_scale=1.0,
        labels=LabelRule(num_classes=classes),
        seed=seed,
        shape=shape,
        dtype="float16",
        inference_precision="float32",
        samples_per_shard=per_shard,
        batch_size=per_shard,
        threads=1,
        noise=NoiseRule(generator=GENERATOR, first_sample_sha256=noise_checksum(seed, shape)),
    ).model_copy(update=changes)
