"""The identity of a training run, and the settings that may change during it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dsno_cluster.config import Config, Network, StudentConfig
from dsno_cluster.config.base import Strict
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import SettingChange


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
    ema_decay: tuple[float, ...]


def run_identity(config: Config, trajectories: str) -> RunIdentity:
    settings, reader = config.training, config.reader
    return RunIdentity(
        network=config.network,
        student=config.student,
        trajectories=trajectories,
        num_samples=config.trajectories.num_samples,
        seed=config.seed,
        batch_size=settings.batch_size,
        order=(reader.shuffle, reader.window_shards),
        loss=settings.loss,
        time_weighting=settings.time_weighting,
        drawn=(settings.end_share, settings.most_points) if config.student.points == "drawn" else None,
        optimizer=settings.optimizer,
        ema_decay=settings.ema_decays,
    )


def check_same_run(
    where: Path | str, saved: RunIdentity, now: RunIdentity, trajectories: Sequence[str]
) -> None:
    """Raises UserError, naming the first field in which the run saved at `where` differs.

    `trajectories` are the folders by which the data set is known: an earlier version may have named it another way.
    """
    if saved.trajectories in trajectories:
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
