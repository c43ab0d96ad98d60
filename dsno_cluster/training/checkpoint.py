"""Checkpoints of training, to resume from.

They are below `<run.dir>/students/<name>/resume/`, one folder per step; a folder that can be seen is
complete. It holds `state.json`, each rank's fragments (`fragments.py`), and the state of the objective if it has one. From
these any ZeRO stage on any number of ranks can continue.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dsno_cluster.config import Config, validate
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import sync
from dsno_cluster.model_folder import AboutModel, SettingChange, read_config_of, read_meta, step_name
from dsno_cluster.records import SparseRecord, first_mistake, record_bytes
from dsno_cluster.storage import FolderStorage, MissingObject
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.training.deepspeed_internals import (
    loss_scaler_state,
    optimizer_steps,
    set_loss_scaler_state,
    set_optimizer_steps,
)
from dsno_cluster.training.divergence import NormalDistances
from dsno_cluster.training.engine import EMA, Engines, ema_kind
from dsno_cluster.training.fragments import SavedFragments, load_tensors, write_fragments, write_tensors
from dsno_cluster.training.identity import (
    Inputs,
    RunIdentity,
    Settings,
    changed_settings,
    check_same_run,
    run_identity,
    settings_of,
)
from dsno_cluster.training.publish import Publisher
from dsno_cluster.training.ranks import Ranks

STATE = "state.json"
OBJECTIVE = "objective.safetensors"


class Best(BaseModel):
    """The checkpoint with the smallest held-out figure so far.

    The figure is the relative error at t=0 of a student that learns trajectories, and the distance from real
    images of one that learns by distribution matching. Older files call it `error`. `basis` is a hash of what it is measured
    of, which older files lack.
    """

    model_config = ConfigDict(frozen=True)
    step: int
    figure: float = Field(validation_alias=AliasChoices("figure", "error"))
    basis: str | None = None


class CompanionState(BaseModel):
    """The optimiser's steps and the loss scaling of a companion, as those of the student in `CheckpointState`."""

    model_config = ConfigDict(frozen=True)
    optimizer_steps: int
    loss_scaler: dict[str, float] = Field(default_factory=dict)


class CheckpointState(SparseRecord):
    """`state.json`, beside the fragments. Older files may lack everything from `loss_scaler` on."""

    schema_version: Literal[1] = 1
    identity: RunIdentity
    step: int
    zero_stage: int
    world_size: int
    precision: str
    accumulation: int | None = None  # micro-batches of a step; older files lack it
    optimizer_steps: int  # without those skipped after float16 overflows
    loss_scaler: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    best: Best | None = None
    divergence: NormalDistances | None = None
    settings: Settings | None = None
    changes: tuple[SettingChange, ...] = ()
    without_progress: int = 0
    ended: bool = False
    companions: dict[str, CompanionState] = Field(default_factory=dict)
    # if the companions' warm-up was interrupted: how many of its updates were made
    warmed: int | None = None

    def is_end(self, steps: int) -> bool:
        """Whether a training of so many steps is done: it has taken them all, or ended before."""
        return self.ended or self.step >= steps


@dataclass
class RunNotes:
    """A run's notes beside its tensors, updated step by step; `about` goes into its students' `meta.json`."""

    about: AboutModel
    identity: RunIdentity
    seconds: float = 0.0
    best: Best | None = None
    divergence: NormalDistances | None = None
    without_progress: int = 0  # checkpoints that were compared since the best
    ended: bool = False  # before its last step
    basis: str | None = None  # names, by a hash, what the compared figures are measured from
    warmed: int | None = None  # as in `CheckpointState`

    def judge_by(self, basis: str | None) -> bool:
        """Compare checkpoints by figures of this `basis` from now on; returns whether the best so far had another one.

        It is then forgotten: figures of different samples, features or images do not compare.
        """
        self.basis = basis
        differs = self.best is not None and None not in (basis, self.best.basis) and self.best.basis != basis
        if differs:
            self.best, self.without_progress = None, 0
        return differs

    def compare(self, step: int, figure: float | None) -> None:
        """Record the checkpoint of `step` as the best if it has the smallest held-out `figure`; None: not measured.

        One that is not finite is never the best.
        """
        if figure is None:
            return
        # an earlier version could take NaN for the best: any number is better
        smallest = self.best is None or not figure >= self.best.figure
        if smallest and math.isfinite(figure):
            self.best, self.without_progress = Best(step=step, figure=figure, basis=self.basis), 0
        elif self.best is not None:
            self.without_progress += 1


def resume_dir(config: Config) -> Path:
    return config.run_dir / config.student_prefix / "resume"


