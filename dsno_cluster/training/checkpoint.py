"""Checkpoints of training, to resume from.

They lie below `<run.dir>/students/<name>/resume/`, one folder a step; a folder that can be seen is complete. It holds
each rank's fragments (`state.py`), so any ZeRO stage on any number of ranks goes on from it, and `state.json`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import locked, sync
from dsno_cluster.model_folder import read_config_of, read_meta, step_name
from dsno_cluster.storage import FolderStorage
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.training.engine import EMA, Ranks, ema_kind
from dsno_cluster.training.publish import Publisher
from dsno_cluster.training.state import (
    SavedFragments,
    fragments_of,
    loss_scaler_state,
    optimizer_steps,
    set_loss_scaler_state,
    set_optimizer_steps,
    write_fragments,
)

STATE = "state.json"
# what may be changed while a run goes on, but makes another student of one that has finished
DECIDE_WEIGHTS = (
    "lr",
    "warmup",
    "lr_decay",
    "halve_at",
    "weight_decay",
    "gradient_clip",
    "precision",
    "ema_ramp",
)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what a file system without locks says


@dataclass
class Record:
    """What a run has to say of itself beside its tensors: `meta.json` of its students, seconds used, and its best."""

    meta: dict[str, Any]
    seconds: float = 0.0
    best: dict[str, Any] | None = None  # the step and held-out error of the best checkpoint
    divergence: dict[str, Any] | None = None  # what distances are normal, as `DivergenceWatch` has it


def resume_dir(config: Config) -> Path:
    return config.run_dir / config.student_prefix / "resume"


@contextlib.contextmanager
def only_run(config: Config) -> Iterator[None]:
    """Hold the run's folder for this process. Raises WorkError where another training has it.

    A job's processes may outlive the command that started them; two of them would overwrite each other.
    """
    folder = resume_dir(config)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            raise WorkError(
                f"{folder}: another training writes there now; wait for it, end it, or choose another name="
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise WorkError(f"{error.filename or folder}: {error.strerror}") from error
        yield


def newest_step(config: Config) -> int | None:
    """The step of the newest complete resume state, or None."""
    folder = resume_dir(config)
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    steps = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))]
    return max(steps, default=None)


def save(
    engine: Any,
    ema: EMA,
    config: Config,
    ranks: Ranks,
    step: int,
    record: Record,
    students: dict[float, dict[str, Tensor]],
    publisher: Publisher | None,
) -> None:
    """Save the state of all ranks to resume from, and the averaged student; collective: every rank must call it.

    `students` are the whole averages by decay, on rank 0. Written aside, then renamed by rank 0 once all ranks have
    written. Raises WorkError on every rank where one of them could not write, or where the weights are no longer finite;
    the checkpoint before is then whole.
    """
    folder = resume_dir(config)
    aside, before = folder / f".{step_name(step)}.tmp", newest_step(config)
    good = f"the checkpoint of step {before} is whole" if before else "there is no checkpoint yet"
    averages = {ema_kind(decay): average for decay, average in ema.averages.items()}

    with _agreed(ranks, good):
        if ranks.rank == 0:
            for left in folder.glob(".step-*.tmp"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            FolderStorage(aside).write("begun", b"")  # makes the folder, or says why it cannot be made
    with _agreed(ranks, good):
        file = aside / f"rank-{ranks.rank:05d}.safetensors"
        write_fragments(file, ema.fragments, averages)
        sync(file)
    with _agreed(ranks, good):
        if publisher is not None:  # rank 0
            bad = [
                name for weights in students.values() for name, t in weights.items() if not t.isfinite().all()
            ]
            if bad:
                raise WorkError(f"step {step}: the weights of {bad[0]} are not finite")
            # before the state can be seen: a run that is finished has its student
            meta = {**record.meta, "train_seconds": round(record.seconds, 1)}
            publisher.publish(step, students, meta, best=bool(record.best and record.best["step"] == step))
            state = {
                "identity": run_identity(config, record.meta["trajectories"]),
                "step": step,
                "zero_stage": config.training.zero_stage,
                "world_size": ranks.world_size,
                "precision": config.training.precision,
                "optimizer_steps": optimizer_steps(engine),
                "loss_scaler": loss_scaler_state(engine),
                "seconds": record.seconds,
                "best": record.best,
                "divergence": record.divergence,
                "settings": _deciding(config),
                "changes": record.meta.get("changes", []),
            }
            FolderStorage(aside).write(STATE, json.dumps(state).encode())
            (aside / "begun").unlink()
            final = folder / step_name(step)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            sync(folder)
            _drop_old(config, record.best)


@contextlib.contextmanager
def _agreed(ranks: Ranks, good: str) -> Iterator[None]:
    """What is done within must succeed on every rank; else WorkError on all, with the reason where it is known."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must not wait for this one)
        problem = error
    reasons: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(reasons, None if problem is None else _reason(problem))
    if problem is not None and not isinstance(problem, WorkError | OSError):
        raise problem
    told = [reason for reason in reasons if reason is not None]
    if told:
        raise WorkError(f"the checkpoint could not be saved: {told[0]}; {good}") from problem


