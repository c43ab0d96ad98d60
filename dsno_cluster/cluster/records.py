"""What the JSON files of a run folder hold: a frozen model for each file.

Each file names the version of its schema; older ones name none, and are read as version 0. A file is written whole or not
at all.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsno_cluster.cluster.stage import Kind
from dsno_cluster.console import Tally

SCHEMA = 1
WhyStopped = Literal["time limit", "preempted", "cancelled", "signal"]
_RANKS_BEFORE_SCHEMAS = "train"  # the one stage of ranks while run.json did not name the kind


class Record(BaseModel):
    """The content of one file. Keys that a later version adds are ignored."""

    model_config = ConfigDict(frozen=True)
    FILE: ClassVar[str]

    schema_version: int = SCHEMA

    @property
    def file_name(self) -> str:
        return self.FILE


class Code(BaseModel):
    """The code that a run was submitted with; `dirty`: with changes on top of the commit."""

    model_config = ConfigDict(frozen=True)

    version: str
    commit: str | None = None
    dirty: bool | None = None


class RunRecord(Record):
    """What was submitted, by which command, as which job. `root` is the storage's; `after` the job that it waits for."""

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
    cluster: str | None = None
    after: str | None = None
    host: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _kind_of_older_folders(cls, content: Any) -> Any:
        if isinstance(content, dict) and "kind" not in content:
            return {**content, "kind": "ranks" if content.get("stage") == _RANKS_BEFORE_SCHEMAS else "ray"}
        return content


class AttemptRecord(Record):
    """A note in an attempt's folder, and when it was written."""

    time: float = Field(default_factory=time.time)


class Begin(AttemptRecord):
    """The batch script began. `batch_log_bytes` is what its log held of former attempts."""

    FILE = "begin.json"

    job: str | None = None
    nodes: str | None = None
    batch_log_bytes: int = 0


class AttemptProgress(AttemptRecord):
    """How far the attempt's work has come: `console.Tally`."""

    FILE = "progress.json"

    title: str
    unit: str = ""
    start: int
    reached: int
    total: int = 0
    done: int = 0
    rate: float = 0.0
    figures: str = ""

    @classmethod
    def of(cls, tally: Tally) -> AttemptProgress:
        return cls(**vars(tally))


class Result(AttemptRecord):
    """Rank 0 finished; `result` says where its results are."""

    FILE = "result.json"

    result: str


class Stopped(AttemptRecord):
    """The attempt was told to end, and saved what it had done."""

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
    """What became of the attempt, as its batch script saw it; `again`: the job was started again."""

    FILE = "outcome.json"

    state: Literal["done", "failed", "cancelled", "again"]
    reason: str = ""


class Meeting(Record):
    """Where rank 0 of a training waits for the others."""

    FILE = "rendezvous.json"

    address: str
    port: int


class RayStarted(Record):
    """Ray's head listens at `address`; its workers, too, keep their files in `folder`."""

    FILE = "ray-started.json"

    address: str
    folder: str


class RayEnded(Record):
    """Ray's head has ended."""

    FILE = "ray-ended.json"


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(model: type[AnyRecord], folder: Path, name: str | None = None) -> AnyRecord | None:
    """The record of a folder, or None if its file (`name`, or the model's) does not exist or, from a full disk, is empty."""
    file = folder / (name or model.FILE)
    for last in (False, True):
        try:
            return model.model_validate({"schema_version": 0, **json.loads(file.read_text())})
        except (FileNotFoundError, TypeError, ValueError):  # pydantic's own among them
            return None
        except OSError as error:
            if last or error.errno != errno.ESTALE:  # NFS: replaced by another node while it was read
                raise
    return None


def write_record(record: Record, folder: Path) -> None:
    """Write the record's file."""
    file = folder / record.file_name
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    content = record.model_dump(mode="json", exclude_none=True) | {"schema_version": SCHEMA}
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, file)
