"""Config keys of the two trainings: training, teacher_training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsno_cluster.config.base import BelowOne, Fraction, PositiveInt, Precision, Seed, Sha256Start, Strict
from dsno_cluster.config.finishing import Betas, Distribution
from dsno_cluster.config.paths import LocalPath, StorageRoot
from dsno_cluster.config.trackers import Wandb


class Training(Strict):
    objective: Literal["trajectories", "distribution"] = Field(
        "trajectories",
        description="what a step minimises; trajectories: the distance from the teacher's trajectories; distribution: the "
        "difference of the distributions of one-step samples and of the teacher, and of real images (docs/finishing.md)",
    )
    start: StorageRoot | None = Field(
        None,
        description="folder or address of the student to begin with, of the form of the config; `best` in it means its best; "
        "null: a new one, from student.warm_start",
    )
    distribution: Distribution = Field(
        default_factory=Distribution, description="settings of objective=distribution"
    )
    seed: Seed | None = Field(
        None,
        description="determines what training draws: first weights, order of the data, dropout, and the noise of "
        "objective=distribution; null: the config's `seed`",
    )
    steps: PositiveInt = Field(description="optimiser steps")
    batch_size: PositiveInt = Field(description="global batch size: the sum over ranks and accumulation")
    accumulation: PositiveInt | Literal["auto"] = Field(
        1,
        description="micro-batches in a step; more of them save memory. auto: the fewest with which a step fits into the "
        "memory that is free when the run begins",
    )
    lr: Annotated[float, Field(gt=0)] = Field(description="learning rate after the warm-up")
    warmup: Annotated[int, Field(ge=0)] = Field(
        0, description="optimiser steps of linear warm-up; at most the length of the run"
    )
    lr_decay: Literal["cosine", "halving", "none"] = Field(
        "cosine",
        description="how the learning rate falls; cosine: to 0 at the end; halving: by half at the steps halve_at "
        "(published)",
    )
    halve_at: tuple[PositiveInt, ...] = Field(
        (), description="optimiser steps at which lr_decay=halving halves the rate"
    )
    end_share: Fraction = Field(
        0.5, description="with student.points=drawn: share of the steps that ask only for t=0"
    )
    most_points: PositiveInt = Field(
        1,
        description="with student.points=drawn: the other steps ask for 1 to this many points, drawn from all",
    )
    loss: Literal["l1", "l2", "pseudo-huber", "lpips"] = Field(
        "l1",
        description="distance between states at a time point; lpips: between their VGG-16 features (published for CIFAR-10)",
    )
    time_weighting: Literal["snr", "sqrt", "flat"] = Field(
        "snr",
        description="weights of the time points; snr: alpha/sigma, limited to 1..10^4 (published), nearly all of it at t=0; "
        "sqrt: the square root of that; flat: 1",
    )
    lpips_weights: LocalPath | None = Field(
        None, description="file with torchvision's VGG-16 state dict, for loss=lpips"
    )
    lpips_sha256: Sha256Start | None = Field(
        None, description="sha256 that the file of lpips_weights must have, or its first 8 digits or more"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="DeepSpeed ZeRO: what is divided among the ranks; 0: nothing, 1: optimiser states, 2: gradients too, "
        "3: weights too",
    )
    precision: Precision | Literal["auto"] = Field(
        "auto",
        description="auto: bfloat16 on a GPU that computes in it, else float32; a run keeps what it began with. bfloat16, "
        "float16: the layers in autocast, weights, gradients and their sums in float32; with float16 the loss is scaled. tf32: "
        "float32 whose matrix products and convolutions a GPU computes from inputs of 10 bits",
    )
    optimizer: Literal["adam", "adamw", "radam"] = Field("adam", description="the optimiser")
    betas: Betas = Field((0.9, 0.999), description="decay rates of the optimiser's two moments")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay of the optimiser")
    recompute: Literal["none", "cheap", "blocks"] = Field(
        "none",
        description="activation checkpointing: what the backward pass computes again to save memory; cheap: norms and "
        "activations; blocks: whole residual blocks",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="whether the student's network is compiled with torch.compile, at most twice; auto: on a GPU, below "
        "zero_stage 3, if 1000 steps or more are left. The kernels are kept in kernels/ below run.dir",
    )
    gradient_clip: Annotated[float, Field(ge=0)] = Field(
        0.0, description="largest global gradient norm; 0: none"
    )
    ema_decay: BelowOne | Annotated[tuple[BelowOne, ...], Field(min_length=1)] = Field(
        0.9999,
        description="decay of the moving average of the weights, or of several; the first is loaded unless another is "
        "asked for",
    )
    ema_ramp: bool = Field(
        True, description="whether the decay at step n is min(ema_decay, (1 + n) / (10 + n))"
    )
    checkpoint_every: PositiveInt = Field(
        1000, description="steps between checkpoints; each comes with a student that can be loaded"
    )
    keep_checkpoints: PositiveInt = Field(
        2,
        description="how many of the newest checkpoints are kept to resume from, beside the best by held-out error or distance",
    )
    log_every: PositiveInt = Field(50, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(
        False, description="whether TensorBoard's event files are written beside metrics.jsonl"
    )
    wandb: Wandb | None = Field(
        None,
        description="the run of Weights & Biases that gets the lines of metrics.jsonl and the pictures; null: none",
    )
    heldout_every: PositiveInt | None = Field(
        None, description="steps between measurements of the trajectory error on held-out noise; null: never"
    )
    heldout_samples: PositiveInt = Field(
        64, description="number of held-out noises, which are those of evaluation.seed"
    )
    picture_every: PositiveInt | None = Field(
        None, description="steps between pictures of samples from fixed noise; null: never"
    )
    divergence_factor: Annotated[float, Field(ge=0)] = Field(
        20.0, description="stop if the distance at a time point is this many times its running mean; 0: never"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads of each rank; null: cores / ranks")
    online: bool = Field(
        False,
        description="whether the trajectories are made while training, and not kept; reader.shuffle must be none",
    )
    online_actors: PositiveInt | None = Field(
        None, description="Ray actors that make them; null: as many as there is room for"
    )
    online_staged_shards: PositiveInt = Field(
        16, description="largest number of shards that are on disk at the same time"
    )

    @property
    def ema_decays(self) -> tuple[float, ...]:
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @property
    def reads_trajectories(self) -> bool:
        """Whether steps learn from the teacher's trajectories; distribution matching does so only with them as an anchor."""
        return self.objective == "trajectories" or self.distribution.trajectory_weight > 0.0

    @property
    def learns_features(self) -> bool:
        """Whether steps bring the moments of samples' features to those of real images."""
        return self.objective == "distribution" and self.distribution.frechet_weight > 0.0

    @property
    def needs_vgg(self) -> bool:
        """Whether steps compare states by VGG-16."""
        return self.loss == "lpips" and self.reads_trajectories

    @property
    def micro_batches(self) -> int:
        """`accumulation` of a run that has begun, which has chosen it."""
        assert self.accumulation != "auto"
        return self.accumulation

    @model_validator(mode="after")
    def _fits_together(self) -> Training:
        if len({f"{decay:g}" for decay in self.ema_decays}) < len(self.ema_decays):  # the names of the files
            raise ValueError(f"ema_decay {list(self.ema_decays)}: two are the same to six digits")
        if self.accumulation != "auto" and self.batch_size % self.accumulation:
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
    """Settings of `train-teacher`, which trains a denoiser on `data` with v-prediction."""

    steps: PositiveInt = Field(3000, description="optimiser steps")
    batch_size: PositiveInt = Field(128, description="images in a step")
    lr: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="learning rate after the warm-up; it falls to 0 at the end along a cosine"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(100, description="optimiser steps of linear warm-up")
    ema_decay: BelowOne = Field(0.999, description="decay of the moving average that becomes the teacher")
    label_dropout: Fraction = Field(0.1, description="share of labels that are replaced by the null class")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32", description="as training.precision; bfloat16: the layers in autocast"
    )
    checkpoint_every: PositiveInt = Field(1000, description="steps between states from which to resume")
