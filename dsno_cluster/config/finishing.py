"""Config keys of distribution matching: training.distribution, finish."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsno_cluster.config.base import BelowOne, PositiveInt, Strict
from dsno_cluster.config.evaluation import MetricName

Weight = Annotated[float, Field(ge=0)]
LearningRate = Annotated[float, Field(gt=0)]
Betas = tuple[BelowOne, BelowOne]


class Distribution(Strict):
    """Settings of `training.objective: distribution`."""

    matching: Literal["gradient", "score-identity"] = Field(
        "gradient",
        description="how the student's distribution is moved towards the teacher's; gradient: along the difference of the two "
        "denoisers (DMD2); score-identity: by the loss of SiD, whose gradient also flows through both of them",
    )
    identity_alpha: float = Field(
        1.0, description="alpha of matching=score-identity; 0.5 to 1.2 in the publications"
    )
    matching_weight: Weight = Field(1.0, description="weight of the distribution matching")
    adversarial_weight: Weight = Field(
        0.02,
        description="weight of the adversarial loss on the real images of `data`, for the student and for the fake score "
        "network; 0: no real images are needed",
    )
    frechet_weight: Weight = Field(
        0.0,
        description="weight of the Frechet loss: samples get the mean and covariance that the real images of `data` have in the "
        "features of evaluation.feature_extractor, as fid reads them; 0: none. A distance in other features then says more",
    )
    frechet_population: Annotated[int, Field(ge=2)] = Field(
        10_000,
        description="samples of the student over which their mean and covariance are averaged, the latest ones; 50000 for "
        "features of 2048 numbers",
    )
    trajectory_weight: Weight = Field(
        0.0,
        description="weight of the trajectory loss, which anchors the student to the teacher's trajectories",
    )
    noise_range: tuple[BelowOne, BelowOne] = Field(
        (0.02, 0.98),
        description="range of the cosine times of the noise that is added to samples and real images, drawn uniformly",
    )
    fake_lr: LearningRate | None = Field(
        None, description="learning rate of the fake score network, which does not fall; null: training.lr"
    )
    fake_updates: PositiveInt = Field(
        3, description="updates of the fake score network before each step of the student"
    )
    fake_warmup: Annotated[int, Field(ge=0)] = Field(
        0, description="further updates of the fake score network before the first step of the student"
    )
    heldout_samples: Annotated[int, Field(ge=2)] = Field(
        2000,
        description="samples whose Frechet distance from real images is measured every training.heldout_every steps and at each "
        "checkpoint, in the features of evaluation.feature_extractor; `best` names the checkpoint with the smallest. The other "
        "ranks wait for it",
    )
    patience: PositiveInt | None = Field(
        None,
        description="training ends after so many checkpoints in a row whose distance is not the smallest; null: at "
        "training.steps",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Distribution:
        low, high = self.noise_range
        if not 0.0 < low < high:
            raise ValueError(f"noise_range {[low, high]} must be [low, high] with 0 < low < high < 1")
        if self.matching_weight == self.adversarial_weight == self.frechet_weight == 0.0:
            raise ValueError(
                "matching_weight, adversarial_weight and frechet_weight are all 0: that is training.objective trajectories"
            )
        return self

    @property
    def needs_fake_score(self) -> bool:
        """Whether a second network learns the student's distribution."""
        return self.matching_weight > 0.0 or self.adversarial_weight > 0.0

    @property
    def needs_images(self) -> str | None:
        """The key by which real images are needed, None if they are not."""
        keys = ("adversarial_weight", "frechet_weight")
        return next((key for key in keys if getattr(self, key) > 0.0), None)


class Finish(Strict):
    """The second training of `run` and `demo`; keys of `training` that are not here are those of `training`."""

    enabled: bool = Field(
        True,
        description="whether `run` and `demo` finish the student: after its training and evaluation, it is trained by "
        "distribution matching as NAME-finished, and evaluated again",
    )
    steps: PositiveInt = Field(description="optimiser steps")
    batch_size: PositiveInt | None = Field(None, description="global batch size; null: training.batch_size")
    lr: LearningRate = Field(5e-5, description="learning rate after the warm-up")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="as training.warmup")
    lr_decay: Literal["cosine", "none"] = Field("cosine", description="as training.lr_decay")
    betas: Betas = Field((0.0, 0.99), description="as training.betas")
    ema_decay: BelowOne = Field(0.999, description="as training.ema_decay, a single one")
    checkpoint_every: PositiveInt = Field(100, description="as training.checkpoint_every")
    heldout_every: PositiveInt | None = Field(100, description="as training.heldout_every")
    picture_every: PositiveInt | None = Field(None, description="as training.picture_every")
    log_every: PositiveInt = Field(10, description="as training.log_every")
    distribution: Distribution = Field(default_factory=Distribution, description="as training.distribution")
    further_metrics: tuple[MetricName, ...] = Field(
        (),
        description="what is measured beside evaluation.metrics, before and after finishing: what a distance does not say",
    )


def in_terms_of_finish(mistake: str) -> str:
    """What is wrong in the training that `finish` makes, by the keys that are to be changed."""

    def named(key: re.Match[str]) -> str:
        return f"finish.{key[1]}" if key[1] in Finish.model_fields else key[0]

    told = re.sub(r"\btraining\.([a-z_]+)", named, mistake)
    return f"finish: in the training that it makes, {told}"
