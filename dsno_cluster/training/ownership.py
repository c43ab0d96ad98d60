"""Who publishes under a name: the record of the training that owns it, beside what it publishes.

The first training of a name puts its record there, on condition that there is none, and keeps a copy below
its run.dir. Every later write compares the two, so two trainings with different run.dirs never mix their
students, and a training that resumes from its run.dir, on whatever node, is known again.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from dsno_cluster import console
from dsno_cluster.cluster.slurm_commands import user_name
from dsno_cluster.config import Config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import locked_if_possible
from dsno_cluster.records import Record, canonical_hash, read_record, record_bytes
from dsno_cluster.storage import FolderStorage, MissingObject, PreconditionFailed, Storage, open_storage
from dsno_cluster.training.identity import Inputs, run_identity

ATTEMPTS = 10  # at a claim that others make, and give up, at the same moment


class Owner(Record):
    """The training that owns a name. `id` is random, `identity` a hash of what identifies the training."""

    schema_version: Literal[1] = 1
    id: str
    run_dir: str
    user: str
    host: str
    since: str
    identity: str

    @property
    def who(self) -> str:
        return f"{self.user}@{self.host}, since {self.since}"


@dataclass(frozen=True)
class Claim:
    """A training's claim to publish below `published` in a storage, a folder or the name of a model.

    The record is at `key` there, and its copy at `copy` below run.dir.
    """

    storage: Storage
    published: str
    key: str
    run: FolderStorage
    copy: str
    identity: str

    @property
    def where(self) -> str:
        return f"{self.storage.url}/{self.published.rstrip('/')}"

    @property
    def in_the_way(self) -> str:
        """What must be deleted before another training can own the name."""
        return (
            self.where
            if self.key.startswith(f"{self.published.rstrip('/')}/")
            else f"{self.storage.url}/{self.key}"
        )

    @property
    def within(self) -> bool:
        """Whether the training publishes into its own run.dir."""
        return (
            isinstance(self.storage, FolderStorage) and self.storage.root.resolve() == self.run.root.resolve()
        )

    def check(self) -> Owner | None:
        """The owner, if it is this training; None if there is none. Raises UserError, which names another."""
        owner, ours = _read(self.storage, self.key), _read(self.run, self.copy)
        if owner is None or (ours is not None and ours.id == owner.id):
            return owner
        here = Path(owner.run_dir).resolve() == self.run.root.resolve()
        if here and self.within:  # the copy was deleted with the checkpoints
            return owner
        if here and owner.host == socket.gethostname():
            raise UserError(
                f"{self.where}: belongs to an earlier training in {owner.run_dir} ({owner.who}), which is no longer there; "
                f"choose another name=, or delete {self.in_the_way} to begin again"
            )
        raise UserError(
            f"{self.where}: belongs to the training with run.dir={owner.run_dir} ({owner.who}); continue that one with its "
            f"run.dir, choose another name=, or delete {self.in_the_way} if nobody needs it"
        )

    def hold(self) -> None:
        """Make sure that the name is this training's. Raises UserError, which names the owner, if it is another's."""
        for _ in range(ATTEMPTS):
            ours = self.check() or self._new()
            self.run.write(self.copy, record_bytes(ours))
            if _read(self.storage, self.key) == ours:
                return
            try:
                self.storage.write(self.key, record_bytes(ours), if_absent=True)
                return
            except PreconditionFailed:
                continue  # another was first: see who
        raise WorkError(f"{self.storage.url}/{self.key}: kept changing under {ATTEMPTS} attempts to write it")

    def _new(self) -> Owner:
        """The record of this training; its `id` is that of the copy, if there is one."""
        before = _read(self.run, self.copy)
        return Owner(
            id=before.id if before else secrets.token_hex(8),
            run_dir=str(self.run.root),
            user=user_name(os.getuid()),
            host=socket.gethostname(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            identity=self.identity,
        )


def _read(storage: Storage, key: str) -> Owner | None:
    try:
        return read_record(Owner, storage.read(key), f"{storage.url}/{key}")
    except MissingObject:
        return None


def students_claim(config: Config, inputs: Inputs | None = None, storage: Storage | None = None) -> Claim:
    """The claim of a training to publish students of the config's name.

    `inputs` are what it reads, which only `hold` needs; `storage` is that of the config unless it is given.
    """
    prefix = config.student_prefix
    return Claim(
        storage=storage or open_storage(config.storage.root, config.storage.endpoint_url),
        published=prefix,
        key=f"{prefix}owner.json",
        run=FolderStorage(config.run_dir),
        copy=f"{prefix}resume/owner.json",
        identity=canonical_hash(run_identity(config, inputs or Inputs("")).model_dump(mode="json")),
    )


def teacher_claim(config: Config, identity: str, storage: Storage) -> Claim:
    """The claim of a training to publish the teacher of the config's name."""
    name = f"teachers/{config.name}"
    return Claim(
        storage=storage,
        published=name,
        key=f"{name}-owner.json",  # beside the model's folder, which appears complete
        run=FolderStorage(config.run_dir),
        copy=f"teachers/.{config.name}-owner.json",
        identity=identity,
    )


@contextlib.contextmanager
def only_run(folder: Path, lock: str = ".lock") -> Iterator[None]:
    """Lock a folder of a run for this process. Raises WorkError if another training holds it.

    A job's processes may outlive the command that started them, and two trainings would overwrite each other.
    On a file system without locks, nothing is held.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_if_possible(folder / lock, wait=False))
        except BlockingIOError:
            raise WorkError(
                f"{folder}: another training writes there now; wait for it, end it, or choose another name="
            ) from None
        except OSError as error:
            raise WorkError(f"{error.filename or folder}: {error.strerror}") from error
        yield


def check_students(claim: Claim, newest: int | None) -> None:
    """Raises UserError unless this training may publish students of its name; `newest` is that of its checkpoints.

    Students from before there were records belong to whoever has checkpoints of them.
    """
    if claim.check() is not None or newest is not None or claim.within:
        return
    known = {path.name for path in (claim.run.root / claim.published).glob("step-*")}
    if unknown := _published_steps(claim) - known:
        raise UserError(
            f"{claim.where}: holds students up to {max(unknown)} of a training that {claim.run.root} does not know; name its "
            f"run.dir to continue it, choose another name=, or delete {claim.where} to begin again"
        )


def hold_students(claim: Claim, newest: int | None) -> None:
    """Make the name this training's before it begins. Raises UserError as `check_students` does.

    If it begins again in its own storage, beside its former students, that is said.
    """
    check_students(claim, newest)
    begins_again = newest is None and claim.within and _read(claim.run, claim.copy) is None
    if begins_again and (there := _published_steps(claim)):
        console.say(
            f"{claim.where}: holds students of an earlier training up to {max(there)}, whose checkpoints are gone; this one "
            "begins again and replaces each when it comes to its step"
        )
    claim.hold()


def _published_steps(claim: Claim) -> set[str]:
    """The names of the step folders in the storage."""
    pattern = re.compile(rf"{re.escape(claim.published)}(step-\d+)/")
    found = (pattern.match(stat.key) for stat in claim.storage.list(f"{claim.published}step-"))
    return {match[1] for match in found if match}