def newest_step(config: Config) -> int | None:
    """The step of the newest complete resume state, or None."""
    return max(_saved_steps(config), default=None)


def _saved_steps(config: Config) -> list[int]:
    """The steps of the complete resume states, ascending; other files and folders are ignored."""
    folder = resume_dir(config)
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d{9})", name)))


def save(
    engines: Engines,
    ema: EMA,
    objective_state: Mapping[str, Tensor],
    config: Config,
    ranks: Ranks,
    step: int,
    notes: RunNotes,
    students: dict[float, dict[str, Tensor]],
    publisher: Publisher | None,
) -> None:
    """Save the state of all ranks to resume from, and the averaged student; collective: every rank must call it.

    `students` are the whole averages by decay, on rank 0; if it is empty, no student is published. The checkpoint is written to
    a temporary folder, which rank 0 renames once all ranks have written. Raises WorkError on every rank if one of them could not
    write, or if the weights are no longer finite; the previous checkpoint is then intact.
    """
    folder = resume_dir(config)
    aside, before = folder / f".{step_name(step)}.tmp", newest_step(config)
    good = f"the checkpoint of step {before} is whole" if before is not None else "there is no checkpoint yet"
    averages = {ema_kind(decay): average for decay, average in ema.averages.items()}

    with _agreed(ranks, good):
        if ranks.rank == 0:
            for left in folder.glob(".step-*.tmp"):  # left by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            FolderStorage(aside).write("begun", b"")  # makes the folder, or raises the reason why not
    with _agreed(ranks, good):
        file = aside / f"rank-{ranks.rank:05d}.safetensors"
        write_fragments(file, engines.fragments(), averages)
        sync(file)
    with _agreed(ranks, good):
        if publisher is not None:  # rank 0
            bad = [
                name for weights in students.values() for name, t in weights.items() if not t.isfinite().all()
            ]
            if bad:
                raise WorkError(f"step {step}: the weights of {bad[0]} are not finite")
            # before the state becomes visible: a finished run always has its student
            reached = {"train_seconds": round(notes.seconds, 1), "step": step, "ended": notes.ended or None}
            about = notes.about.model_copy(update=reached)
            if students:
                best = notes.best is not None and notes.best.step == step
                publisher.publish(step, students, about, best=best)
            if objective_state:
                write_tensors(aside / OBJECTIVE, objective_state)
                sync(aside / OBJECTIVE)
            state = _state(engines, config, ranks, step, notes)
            FolderStorage(aside).write(STATE, record_bytes(state))
            (aside / "begun").unlink()
            final = folder / step_name(step)
            former = folder / f".{step_name(step)}.former.tmp"
            # a warm-up that is interrupted again saves step 0 again; only between these two renamings is there none
            if final.is_dir():
                final.rename(former)
            aside.rename(final)
            sync(folder)
            shutil.rmtree(former, ignore_errors=True)
            _drop_old(config, notes.best)


def _state(engines: Engines, config: Config, ranks: Ranks, step: int, notes: RunNotes) -> CheckpointState:
    return CheckpointState(
        identity=notes.identity,
        step=step,
        zero_stage=config.training.zero_stage,
        world_size=ranks.world_size,
        precision=config.training.precision,
        accumulation=config.training.micro_batches,
        optimizer_steps=optimizer_steps(engines.student),
        loss_scaler=loss_scaler_state(engines.student),
        seconds=notes.seconds,
        best=notes.best,
        divergence=notes.divergence,
        settings=settings_of(config),
        changes=notes.about.changes,
        without_progress=notes.without_progress,
        ended=notes.ended,
        warmed=notes.warmed,
        companions={
            name: CompanionState(
                optimizer_steps=optimizer_steps(engine), loss_scaler=loss_scaler_state(engine)
            )
            for name, engine in engines.companions.items()
        },
    )


