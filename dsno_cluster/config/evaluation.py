"""Config keys of the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsno_cluster.config.base import BelowOne, Named, PositiveInt, Seed, Sha256Start, later
from dsno_cluster.config.paths import LocalPath, ReferencePath
from dsno_cluster.config.protocols import INCEPTION, ProtocolName, contradiction

MetricName = Literal[
    "fid",
    "sfid",
    "kid",
    "cmmd",
    "inception_score",
    "precision_recall",
    "nearest",
    "agreement",
    "trajectory_error",
]


class Evaluation(Named):
    num_samples: int = Field(
        ge=2, description="images drawn from the student, and from the teacher for each of its rows"
    )
    protocol: ProtocolName | None = later(
        None,
        description="a paper's: sets the keys that belong together, and refuses a config that contradicts them "
        "(docs/evaluation.md)",
    )
    draws: PositiveInt = later(
        1,
        description="how many times num_samples are drawn, one after the other; FID is the minimum, as EDM's",
    )
    batch_size: PositiveInt = Field(
        250, description="images that an actor draws at the same time, and images in a kept shard of samples"
    )
    threads: PositiveInt = Field(1, description="CPU threads of each actor")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of the student's network, and of the decoder of latents"
    )
    compile: bool | Literal["auto"] = Field(
        False,
        description="whether the student's network is compiled with torch.compile, for whole batches; auto: on a GPU",
    )
    ema_decay: BelowOne | None = Field(
        None,
        description="which of the student's moving averages is evaluated; null: the first of training.ema_decay",
    )
    seed: Seed = Field(
        1,
        description="seed of the noise on which the student is evaluated; must differ from `seed`, that of the trajectories",
    )
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)] = Field(
        ("fid", "trajectory_error"),
        description="what is measured; `nearest`: how far samples are from the nearest training image, and how many are "
        "copies; `agreement`: how often the extractor sees the class asked for; "
        "`trajectory_error`: against the teacher, on held-out noise; `sfid`: ADM's; `cmmd`: by a Gaussian kernel; "
        "the others are torch-fidelity's",
    )
    feature_extractor: str = Field(
        INCEPTION,
        description="one of torch-fidelity's extractors, or inception-v3-clean, dinov2, clip, digits-features or mnist-features",
    )
    weights_path: LocalPath | None = Field(
        None,
        description="file with the extractor's weights; package:NAME for one that ships with the package; null: the "
        "published weights, "
        "downloaded once",
    )
    weights_sha256: Sha256Start | None = Field(
        None, description="sha256 that weights_path must have, or its first 8 digits or more"
    )
    precision_recall_extractor: str | None = Field(
        None,
        description="another extractor for precision_recall; torch-fidelity's own default is vgg16, ADM's is Inception; "
        "null: the same",
    )
    precision_recall_weights_path: LocalPath | None = Field(
        None, description="like weights_path, for that extractor"
    )
    precision_recall_weights_sha256: Sha256Start | None = Field(
        None, description="like weights_sha256, for that extractor"
    )
    kid_subsets: PositiveInt = Field(100, description="random subsets over which KID is averaged")
    kid_subset_size: PositiveInt = Field(1000, description="images in each of these subsets")
    inception_splits: PositiveInt = Field(10, description="parts over which the Inception Score is averaged")
    inception_shuffle: bool = later(
        True,
        description="whether these parts are of shuffled samples, as torch-fidelity's; false: as ADM's, of samples in order",
    )
    neighborhood: PositiveInt = Field(3, description="nearest neighbours that precision and recall look at")
    neighborhood_precision: Literal["float32", "float16"] = later(
        "float32",
        description="rounding of the distances that precision and recall compare; float16: as ADM's evaluator",
    )
    metric_seed: Seed = Field(2020, description="determines KID's subsets and the Inception Score's parts")
    reference: ReferencePath = Field(
        description="the real data: 'data' for that of data.name or data.images, an .npz with mu and sigma (EDM, ADM, "
        "pytorch-fid), or images: a folder, sample shards, an .npz batch"
    )
    reference_count: PositiveInt | None = Field(
        None,
        description="number of images from which mu and sigma of an .npz are computed; such files do not say",
    )
    reference_resolution: PositiveInt | None = Field(
        None,
        description="height of those images; null: that of the images in the same file, if there are any",
    )
    reference_extractor: str | None = later(
        None,
        description="feature extractor by which mu and sigma of an .npz were made, if feature_extractor is inception-v3-clean, "
        "dinov2 or clip; such files do not say",
    )
    trajectory_samples: PositiveInt = Field(
        500, description="number of held-out noises for the trajectory error"
    )
    teacher_steps: tuple[PositiveInt, ...] = Field(
        (1, 4, 8, 64), description="numbers of DDIM steps of the teacher, one for each of its rows"
    )
    keep_samples: bool = Field(
        False, description="whether the student's samples are kept, as shards below storage.root"
    )
    best_metric: MetricName | None = Field(
        None,
        description="metric by which `eval --watch` chooses the best checkpoint; null: the first of `metrics`",
    )
    picture_columns: PositiveInt = Field(8, description="number of samples of each class in the pictures")

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluation:
        if self.protocol is not None and (problem := contradiction(self.protocol, dict(self))):
            raise ValueError(problem)
        if self.draws > 1 and {*self.metrics} - {"trajectory_error"} != {"fid"}:
            raise ValueError(f"draws {self.draws} goes with metrics [fid], whose minimum is taken")
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
    def drawn(self) -> int:
        """How many images are drawn from the student, and for each of the teacher's rows."""
        return self.num_samples * self.draws

    @property
    def judged_by(self) -> MetricName:
        """The metric by which the best checkpoint is chosen."""
        return self.best_metric or self.metrics[0]
