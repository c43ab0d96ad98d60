"""The run folder: plain files that describe a submitted stage and each attempt at it.

    <run.dir>/jobs/<name>-<stage>-<date>-<time>/
      run.json        what was submitted, by which command, as which job, with which code
      config.yaml     the experiment that the job runs, its paths absolute        profile.yaml   where it runs
      script.sh       the script given to sbatch        batch.log      what the batch script itself printed
      code/           the package as it was at submission, which is what the job runs
      submitit/       submitit's pickles
      attempts/0/     the first attempt; a requeued job makes 1, 2, ...
        begin.json  progress.json  result.json  failure-<rank>.json  stopped.json  outcome.json  task-<rank>.log
      array/0/        in place of attempts/ and batch.log: the first task of an array, itself like a run folder

`records.py` has the models of the JSON files. A link to each run folder is kept below the user's state
folder, so that `status`, `logs` and `cancel` find it from any terminal. If there is none, they take the folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsno_cluster import console
from dsno_cluster.cluster.records import (
    AnyNote,
    AttemptProgress,
    AttemptRecord,
    Begin,
    Failure,
    Outcome,
    RunRecord,
    Stopped,
    read_note,
    write_note,
)
from dsno_cluster.cluster.slurm_commands import user_name
from dsno_cluster.cluster.stage import Submission
from dsno_cluster.config import (
    Config,
    Profile,
    dump_config,
    dump_profile,
    is_config_file,
    load_config,
    load_dumped_config,
    load_resolved_profile,
)
from dsno_cluster.errors import LOST_RANK, UserError, WorkError
from dsno_cluster.provenance import code_version
from dsno_cluster.records import record_bytes

# files of a run folder, besides its records
BATCH_LOG, CONFIG, PROFILE, ARRAY = "batch.log", "config.yaml", "profile.yaml", "array"
# notes of an attempt's end for which its beginning keeps room on the disk, and how many bytes each
LAST_NOTES, ROOM = ("result.json", "stopped.json", "failure-0.json", "outcome.json"), 4096


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name if self.whole == self else f"{self.whole.id}, task {self.folder.name}"

    @property
    def word(self) -> str:
        """What stands for it in a shell command: its id if commands find it by that, else its folder."""
        return self.id if self.is_linked else shlex.quote(str(self.folder))

    @property
    def is_linked(self) -> bool:
        """Whether the link of its id leads to it."""
        return (index() / self.id).resolve() == self.folder.resolve()

    def record(self) -> RunRecord:
        """What was submitted."""
        return read_note(RunRecord, self.folder) or RunRecord.model_validate({})

    @property
    def is_ray_stage(self) -> bool:
        """Whether its first task drives actors, so that it can continue if another node is lost.

        A training cannot.
        """
        return self.record().kind == "ray"

    @property
    def owner(self) -> str:
        """The user who owns the folder and the job."""
        return user_name(self.folder.stat().st_uid)

    @property
    def job(self) -> str | None:
        """Its job or array; in a chain the job of the newest attempt, or the one that continues it."""
        record, attempts = self.record(), self.attempts()
        if not attempts or not record.successors:
            return record.job
        jobs, outcome = record.jobs, attempts[-1].read(Outcome)
        continued = outcome is not None and outcome.state == "again"
        return jobs[min(attempts[-1].number + continued, len(jobs) - 1)]

    def note(self, **values: str | float | Sequence[str] | None) -> None:
        """Change values of its record."""
        write_note(RunRecord.model_validate(self.record().model_dump() | values), self.folder)

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The experiment, with `overrides`.

        Relative paths are relative to the folder from which it was submitted.
        """
        # only overrides and older run folders have relative paths
        return load_dumped_config(self.folder / CONFIG, overrides, Path(self.record().cwd))

    def profile(self) -> Profile:
        return load_resolved_profile(self.folder / PROFILE)

    @property
    def tasks(self) -> list[Run]:
        """The tasks of its array, each of which is like a run; none if it is no array."""
        return [Run(self.folder / ARRAY / str(place)) for place in range(self.record().array or 0)]

    @property
    def whole(self) -> Run:
        """The run of the array whose task this is; otherwise itself."""
        return Run(self.folder.parents[1]) if self.folder.parent.name == ARRAY else self

    def attempts(self) -> list[Attempt]:
        """The attempts so far, oldest first; not those of an array's tasks."""
        numbers = sorted(int(p.name) for p in self.folder.glob("attempts/*") if p.name.isdigit())
        return [self.attempt(number) for number in numbers]

    def attempt(self, number: int) -> Attempt:
        return Attempt(self.folder / "attempts" / str(number))

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was asked for."""
        return (self.whole.folder / "cancelled").exists()

    def cancel(self) -> None:
        (self.folder / "cancelled").touch()


@dataclass(frozen=True)
class Attempt:
    """One start of a run's job."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def read(self, model: type[AnyNote]) -> AnyNote | None:
        """A record of the attempt, or None if it was not written."""
        return read_note(model, self.folder)

    def write(self, record: AttemptRecord) -> None:
        write_note(record, self.folder)

    def open(self, begin: Begin) -> None:
        """Make the folder, with the note of its beginning and room for those of its end. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(begin)
        for name in LAST_NOTES:
            self._room(name).write_bytes(b" " * ROOM)

    def close(self) -> None:
        """Remove the room that was not needed."""
        for name in LAST_NOTES:
            with contextlib.suppress(OSError):
                self._room(name).unlink(missing_ok=True)

    def note(self, record: AttemptRecord) -> None:
        """Write a record of the attempt's end, which a full disk must not change.

        It takes the room kept for it if there is no other; if it cannot be written at all, this says so.
        """
        try:
            self.write(record)
        except OSError as error:
            try:
                self._write_in_room(record)
            except OSError:
                console.say(f"{self.folder}/{record.file_name}: cannot be written: {error.strerror}")

    def _write_in_room(self, record: AttemptRecord) -> None:
        room, data = self._room(record.file_name), record_bytes(record)
        if len(data) > ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(room))
        with room.open("r+b") as file:
            file.write(data.ljust(ROOM))
        room.replace(self.folder / record.file_name)

    def _room(self, name: str) -> Path:
        return self.folder / f".{name}.room"

    @property
    def run(self) -> Run:
        return Run(self.folder.parents[1])

    def failure(self) -> Failure | None:
        """Why the attempt failed: the report of a rank, preferably one that did not merely lose another rank.

        In a Ray stage only the driver's report counts: it continues if another node is lost.
        """
        only_driver = self.run.is_ray_stage
        spoke = [f for f in self._failures() if f.rank == 0 or not only_driver]
        return min(spoke, key=lambda f: (f.reason.startswith(LOST_RANK), f.rank), default=None)

    def node_losses(self) -> list[Failure]:
        """What the nodes reported that a Ray stage lost and continues without."""
        if not self.run.is_ray_stage:
            return []
        lost = [f for f in self._failures() if f.rank and not f.reason.startswith(LOST_RANK)]
        return sorted(lost, key=lambda f: f.time)

    def _failures(self) -> list[Failure]:
        said = [read_note(Failure, self.folder, file.name) for file in self.folder.glob(Failure.FILE)]
        return [failure for failure in said if failure is not None]

    @property
    def position(self) -> tuple[str, int] | None:
        """Where the attempt's work began, by its progress: what earlier attempts had finished."""
        progress = self.read(AttemptProgress)
        return (progress.title, progress.reached) if progress else None

    @property
    def why_last(self) -> str | None:
        """Why no other attempt can follow this one, in words; None if one can."""
        profile = self.run.profile()
        if profile.chain == 1:
            return None if profile.requeue else "its profile says no-requeue: the same command resumes"
        if self.number + 1 < profile.chain:
            return None
        return f"it was the last of the {profile.chain} jobs of its chain: the same command resumes"

    def log(self, rank: int) -> Path:
        return self.folder / f"task-{rank}.log"


