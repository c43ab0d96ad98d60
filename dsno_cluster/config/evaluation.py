"""Keys of the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsno_cluster.config.base import BelowOne, PositiveInt, Seed, Sha256Start, Strict
from dsno_cluster.config.paths import LocalPath, ReferencePath

MetricName = Literal["fid", "kid", "inception_score", "precision_recall", "agreement", "trajectory_error"]


class Evaluation(Strict):
    num_samples: int = Field(ge=2, description="images drawn from the student and, for each row, the teacher")
    batch_size: PositiveInt = Field(250, description="images at a time, and in a kept shard of samples")
    threads: PositiveInt = Field(1, description="CPU threads of an actor")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the student's network")
    compile: bool = Field(False, description="torch.compile the student's network")
    ema_decay: BelowOne | None = Field(
        None, description="which of the student's moving averages; default: the first of training.ema_decay"
    )
    seed: Seed = Field(
        1, description="seed of the evaluated noise; must differ from the seed of the trajectories"
    )
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = Field(
        ("fid", "trajectory_error"),
        description="`agreement`: how often the extractor sees the class asked for; "
        "`trajectory_error`: against the teacher, on held-out noise; the others as torch-fidelity has them",
    )
    feature_extractor: str = Field(
        "inception-v3-compat", description="one of torch-fidelity's, or digits-features"
    )
    weights_path: LocalPath | None = Field(
        None,
        description="weights of the extractor; package:NAME for one that ships; default: the published ones, downloaded once",
    )
    weights_sha256: Sha256Start | None = Field(
        None, description="sha256 that weights_path must have, or its first 8 digits or more"
    )
    precision_recall_extractor: str | None = Field(
        None,
        description="another extractor for precision_recall; torch-fidelity's own default is vgg16, ADM's is Inception",
    )
    precision_recall_weights_path: LocalPath | None = Field(
        None, description="as weights_path, for that extractor"
    )
    precision_recall_weights_sha256: Sha256Start | None = Field(
        None, description="as weights_sha256, for that extractor"
    )
    kid_subsets: PositiveInt = Field(100, description="random subsets that KID is averaged over")
    kid_subset_size: PositiveInt = Field(1000, description="images in each of them")
    inception_splits: PositiveInt = Field(10, description="parts that the Inception Score is averaged over")
    neighborhood: PositiveInt = Field(3, description="nearest neighbours of precision and recall")
    metric_seed: Seed = Field(2020, description="of KID's subsets and the Inception Score's parts")
    reference: ReferencePath = Field(
        description="the real data: 'data' for data.name, an .npz with mu and sigma (EDM, ADM, pytorch-fid), or images: "
        "a folder, sample shards, an .npz batch"
    )
    reference_count: PositiveInt | None = Field(
        None, description="how many images mu and sigma of an .npz are of; such files do not say"
    )
    reference_resolution: PositiveInt | None = Field(
        None, description="height of those images; default: that of the images in the same file, if any"
    )
    trajectory_samples: PositiveInt = Field(500, description="held-out noises for the trajectory error")
    teacher_steps: tuple[PositiveInt, ...] = Field(
        (1, 4, 8, 64), description="DDIM steps of the teacher's rows"
    )
    keep_samples: bool = Field(False, description="write the student's samples as shards under storage.root")
    best_metric: MetricName | None = Field(
        None, description="which `eval --watch` chooses the best checkpoint by; default: the first of metrics"
    )
    picture_columns: PositiveInt = Field(8, description="samples of each class in the pictures")

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluation:
        if self.keep_samples and self.num_samples % self.batch_size:
            raise ValueError(
                f"keep_samples writes shards of batch_size {self.batch_size}: num_samples {self.num_samples} must be a multiple"
            )
        if self.precision_recall_extractor is None:
            for key in ("precision_recall_weights_path", "precision_recall_weights_sha256"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} goes with precision_recall_extractor")
        if "kid" in self.metrics and self.kid_subset_size > self.num_samples:
            raise ValueError(
                f"kid_subset_size {self.kid_subset_size} is above num_samples {self.num_samples}"
            )
        if "inception_score" in self.metrics and self.inception_splits > self.num_samples:
            raise ValueError(
                f"inception_splits {self.inception_splits} is above num_samples {self.num_samples}"
            )
        if "precision_recall" in self.metrics and self.neighborhood >= self.num_samples:
            raise ValueError(f"neighborhood {self.neighborhood} must be below num_samples {self.num_samples}")
        if self.best_metric not in (None, *self.metrics):
            raise ValueError(
                f"best_metric {self.best_metric} is not among metrics: {', '.join(self.metrics)}"
            )
        return self

    @property
    def judged_by(self) -> MetricName:
        """The metric that the best checkpoint is chosen by."""
        return self.best_metric or self.metrics[0]
