"""The JSON files of a run folder: a frozen model for each file.

Files of versions before 0.2 name no schema version; keys that they lack get their defaults.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from dsno_cluster.cluster.stage import Kind
from dsno_cluster.console import Tally
from dsno_cluster.errors import UserError
from dsno_cluster.files import replace_file
from dsno_cluster.provenance import Code
from dsno_cluster.records import SparseRecord, read_record, record_bytes

WhyStopped = Literal["time limit", "preempted", "cancelled", "signal"]
_RANKS_BEFORE_SCHEMAS = "train"  # the only stage of ranks in versions whose run.json did not name the kind


class Note(SparseRecord):
    """The content of one file of a run folder."""

    FILE: ClassVar[str]

    schema_version: Literal[1] = 1

    @property
    def file_name(self) -> str:
        return self.FILE


class RunRecord(Note):
    """What was submitted, by which command, as which job.

    `root` is the storage root. `job` is its job, or the first of its chain, which `successors` continue, or the
    array of `array` tasks; each of these has a record of its own, with its `place`. `after` is the folder of the run it
    waits for; in older folders, that run's job.
    """

    FILE = "run.json"

    name: str = ""
    stage: str = ""
    kind: Kind
    subject: str = ""
    root: str = ""
    submitted: float = 0.0
    command: str = ""
    cwd: str = ""
    code: Code | None = None
    launcher: str | None = None
    job: str | None = None
    successors: tuple[str, ...] = ()
    array: int | None = None
    place: int | None = None
    cluster: str | None = None
    after: str | None = None
    host: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _kind_of_older_folders(cls, content: Any) -> Any:
        if isinstance(content, dict) and "kind" not in content:
            return {**content, "kind": "ranks" if content.get("stage") == _RANKS_BEFORE_SCHEMAS else "ray"}
        return content

    @property
    def jobs(self) -> tuple[str, ...]:
        """All its jobs: one, or those of its chain or array in their order."""
        if self.job is not None and self.array is not None:
            return tuple(f"{self.job}_{place}" for place in range(self.array))
        return () if self.job is None else (self.job, *self.successors)


class AttemptRecord(Note):
    """A note in an attempt's folder, with the time when it was written."""

    time: float = Field(default_factory=time.time)


class Begin(AttemptRecord):
    """The batch script began.

    `batch_log_bytes` is the length of its log then, written by earlier attempts; `oom_kills` how many processes
    the kernel of its node had killed for lack of memory.
    """

    FILE = "begin.json"

    job: str | None = None
    nodes: str | None = None
    batch_log_bytes: int = 0
    oom_kills: int | None = None


class AttemptProgress(AttemptRecord):
    """The progress of the attempt's work: `console.Tally`, without what is only recorded."""

    FILE = "progress.json"

    title: str
    unit: str = ""
    start: int
    reached: int
    total: int = 0
    done: int = 0
    rate: float = 0.0
    figures: str = ""
    remark: str = ""

    @classmethod
    def of(cls, tally: Tally) -> AttemptProgress:
        return cls(**{name: value for name, value in vars(tally).items() if name in cls.model_fields})


class Idle(AttemptRecord):
    """The attempt has made no progress for this long, by the clock of its first node; gone once it does."""

    FILE = "idle.json"

    seconds: float


class Result(AttemptRecord):
    """Rank 0 finished; `result` says where its results are."""

    FILE = "result.json"

    result: str


class Stopped(AttemptRecord):
    """The attempt was asked to end, and saved what it had done."""

    FILE = "stopped.json"

    why: WhyStopped


class Failure(AttemptRecord):
    """Why a rank failed. `kind`: user (the input), work (the work or its surroundings) or bug."""

    FILE = "failure-*.json"

    kind: Literal["user", "work", "bug"]
    reason: str
    rank: int
    host: str = ""

    @property
    def file_name(self) -> str:
        return self.FILE.replace("*", str(self.rank))


class Outcome(AttemptRecord):
    """The outcome of the attempt, as its batch script saw it; `again`: the job was started again."""

    FILE = "outcome.json"

    state: Literal["done", "failed", "cancelled", "again"]
    reason: str = ""


class Meeting(Note):
    """The address at which rank 0 of a training waits for the others."""

    FILE = "rendezvous.json"

    address: str
    port: int


class RayStarted(Note):
    """Ray's head listens at `address`; its workers also keep their files in `folder`."""

    FILE = "ray-started.json"

    address: str
    folder: str


class RayEnded(Note):
    """Ray's head has ended."""

    FILE = "ray-ended.json"


AnyNote = TypeVar("AnyNote", bound=Note)


def read_note(model: type[AnyNote], folder: Path, name: str | None = None) -> AnyNote | None:
    """The note in a folder; None if its file (`name`, or the model's) is missing or not readable."""
    file = folder / (name or model.FILE)
    for last in (False, True):
        try:
            return read_record(model, file.read_bytes(), str(file))
        except (FileNotFoundError, UserError):
            return None
        except OSError as error:
            if last or error.errno != errno.ESTALE:  # NFS: replaced by another node while it was read
                raise
    return None


def write_note(note: Note, folder: Path) -> None:
    """Write the note's file atomically."""
    replace_file(folder / note.file_name, record_bytes(note))