def newest_attempts(run: Run) -> list[Attempt]:
    """The attempts of a run, or of all tasks of an array; the one that is furthest last."""
    attempts = [attempt for task in run.tasks or [run] for attempt in task.attempts()]
    if not run.tasks:
        return attempts

    def done(attempt: Attempt) -> int:
        progress = attempt.read(AttemptProgress)
        return progress.done if progress else -1

    return sorted(attempts, key=done)


def fruitless(attempts: Sequence[Attempt]) -> int:
    """How many of the last attempts, in a row, began where the one before did: without progress.

    Attempts that report their preemption do not count: that is the cluster's doing.
    """
    counted = [a for a in attempts if (stopped := a.read(Stopped)) is None or stopped.why != "preempted"]
    positions = [attempt.position for attempt in counted]  # None: the attempt ended before its work began
    reached = [position for position in positions if position is not None]
    return len(positions) - (positions.index(reached[-1]) if reached else 0)


def jobs_folder(config: Config) -> Path:
    """The folder of an experiment's run folders."""
    return config.run_dir.absolute() / "jobs"


def create_run(submission: Submission, *, snapshot: bool) -> Run:
    """Make a run folder; `snapshot`: with a copy of the code, for a job that may start much later."""
    config, stage = submission.config, submission.stage
    jobs = jobs_folder(config)
    begin = f"{config.name}-{stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        folder = jobs / f"{begin}{suffix}"
        if os.path.islink(index() / folder.name):  # the id of a run elsewhere
            continue
        try:
            # only for the user: the script contains the environment that the profile sets
            folder.mkdir(parents=True, mode=0o700)
            break
        except FileExistsError:
            continue
        except OSError as error:  # a file in its place, a read-only disk, a long name
            raise WorkError(
                f"{folder}: cannot be made: {error.strerror}; choose another run.dir or name"
            ) from error
    run = Run(folder)
    (folder / CONFIG).write_text(dump_config(config))
    (folder / PROFILE).write_text(dump_profile(submission.profile))
    record = RunRecord(
        name=config.name,
        stage=stage.name,
        kind=stage.kind,
        subject=submission.options.subject,
        root=config.storage.root,
        submitted=time.time(),
        command=submission.command_line,
        cwd=os.getcwd(),
        code=code_version(),
        array=submission.array if submission.array > 1 else None,
    )
    write_note(record, folder)
    for task in run.tasks:
        (task.folder / "attempts").mkdir(parents=True)
        for file in (CONFIG, PROFILE):
            (task.folder / file).symlink_to(f"../../{file}")
        place = int(task.folder.name)
        write_note(record.model_copy(update={"array": None, "place": place}), task.folder)
    if not run.tasks:
        (folder / "attempts").mkdir()
    if snapshot:
        package = Path(__file__).resolve().parent.parent
        shutil.copytree(package, folder / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    _link(run)
    return run


def _link(run: Run) -> None:
    """Keep a link to a run. If that fails (the home folder is full or read-only), its folder stands for it."""
    try:
        if not index().is_absolute():
            raise OSError(errno.ENOENT, "there is no home folder")
        index().mkdir(parents=True, exist_ok=True)
        (index() / run.id).symlink_to(run.folder.resolve())
    except OSError as error:
        console.say(
            f"{index()}: keeps no link to this run ({error.strerror}): commands find it by its folder"
        )


def unlink(run: Run) -> None:
    """Remove the link to a run."""
    with contextlib.suppress(OSError):
        if run.is_linked:
            (index() / run.id).unlink()


def index() -> Path:
    """Links to the user's runs: $XDG_STATE_HOME/dsno-cluster/runs, or below ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "dsno-cluster" / "runs"


def all_runs(config: Config | None = None) -> list[Run]:
    """The user's runs whose folders still exist, newest first.

    With `config` they include those of its run.dir to which no link leads.
    """
    linked = {link.resolve() for link in index().glob("*")} if index().is_dir() else set()
    beside = {folder.resolve() for folder in jobs_folder(config).glob("*")} if config is not None else set()
    submitted: dict[Run, float] = {}
    for run in map(Run, linked | beside):
        try:
            if (run.folder / RunRecord.FILE).is_file():
                submitted[run] = run.record().submitted
        except OSError as error:  # no longer permitted, or on a disk that fails: show the others
            if run.folder in linked:  # and not of another user of the same run.dir
                console.say(f"{run.folder}: left out: {error.strerror}")
    return sorted(submitted, key=lambda run: submitted[run], reverse=True)


def runs_of_config(file: str, overrides: Sequence[str]) -> list[Run]:
    """The runs in the run.dir of a config file, newest first. Raises as `load_config` does."""
    config = load_config(file, overrides)
    return [run for run in all_runs(config) if run.folder.parent == jobs_folder(config).resolve()]


def find_run(word: str) -> Run:
    """The run of an id, the beginning of one, a job id, or the path of a run folder.

    Raises UserError if there is none, or more than one.
    """
    return the_only_run(word, matching_runs(word))


def the_only_run(word: str, runs: Sequence[Run]) -> Run:
    """The only one of `runs`. Raises UserError if `word` matches several."""
    if len(runs) > 1:
        raise UserError(f"{word}: stands for {len(runs)} runs, the newest {runs[0].id}; name one in full")
    return runs[0]


def matching_runs(word: str) -> list[Run]:
    """The runs, newest first, of an id, the beginning of one, a job id, or the path of a run folder.

    Raises UserError if there is none.
    """
    try:
        if (Path(word) / RunRecord.FILE).is_file():
            return [Run(Path(word).resolve())]
    except OSError as error:
        raise UserError(f"{word}: cannot be read: {error.strerror}") from None
    runs = all_runs()
    same = [run for run in runs if run.id == word or word in (*run.record().jobs, run.record().job)]
    if matching := same[:1] or [run for run in runs if run.id.startswith(word)]:
        return matching
    newest = f"; the newest is {runs[0].id}" if runs else f"; no link to any is in {index()}"
    raise UserError(
        f"{word}: no submitted run of that name{newest} (`dsno-cluster status` lists them; a run's folder stands for it too)"
    )


def config_file_of_run(word: str) -> str:
    """The YAML file of a config's path, or of the id or folder of a submitted run.

    Raises as `find_run` does.
    """
    if is_config_file(word):
        return word
    try:
        return str(find_run(word).folder / CONFIG)
    except UserError as error:
        shipped = f"configs/{word}.yaml"
        hint = f"did you mean {shipped}?" if Path(shipped).is_file() else "a config's path ends in .yaml"
        raise UserError(f"{error}; {hint}") from None


def config_of_run(word: str, overrides: Sequence[str] = ()) -> Config:
    """The experiment of a config's path, or of the id or folder of a submitted run, with `overrides`.

    Raises UserError for a word that is neither, and as `load_config` does.
    """
    file = config_file_of_run(word)
    return load_config(file, overrides) if file == word else Run(Path(file).parent).config(overrides)
