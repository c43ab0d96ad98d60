"""The averaged students that others load: written at each checkpoint, uploaded in the background.

They lie below `<storage.root>/students/<name>/step-000001000/`, the newest named by the text file `latest` and the best,
where held-out errors are measured, by `best`. Where storage is not the run's own folder they are written below `run.dir`
first, so that nothing is lost while the storage does not answer, and training never waits for it.
"""

from __future__ import annotations

import queue
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config, dump_config
from dsno_cluster.errors import WorkError
from dsno_cluster.models.weights import BEST, LATEST, META, write_model
from dsno_cluster.storage import FolderStorage, Patience, Storage, open_storage

RETRY_SECONDS = (5.0, 15.0, 60.0)  # between attempts at an upload; then every minute until the run ends
LAST_ATTEMPTS = 3  # at an upload when the training is done


def step_name(step: int) -> str:
    return f"step-{step:09d}"


def student_prefix(config: Config) -> str:
    return f"students/{config.name}/"


class Publisher:
    """Writes students where others find them; used by rank 0 alone, as a context that waits for uploads at its end."""

    def __init__(self, config: Config) -> None:
        self.config, self.prefix = config, student_prefix(config)
        # impatient: an upload that fails is tried again and again all the same
        patience = Patience(attempts=3, longest_pause_seconds=2.0)
        self.shared = open_storage(config.storage.root, config.storage.endpoint_url, patience)
        self.local = FolderStorage(config.run_dir)
        own = (
            isinstance(self.shared, FolderStorage) and self.shared.root.resolve() == self.local.root.resolve()
        )
        self.uploads: queue.Queue[str | None] | None = None if own else queue.Queue()
        self.closing = threading.Event()
        self.problem: WorkError | None = None
        if self.uploads is not None:
            for name in self._not_uploaded():
                self.uploads.put(name)
            self.thread = threading.Thread(target=self._upload_all, name="uploads", daemon=True)
            self.thread.start()

    def publish(
        self, step: int, students: dict[float, dict[str, Tensor]], meta: dict[str, Any], *, best: bool = False
    ) -> None:
        """Write the student of `step`: `students` has its whole weights by EMA decay, the first the one to load.

        Raises WorkError where the disk does not take it.
        """
        storage = self.shared if self.uploads is None else self.local
        first, *others = students
        more = {decay: students[decay] for decay in others}
        folder = f"{self.prefix}{step_name(step)}/"
        meta = {**meta, "step": step}
        write_model(storage, folder, students[first], dump_config(self.config), meta, averages=more)
        for text in (LATEST, BEST) if best else (LATEST,):
            storage.write(self.prefix + text, (step_name(step) + "\n").encode())
        if self.uploads is not None:
            self.uploads.put(step_name(step))

    def finish(self) -> None:
        """Wait for the uploads. Raises WorkError where the last of them could not be made."""
        if self.uploads is None:
            return
        self.closing.set()
        self.uploads.put(None)
        self.thread.join()
        if self.problem is not None:
            raise WorkError(
                f"trained, but a student is not uploaded: {self.problem}; the same command tries again from "
                f"{self.local.root / self.prefix}"
            )

    def _not_uploaded(self) -> list[str]:
        """Students that a former run left here and the storage lacks, oldest first."""
        here = sorted(p.parent.name for p in (self.local.root / self.prefix).glob(f"step-*/{META}"))
        try:
            return [name for name in here if self.shared.stat(f"{self.prefix}{name}/{META}") is None]
        except WorkError:
            return here  # the storage does not answer: uploading what is there again does no harm

    def _upload_all(self) -> None:
        assert self.uploads is not None
        while (name := self.uploads.get()) is not None:
            self._upload(name)

    def _upload(self, name: str) -> None:
        attempt = 0
        while True:
            attempt += 1
            try:
                upload_student(self.local.root / self.prefix / name, self.shared, f"{self.prefix}{name}/")
                self.shared.write(self.prefix + LATEST, (name + "\n").encode())
                if self._named(BEST) == name:
                    self.shared.write(self.prefix + BEST, (name + "\n").encode())
                self.problem = None
                self._drop_uploaded(name)
                return
            except WorkError as error:
                self.problem = error
                if self.closing.is_set() and attempt >= LAST_ATTEMPTS:
                    return
                wait = RETRY_SECONDS[min(attempt, len(RETRY_SECONDS)) - 1]
                console.say(
                    f"upload of {name}, attempt {attempt}: {error}; training goes on, again in {wait:g} s"
                )
                began = time.monotonic()
                while time.monotonic() - began < wait and not self.closing.wait(1.0):
                    pass

    def _named(self, text: str) -> str | None:
        return (
            self.local.read(self.prefix + text).decode().strip()
            if self.local.stat(self.prefix + text)
            else None
        )

    def _drop_uploaded(self, name: str) -> None:
        """Delete students up to `name`, which the storage has, but for the newest ones."""
        folders = sorted(
            p for p in (self.local.root / self.prefix).iterdir() if re.fullmatch(r"step-\d+", p.name)
        )
        for folder in folders[: -self.config.training.keep_checkpoints]:
            if folder.name <= name:
                shutil.rmtree(folder, ignore_errors=True)


def upload_student(folder: Path, storage: Storage, prefix: str) -> None:
    """Copy a model folder to storage, `meta.json` last. Raises WorkError where either side fails."""
    try:
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        raise WorkError(f"{folder}: cannot be read: {error.strerror}") from error
    files[META] = files.pop(META)  # last: with it the folder is complete
    storage.write_folder(prefix, files)