def _reason(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _drop_old(config: Config, best: dict[str, Any] | None) -> None:
    """Delete all but the newest checkpoints and the best one."""
    folder = resume_dir(config)
    kept = {step_name(best["step"])} if best else set()
    for old in sorted(folder.glob("step-*"))[: -config.training.keep_checkpoints]:
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)


def read_state(config: Config, step: int, trajectories: str) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises UserError unless it is of this very run (`run_identity`)."""
    folder = resume_dir(config) / step_name(step)
    try:
        state = json.loads((folder / STATE).read_bytes())
        saved = state["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkError(
            f"{folder / STATE}: cannot be read ({error}); delete {folder} to go on from the checkpoint before it"
        ) from error
    _check_same_run(folder, saved, run_identity(config, trajectories))
    return dict(state)


def check_published(config: Config, trajectories: str) -> None:
    """Raises UserError where the storage holds students of another run under the config's name.

    `latest` would go on naming one of theirs until this run has come further, and the two would be mixed.
    """
    address = config.student_address
    try:
        published = read_meta(address, config.storage.endpoint_url)
    except UserError:  # there is none
        return
    if "run" in published:
        _check_same_run(address, published["run"], run_identity(config, trajectories))


def check_finished_alike(config: Config, step: int) -> None:
    """Raises UserError where the run of that name finished at `step` with other settings than the config has now."""
    address = config.student_address
    try:
        trained = read_config_of(address, config.storage.endpoint_url).get("training") or {}
    except UserError:  # not uploaded yet
        return
    for key, value in _deciding(config).items():
        if key in trained and trained[key] != value:
            raise UserError(
                f"{address}: finished at step {step} with training.{key} {trained[key]}, now it is {value}; a new run needs "
                "another name="
            )


def changed_settings(config: Config, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that decide the weights and are others now than in the checkpoint `state`: step, key, before, after."""
    before = state.get("settings", {})
    return [
        {"step": state["step"], "key": f"training.{key}", "before": before[key], "after": value}
        for key, value in _deciding(config).items()
        if key in before and before[key] != value
    ]


def _deciding(config: Config) -> dict[str, Any]:
    return config.training.model_dump(mode="json", include=set(DECIDE_WEIGHTS))


def _check_same_run(where: Path | str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if saved.get(key) != value:
            raise UserError(
                f"{where}: was saved with {key} {saved.get(key)}, now it is {value}; "
                "go back to that, or start a new run with name=..."
            )


def open_fragments(config: Config, step: int) -> SavedFragments:
    """The tensors of the checkpoint of `step`."""
    return SavedFragments(resume_dir(config) / step_name(step))


def load(engine: Any, ema: EMA, saved: SavedFragments, state: dict[str, Any]) -> None:
    """Take up a checkpoint, whatever stage and number of ranks saved it; the engine's model has its weights already."""
    saved.load(fragments_of(engine, replicas=True))
    ema.load(saved)
    set_optimizer_steps(engine, state["optimizer_steps"])
    if state["loss_scaler"]:
        set_loss_scaler_state(engine, state["loss_scaler"])


def run_identity(config: Config, trajectories: str) -> dict[str, Any]:
    """What makes it another run, whose checkpoints must not be continued, if it differs."""
    drawn = [config.training.end_share, config.training.most_points]
    return {
        "network": config.network.model_dump(mode="json"),
        "student": config.student.model_dump(mode="json"),
        "trajectories": trajectories,
        "num_samples": config.trajectories.num_samples,
        "seed": config.seed,
        "batch_size": config.training.batch_size,
        "order": [config.reader.shuffle, config.reader.window_shards],
        "loss": config.training.loss,
        "time_weighting": config.training.time_weighting,
        "drawn": drawn if config.student.points == "drawn" else None,
        "optimizer": config.training.optimizer,
        "ema_decay": list(config.training.ema_decays),
    }


def student_meta(student: DSNO, config: Config, trajectories: str, world_size: int) -> dict[str, Any]:
    """What `meta.json` says of a student, but for the step, the weights' hash and the versions."""
    return {
        "model": student.describe(),
        "name": config.name,
        "seed": config.seed,
        "ema_decay": config.training.ema_decays[0],
        "trajectories": trajectories,
        "run": run_identity(config, trajectories),
        "world_size": world_size,
    }
