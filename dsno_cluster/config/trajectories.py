"""Config keys of making and reading trajectories: trajectories, reader."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsno_cluster.config.base import PositiveInt, Strict
from dsno_cluster.config.paths import NodePath
from dsno_cluster.diffusion.guidance import check_guidance
from dsno_cluster.diffusion.schedule import time_points
from dsno_cluster.diffusion.solvers import Method, grid_points


class TimeGrid(Strict):
    spacing: Literal["quadratic", "uniform"]
    points: PositiveInt


class Trajectories(Strict):
    num_samples: PositiveInt = Field(
        description="number of trajectories, a multiple of samples_per_shard; more can be added later"
    )
    samples_per_shard: PositiveInt = Field(description="trajectories in each file")
    batch_size: PositiveInt = Field(description="trajectories that an actor solves at the same time")
    threads: PositiveInt = Field(
        1, description="CPU threads of each actor; part of the spec, because the last bits depend on it"
    )
    solver: Literal["ddim", "heun", "heun-edm", "dpmpp-2m", "abm3"] = Field(
        "abm3",
        description="how the sampling ODE is solved; heun and heun-edm (EDM's own sampler) evaluate the teacher twice a step, "
        "the others once",
    )
    grid: Literal["auto", "uniform", "fine-end"] = Field(
        "auto",
        description="how the steps lie in time; auto: the teacher's own steps if it has some, else those that suit the "
        "solver",
    )
    steps: PositiveInt = Field(description="number of intervals from t=1 to t=0")
    times: tuple[float, ...] | TimeGrid = Field(
        description="times at which states are kept, descending from below 1 to 0; with M points, quadratic: ((M-i)/M)^2, "
        "uniform: "
        "(M-i)/M, for i = 1..M"
    )
    dtype: Literal["float32", "float16"] = Field(
        "float16", description="dtype in which the states are stored"
    )
    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="scale of guidance; 1: none; other values need network.null_class (classifier-free guidance) or "
        "teacher.guide (autoguidance), and two evaluations at a time, those of one network in batches of twice batch_size",
    )
    guidance_interval: tuple[float, float] | None = Field(
        None,
        description="[low, high]: guides only at noise levels sigma above low and up to high; at others there is one "
        "evaluation; sigma is relative to the image, as in EDM; null: at all levels",
    )
    guidance_channels: PositiveInt | None = Field(
        None,
        description="how many first channels are guided; the others are those of the label, as in the sampling code of DiT and "
        "SiT with 3; null: all",
    )
    clip_denoised: bool = Field(
        False, description="whether the teacher's predictions of the image are clamped to [-1, 1]"
    )

    imported: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = Field(
        None,
        description="name of a data set below trajectories/ that `import-trajectories` made (16 digits); training reads it, and "
        "no teacher is needed for that. times must be its times. null: the teacher's trajectories",
    )

    @property
    def time_points(self) -> tuple[float, ...]:
        """The times of the stored states, descending, (M,)."""
        if isinstance(self.times, TimeGrid):
            return time_points(self.times.spacing, self.times.points)
        return self.times

    @property
    def method(self) -> Method:
        """How the ODE is solved; a grid of `auto` is decided by the teacher."""
        return Method(
            self.solver,
            self.steps,
            self.grid,
            self.guidance_scale,
            self.clip_denoised,
            joint_guidance=self.guidance_scale != 1.0,
            guidance_interval=self.guidance_interval,
            guidance_channels=self.guidance_channels,
        )

    @property
    def num_points(self) -> int:
        return self.times.points if isinstance(self.times, TimeGrid) else len(self.times)

    @model_validator(mode="after")
    def _fits_together(self) -> Trajectories:
        if self.num_samples % self.samples_per_shard and self.imported is None:
            raise ValueError(
                f"num_samples {self.num_samples} is not a multiple of {self.samples_per_shard} samples_per_shard"
            )
        if isinstance(self.times, tuple):
            t = self.times
            if not t or t[-1] != 0.0 or t[0] >= 1.0 or any(a <= b for a, b in itertools.pairwise(t)):
                raise ValueError("times must descend strictly from below 1 to exactly 0")
        check_guidance(self.method.guidance)
        grid_points(self.time_points, self.solver, self.steps, self.grid)  # raises if there are too few steps
        return self


class Reader(Strict):
    """How training reads trajectories."""

    shuffle: Literal["window", "none"] = Field(
        "window",
        description="window: shuffle shards, and samples within windows of shards; none: read samples in the order of "
        "their numbers",
    )
    window_shards: PositiveInt = Field(8, description="shards in a window")
    prefetch_batches: PositiveInt = Field(2, description="batches read ahead in the background")
    cache_dir: NodePath | None = Field(
        None,
        description="local folder that keeps shards from S3, shared by the processes of a node; its $VARIABLES are those "
        "of the node, as in $TMPDIR/shards",
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(100.0, description="largest size of the cache in GB")
