"""Keys of the two trainings: training, teacher_training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsno_cluster.config.base import BelowOne, Fraction, PositiveInt, Sha256Start, Strict
from dsno_cluster.config.paths import LocalPath


class Training(Strict):
    steps: PositiveInt = Field(description="optimiser steps")
    batch_size: PositiveInt = Field(description="global: the sum over ranks and accumulation")
    accumulation: PositiveInt = Field(1, description="micro-batches of a step, to save memory")
    lr: Annotated[float, Field(gt=0)] = Field(description="learning rate after the warm-up")
    warmup: Annotated[int, Field(ge=0)] = Field(
        0, description="optimiser steps; clipped to the length of the run"
    )
    lr_decay: Literal["cosine", "halving", "none"] = Field(
        "cosine",
        description="of the learning rate; cosine: to 0 at the end; halving: at the steps halve_at (published)",
    )
    halve_at: tuple[PositiveInt, ...] = Field(
        (), description="optimiser steps where lr_decay=halving halves the rate"
    )
    end_share: Fraction = Field(
        0.5, description="student.points=drawn: share of the steps that ask for t=0 alone"
    )
    most_points: PositiveInt = Field(
        1, description="student.points=drawn: the other steps ask for 1 to so many points, drawn from all"
    )
    loss: Literal["l1", "l2", "pseudo-huber", "lpips"] = Field(
        "l1",
        description="distance of states at a time point; lpips: of VGG-16's features (published for CIFAR-10)",
    )
    time_weighting: Literal["snr", "sqrt", "flat"] = Field(
        "snr",
        description="weights of the time points; snr: alpha/sigma within 1..10^4 (published), nearly all of it at t=0; "
        "sqrt: its root; flat: 1",
    )
    lpips_weights: LocalPath | None = Field(
        None, description="torchvision's VGG-16 state dict, for loss=lpips"
    )
    lpips_sha256: Sha256Start | None = Field(
        None, description="sha256 that the file of lpips_weights must have, or its first 8 digits or more"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="DeepSpeed ZeRO: what ranks share; 0: nothing, 1: optimiser states, 2: gradients too, 3: weights too",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of weights and layers; master weights stay float32, float16 scales its loss"
    )
    optimizer: Literal["adam", "adamw", "radam"] = Field("adam", description="the rule of the steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the optimiser")
    recompute: Literal["none", "cheap", "blocks"] = Field(
        "none",
        description="activation checkpointing: what backward computes again to save memory; cheap: norms and "
        "activations, blocks: whole residual blocks",
    )
    compile: bool = Field(False, description="torch.compile the backbone")
    gradient_clip: Annotated[float, Field(ge=0)] = Field(
        0.0, description="largest global gradient norm; 0: none"
    )
    ema_decay: BelowOne | Annotated[tuple[BelowOne, ...], Field(min_length=1)] = Field(
        0.9999,
        description="one, or several averages at once; others load the first unless they ask for another",
    )
    ema_ramp: bool = Field(True, description="decay min(ema_decay, (1 + n) / (10 + n)) at step n")
    checkpoint_every: PositiveInt = Field(
        1000, description="steps between checkpoints, each with a student that others can load"
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="newest checkpoints kept to resume from, beside the best by held-out error"
    )
    log_every: PositiveInt = Field(50, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="also write TensorBoard's event files, beside metrics.jsonl")
    heldout_every: PositiveInt | None = Field(
        None, description="steps between measurements of the trajectory error on held-out noise; null: none"
    )
    heldout_samples: PositiveInt = Field(64, description="held-out noises, those of evaluation.seed")
    picture_every: PositiveInt | None = Field(
        None, description="steps between pictures of samples from fixed noise; null: none"
    )
    divergence_factor: Annotated[float, Field(ge=0)] = Field(
        20.0, description="stop where a time point's distance is so many times its running mean; 0: never"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads of each rank; default: cores / ranks")
    online: bool = Field(
        False,
        description="make the trajectories while training, without keeping them; reader.shuffle must be none",
    )
    online_actors: PositiveInt | None = Field(
        None, description="Ray actors that make them; default: as many as there is room for"
    )
    online_staged_shards: PositiveInt = Field(16, description="most shards that are on disk at once")

    @property
    def ema_decays(self) -> tuple[float, ...]:
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @model_validator(mode="after")
    def _fits_together(self) -> Training:
        if len({f"{decay:g}" for decay in self.ema_decays}) < len(self.ema_decays):  # files are named so
            raise ValueError(f"ema_decay {list(self.ema_decays)}: two are the same to six digits")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
            )
        if (self.lr_decay == "halving") != bool(self.halve_at):
            raise ValueError("halve_at and lr_decay=halving go together")
        if self.loss == "lpips" and not self.lpips_weights:
            raise ValueError(
                "loss lpips needs lpips_weights, the path of torchvision's VGG-16 weights; or take loss=l1"
            )
        return self


class TeacherTraining(Strict):
    """`train-teacher`: a denoiser trained on `data` with v-prediction."""

    steps: PositiveInt = Field(3000, description="optimiser steps")
    batch_size: PositiveInt = Field(128, description="images a step")
    lr: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="learning rate after the warm-up; falls to 0 at the end as a cosine"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(100, description="optimiser steps")
    ema_decay: BelowOne = Field(0.999, description="of the moving average that becomes the teacher")
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null class")
    checkpoint_every: PositiveInt = Field(1000, description="steps between states to go on from")