@contextlib.contextmanager
def _agreed(ranks: Ranks, good: str) -> Iterator[None]:
    """The block must succeed on every rank; otherwise all raise WorkError, with the reason if it is known."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must not wait for this one)
        problem = error
    reasons: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(reasons, None if problem is None else _reason(problem))
    if problem is not None and not isinstance(problem, WorkError | OSError):
        raise problem
    known = [reason for reason in reasons if reason is not None]
    if known:
        raise WorkError(f"the checkpoint could not be saved: {known[0]}; {good}") from problem


def _reason(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _drop_old(config: Config, best: Best | None) -> None:
    """Delete all checkpoints except the newest ones and the best."""
    kept = {best.step} if best else set()
    for step in _saved_steps(config)[: -config.training.keep_checkpoints]:
        if step not in kept:
            shutil.rmtree(resume_dir(config) / step_name(step), ignore_errors=True)


def read_state(config: Config, step: int, inputs: Inputs) -> CheckpointState:
    """`state.json` of a checkpoint of a run that reads these inputs.

    Raises UserError unless it belongs to this run (`RunIdentity`), and WorkError if it cannot be read or understood.
    """
    folder = resume_dir(config) / step_name(step)
    file, before = folder / STATE, "to continue from the checkpoint before it"
    try:
        data = file.read_bytes()
        json.loads(data)
    except (OSError, ValueError) as error:
        raise WorkError(f"{file}: cannot be read ({error}); delete {folder} {before}") from error
    try:
        state = CheckpointState.model_validate_json(data)
    except ValidationError as problem:
        mistake = first_mistake(problem)
        if any(e["type"] == "extra_forbidden" or e["loc"] == ("schema_version",) for e in problem.errors()):
            raise WorkError(
                f"{file}: a newer dsno-cluster wrote it, and this version cannot continue it ({mistake})"
            ) from None
        # damaged, or a value that only a newer version knows
        raise WorkError(f"{file}: cannot be understood ({mistake}); move {folder} away {before}") from None
    check_same_run(folder, state.identity, run_identity(config, inputs), inputs.folders)
    return state


def is_end(config: Config, newest: int | None, inputs: Inputs) -> bool:
    """Whether the training is done at the step of its newest checkpoint. Raises as `read_state` does."""
    steps = config.training.steps
    return newest is not None and (newest >= steps or read_state(config, newest, inputs).is_end(steps))


def check_published(config: Config, inputs: Inputs) -> None:
    """Raises UserError if the storage holds students of another run under the config's name.

    Otherwise `latest` would name one of theirs until this run has come further, and the two would be mixed.
    """
    address = config.student_address
    try:
        published = read_meta(address, config.storage.endpoint_url)
    except (UserError, MissingObject):  # there is none, or the student that `latest` names was deleted
        return
    if published.run is not None:
        saved = validate(RunIdentity, published.run, f"{address}: its run")
        check_same_run(address, saved, run_identity(config, inputs), inputs.folders)


def check_finished_alike(config: Config, step: int) -> None:
    """Raises UserError if the run of this name finished at `step` with settings other than the config's."""
    address = config.student_address
    try:
        trained = read_config_of(address, config.storage.endpoint_url).get("training")
    except UserError:  # not uploaded yet
        return
    if trained is None:
        return
    try:
        before = Settings.model_validate(trained)
    except ValidationError as error:
        raise UserError(f"{address}: its config.yaml: training.{first_mistake(error)}") from None
    for change in changed_settings(step, before, settings_of(config)):
        raise UserError(
            f"{address}: finished at step {step} with {change.key} {change.before}, now it is {change.after}; a new run needs "
            "another name="
        )


def open_fragments(config: Config, step: int) -> SavedFragments:
    """The tensors of the checkpoint of `step`."""
    return SavedFragments(resume_dir(config) / step_name(step))


def load(
    engines: Engines,
    ema: EMA,
    objective_state: Mapping[str, Tensor],
    saved: SavedFragments,
    state: CheckpointState,
) -> None:
    """Load a checkpoint of any stage and number of ranks; the engines' models have their weights already."""
    if objective_state:
        load_tensors(saved.folder / OBJECTIVE, objective_state)
    saved.load(engines.fragments(replicas=True))
    ema.load(saved)
    _load_optimizer(engines.student, state)
    for name, engine in engines.companions.items():
        _load_optimizer(engine, state.companions[name])


def _load_optimizer(engine: Any, state: CheckpointState | CompanionState) -> None:
    set_optimizer_steps(engine, state.optimizer_steps)
    if state.loss_scaler:
        set_loss_scaler_state(engine, state.loss_scaler)


def begin_notes(
    student: DSNO, config: Config, inputs: Inputs, world_size: int, state: CheckpointState | None
) -> RunNotes:
    """The notes of a run that continues from `state`; its changes include the settings that change now."""
    identity = run_identity(config, inputs)
    about = AboutModel(
        model=student.describe(),
        name=config.name,
        seed=config.seed,
        ema_decay=config.training.ema_decays[0],
        trajectories=inputs.trajectories,
        run=identity.model_dump(mode="json"),
        world_size=world_size,
        precision=config.training.precision,
        accumulation=config.training.micro_batches,
        compiled=bool(config.training.compile),
        start=inputs.start,
        features=inputs.features,
    )
    if state is None:
        return RunNotes(about, identity)
    changed = changed_settings(state.step, state.settings, settings_of(config)) if state.settings else ()
    about = about.model_copy(update={"changes": state.changes + changed})
    return RunNotes(about, identity, state.seconds, state.best, state.divergence, state.without_progress)
