"""Keys of the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsno_cluster.config.base import BelowOne, PositiveInt, Seed, Strict


class Evaluation(Strict):
    num_samples: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt = 250
    threads: PositiveInt = 1
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the student's network")
    compile: bool = Field(False, description="torch.compile the student's network")
    ema_decay: BelowOne | None = Field(
        None, description="which of the student's moving averages; default: the first of training.ema_decay"
    )
    seed: Seed = Field(
        1, description="seed of the evaluated noise; must differ from the seed of the trajectories"
    )
    metrics: tuple[Literal["fid", "agreement", "trajectory_error"], ...] = ("fid", "trajectory_error")
    feature_extractor: str = "inception-v3-compat"
    weights_path: str | None = Field(
        None, description="weights of the extractor; package:NAME for one that ships"
    )
    weights_sha256: str | None = Field(
        None, description="first digits of the sha256 that weights_path must have"
    )
    reference: str = Field(description="the real data: 'data' for data.name, or an .npz with mu and sigma")
    trajectory_samples: PositiveInt = Field(500, description="held-out noises for the trajectory error")
    teacher_steps: tuple[PositiveInt, ...] = Field(
        (1, 4, 8, 64), description="DDIM steps of the teacher's rows"
    )
    keep_samples: bool = Field(False, description="write the student's samples as shards under storage.root")
    picture_columns: PositiveInt = 8

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluation:
        if self.keep_samples and self.num_samples % self.batch_size:
            raise ValueError(
                f"keep_samples writes shards of batch_size {self.batch_size}: num_samples {self.num_samples} must be a multiple"
            )
        if self.weights_sha256 is not None and len(self.weights_sha256) < 8:
            raise ValueError("weights_sha256 must be 8 digits or more")
        return self
