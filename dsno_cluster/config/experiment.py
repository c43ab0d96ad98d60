"""The config of an experiment, and the rules between its groups of keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dsno_cluster.config.base import Seed, Strict
from dsno_cluster.config.evaluation import Evaluation
from dsno_cluster.config.finishing import Finish, in_terms_of_finish
from dsno_cluster.config.networks import Network, StudentConfig, TeacherConfig, too_many_modes
from dsno_cluster.config.paths import ImagesPath, LocalPath
from dsno_cluster.config.places import RunConfig, StorageConfig
from dsno_cluster.config.training import TeacherTraining, Training
from dsno_cluster.config.trajectories import Reader, Trajectories
from dsno_cluster.files import too_long
from dsno_cluster.records import first_mistake

# feature extractors that name a class of each image
CLASSIFIERS = ("digits-features", "mnist-features")
FINISHED = "-finished"  # the end of the name of a student that `finish` makes
# folders beside those of the experiments in evaluation/
TAKEN_NAMES = {"teachers": "the teachers' measured rows", "references": "statistics of real images"}


def _run_name(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        proposed = re.sub("[^A-Za-z0-9_.]+", "-", name).strip("-_.") or "run-1"
        raise ValueError(
            f"{name!r} cannot name folders: only A-Z, a-z, 0-9, '.', '_' and '-', and first a letter or digit; "
            f"try name={proposed}"
        )
    if problem := too_long(name):
        raise ValueError(problem)
    return name


class DataConfig(Strict):
    name: Literal["digits", "mnist"] | None = Field(
        None,
        description="the real images, for `train-teacher` and as the reference of the evaluation: scikit-learn's digits of 8x8, "
        "MNIST at 32x32; null: none, or those of data.images",
    )
    path: LocalPath | None = Field(
        None,
        description="for mnist: the folder with torchvision's files (MNIST/raw/ below it), or Keras's mnist.npz; null: they are "
        "downloaded once, to ~/.cache/dsno-cluster/data",
    )

    images: ImagesPath | None = Field(
        None,
        description="real images of one's own, in place of data.name: a folder of pictures, an .npz, or WebDataset .tar shards "
        "(a folder of them, or a name with `*` and `{000..146}`); on a disk or s3://; see docs/training.md",
    )

    @property
    def named(self) -> bool:
        """Whether there are real images."""
        return self.name is not None or self.images is not None

    @model_validator(mode="after")
    def _fits_together(self) -> DataConfig:
        if self.images is not None and self.name is not None:
            raise ValueError(f"images takes the place of name={self.name}; set one of the two to null")
        if self.path is not None and self.name != "mnist":
            raise ValueError("path is for name=mnist; the other images are not made of files")
        return self


class Config(Strict):
    """One experiment."""

    name: Annotated[str, AfterValidator(_run_name)] = Field(
        description="names the student and its folders: letters, digits, `.`, `_` and `-`; default: the stem of the config's "
        "file, with `-` for spaces"
    )
    seed: Seed = Field(0, description="determines the noise and labels of the trajectories, and training")
    storage: StorageConfig = Field(default_factory=StorageConfig)
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    network: Network
    teacher: TeacherConfig = TeacherConfig()
    teacher_training: TeacherTraining = TeacherTraining()
    trajectories: Trajectories
    reader: Reader = Reader()
    student: StudentConfig = StudentConfig()
    training: Training
    finish: Finish | None = Field(
        None, description="how `run` and `demo` finish the student; null: they do not"
    )
    evaluation: Evaluation

    @property
    def run_dir(self) -> Path:
        if self.run.dir is not None:
            return Path(self.run.dir)
        return Path("runs") / self.name if "://" in self.storage.root else Path(self.storage.root)

    @property
    def training_seed(self) -> int:
        """The seed of what training draws."""
        return self.seed if self.training.seed is None else self.training.seed

    @property
    def student_prefix(self) -> str:
        """The prefix of its students below the storage root."""
        return f"students/{self.name}/"

    @property
    def student_address(self) -> str:
        """The folder or S3 address of its students, as `load_student` takes it."""
        return f"{self.storage.root.rstrip('/')}/{self.student_prefix.rstrip('/')}"

    @property
    def finished(self) -> Config | None:
        """The experiment that finishes this one's student, if its `finish` is enabled."""
        finish = self.finish
        if finish is None or not finish.enabled:
            return None
        training = self.training.model_copy(
            update={
                "objective": "distribution",
                "start": self.student_address,
                "distribution": finish.distribution,
                "steps": finish.steps,
                "batch_size": finish.batch_size or self.training.batch_size,
                "lr": finish.lr,
                "warmup": finish.warmup,
                "lr_decay": finish.lr_decay,
                "halve_at": (),
                "betas": finish.betas,
                "ema_decay": finish.ema_decay,
                "checkpoint_every": finish.checkpoint_every,
                "heldout_every": finish.heldout_every,
                "picture_every": finish.picture_every,
                "log_every": finish.log_every,
            }
        )
        return self.model_copy(
            update={
                "name": f"{self.name}{FINISHED}",
                "run": RunConfig(dir=str(self.run_dir)),
                "training": training,
                "finish": None,
                # it has one average only
                "evaluation": self.evaluation.model_copy(update={"ema_decay": None}),
            }
        )

    @property
    def needs_trajectories(self) -> bool:
        """Whether training needs trajectories: to learn from or, without real images, to judge its checkpoints by their ends."""
        settings = self.training
        judged = settings.heldout_every is not None and not self.data.named
        return settings.reads_trajectories or (judged and not settings.online)

    @property
    def generates_trajectories(self) -> bool:
        """Whether `gen-trajectories` makes what training needs: not if it makes them itself, or others were imported."""
        elsewhere = self.training.online or self.trajectories.imported is not None
        return self.needs_trajectories and not elsewhere

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        points = self.trajectories.num_points
        student = self.student
        if student.backbone == "unet" and self.network.missing_sizes:
            missing = ", ".join(f"network.{name}" for name in self.network.missing_sizes)
            raise ValueError(f"{missing} left out: student.backbone=unet needs the sizes of its U-Net")
        if problem := too_many_modes(student.operator, student.modes, points):
            raise ValueError(f"student.{problem}")
        if student.points == "drawn" and student.modes > 0 and self.training.most_points == 1:
            raise ValueError(
                "training.most_points 1: temporal convolutions mix points, so student.points=drawn needs 2 or more; "
                "or take student.modes=0"
            )
        if self.training.most_points > points:
            raise ValueError(
                f"training.most_points {self.training.most_points} is above M={points} time points"
            )
        if self.evaluation.seed == self.seed:
            raise ValueError(
                f"evaluation.seed {self.seed} equals seed: the student would be judged on its training noise"
            )
        if "agreement" in self.evaluation.metrics and self.evaluation.feature_extractor not in CLASSIFIERS:
            raise ValueError(
                f"evaluation.metrics: agreement needs evaluation.feature_extractor {' or '.join(CLASSIFIERS)}"
            )
        if self.name in TAKEN_NAMES:
            raise ValueError(
                f"name {self.name} is taken: {TAKEN_NAMES[self.name]} are kept in evaluation/{self.name}/"
            )
        self._check_guidance()
        self._check_finishing()
        online = self.training.online and self.training.reads_trajectories
        if online and self.trajectories.imported is not None:
            raise ValueError(
                "training.online makes trajectories: set it to false, or trajectories.imported to null"
            )
        if online and self.reader.shuffle != "none":
            raise ValueError("training.online reads samples in the order of making: set reader.shuffle=none")
        ahead = (self.reader.prefetch_batches + 2) * self.training.batch_size
        # half of them are made at the same time
        shards = 2 * (-(-ahead // self.trajectories.samples_per_shard) + 1)
        if online and self.training.online_staged_shards < shards:
            raise ValueError(
                f"training.online_staged_shards {self.training.online_staged_shards}: reading ahead needs {shards} of them"
            )
        if self.training.loss == "lpips" and (
            self.network.state_channels != 3 or min(self.network.sides) < 16
        ):
            raise ValueError("training.loss lpips needs colour images of 16x16 or more")
        if self.evaluation.reference == "data" and not self.data.named:
            raise ValueError("evaluation.reference data needs data.name or data.images")
        return self

    def _check_finishing(self) -> None:
        """Raises ValueError for a distribution matching that lacks what it needs."""
        matched: dict[str, Training | Finish] = {}
        if self.training.objective == "distribution":
            matched["training"] = self.training
        if self.finish is not None and self.finish.enabled:
            matched["finish"] = self.finish
            if self.training.objective == "distribution":
                raise ValueError(
                    "training.objective distribution finishes a student already: set finish.enabled=false, or "
                    "training.objective=trajectories"
                )
            added = [name for name in self.finish.further_metrics if name not in self.evaluation.metrics]
            if self.evaluation.protocol is not None and added:
                raise ValueError(
                    f"finish.further_metrics adds {', '.join(added)} to what protocol {self.evaluation.protocol} measures: set "
                    "finish.further_metrics=[], or leave the protocol out"
                )
        for section, settings in matched.items():
            if settings.distribution.patience is not None and settings.heldout_every is None:
                raise ValueError(
                    f"{section}.distribution.patience counts measurements of held-out noise: set {section}.heldout_every, or "
                    "set it to null"
                )
            key = settings.distribution.needs_images
            if key is not None and not self.data.named:
                raise ValueError(
                    f"{section}.distribution.{key} needs real images: set data.name or data.images, or set it to 0"
                )
        if (finished := self.finished) is not None:
            self._check_finished(finished)

    def _check_finished(self, finished: Config) -> None:
        """Raises ValueError if the experiment that finishes the student breaks a rule between keys, as only it may do."""
        taken, asked = self.training.ema_decays[0], self.evaluation.ema_decay
        if asked is not None and asked != taken:
            raise ValueError(
                f"evaluation.ema_decay {asked:g}: finish begins with the first of training.ema_decay, {taken:g}, and is compared "
                "with that; set evaluation.ema_decay to null, or name that average first"
            )
        try:
            Config.model_validate_json(finished.model_dump_json())
        except ValidationError as error:
            raise ValueError(in_terms_of_finish(first_mistake(error))) from None

    def _check_guidance(self) -> None:
        """Raises ValueError for guidance that has nothing to guide by, and for a guide that nothing uses."""
        settings, guide = self.trajectories, self.teacher.guide
        if settings.guidance_scale != 1.0 and guide is None and not self.network.null_class:
            raise ValueError(
                "trajectories.guidance_scale other than 1 needs a teacher with network.null_class, or teacher.guide"
            )
        if settings.guidance_scale == 1.0 and guide is not None:
            raise ValueError(
                "teacher.guide has no effect with trajectories.guidance_scale 1; set the scale, or leave the guide out"
            )
        channels = settings.guidance_channels
        if channels is not None and channels >= self.network.state_channels:
            raise ValueError(
                f"trajectories.guidance_channels {channels} must be below network.state_channels "
                f"{self.network.state_channels}; null guides all of them"
            )
