"""The identity of a training run, and the settings that may change during it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dsno_cluster.config import Config, Network, StudentConfig, Training
from dsno_cluster.config.base import Strict
from dsno_cluster.config.finishing import Distribution
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import FeatureWeights, SettingChange, StartModel


@dataclass(frozen=True)
class Inputs:
    """What a training reads, by which it is known.

    `trajectories` is the folder of its data set, `other_folders` are those by which earlier versions know it. `start` is the
    student that it begins with; `teacher` and `images` are hashes of the teacher and of the real images that distribution
    matching uses, and `features` names the extractor of the Frechet loss and the sha256 of its weights.
    """

    trajectories: str
    other_folders: tuple[str, ...] = ()
    start: StartModel | None = None
    teacher: str | None = None
    images: str | None = None
    features: FeatureWeights | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.trajectories, *self.other_folders)


class Matched(Strict):
    """What identifies a training by distribution matching, beside what identifies every training."""

    settings: Distribution
    teacher: str
    images: str | None
    features: FeatureWeights | None = None


class RunIdentity(Strict):
    """The values that identify a run: if one differs, its checkpoints must not be continued.

    Saved identities are validated before they are compared, so a key may be added here or to a part, with a
    default that means what earlier runs did, without changing their identity.
    """

    network: Network
    student: StudentConfig
    trajectories: str
    num_samples: int
    seed: int
    batch_size: int
    order: tuple[str, int]  # reader.shuffle and reader.window_shards
    loss: str
    time_weighting: str
    drawn: tuple[float, int] | None = None  # training.end_share and training.most_points if points are drawn
    optimizer: str
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: tuple[float, ...]
    objective: str = "trajectories"
    start: str | None = None  # sha256 of the weights of the student that it begins with
    matched: Matched | None = None  # if the objective is distribution


def run_identity(config: Config, inputs: Inputs) -> RunIdentity:
    """The identity of a run of this config that reads these inputs."""
    settings, reader = config.training, config.reader
    return RunIdentity(
        network=config.network,
        student=config.student,
        trajectories=inputs.trajectories,
        num_samples=config.trajectories.num_samples,
        seed=config.training_seed,
        batch_size=settings.batch_size,
        order=(reader.shuffle, reader.window_shards),
        loss=settings.loss,
        time_weighting=settings.time_weighting,
        drawn=(settings.end_share, settings.most_points) if config.student.points == "drawn" else None,
        optimizer=settings.optimizer,
        betas=settings.betas,
        ema_decay=settings.ema_decays,
        objective=settings.objective,
        start=None if inputs.start is None else inputs.start.sha256,
        matched=_matched(settings, inputs),
    )


def _matched(settings: Training, inputs: Inputs) -> Matched | None:
    if settings.objective != "distribution":
        return None
    # these may change during a run: they decide only what is measured, and when it ends
    usual = {name: Distribution.model_fields[name].default for name in ("heldout_samples", "patience")}
    settled = settings.distribution.model_copy(update=usual)
    return Matched(
        settings=settled, teacher=inputs.teacher or "", images=inputs.images, features=inputs.features
    )


def check_same_run(where: Path | str, saved: RunIdentity, now: RunIdentity, folders: Sequence[str]) -> None:
    """Raises UserError, naming the first field in which the run saved at `where` differs.

    `folders` are those by which the data set is known: an earlier version may have named it another way.
    """
    if saved.trajectories in folders:
        saved = saved.model_copy(update={"trajectories": now.trajectories})
    for key in RunIdentity.model_fields:
        if getattr(saved, key) != getattr(now, key):
            before, after = (run.model_dump(mode="json")[key] for run in (saved, now))
            raise UserError(
                f"{where}: was saved with {key} {before}, now it is {after}; "
                "go back to that, or start a new run with name=..."
            )


class Settings(BaseModel):
    """Keys of `training` that may change during a run, but not after it has finished.

    The defaults are the values of runs whose file lacks the key.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    lr: float
    warmup: int = 0
    lr_decay: str = "cosine"
    halve_at: tuple[int, ...] = ()
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    precision: str = "float32"
    ema_ramp: bool = True


def settings_of(config: Config) -> Settings:
    return Settings.model_validate(config.training.model_dump())


def changed_settings(step: int, before: Settings, now: Settings) -> tuple[SettingChange, ...]:
    """The settings that differ from those of the checkpoint of `step`; `auto` is what each run made of it."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return tuple(
        SettingChange(step=step, key=f"training.{key}", before=old[key], after=new[key])
        for key in Settings.model_fields
        if old[key] != new[key] and "auto" not in (old[key], new[key])
    )
