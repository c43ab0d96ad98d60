"""Publishing of the averaged students: written at each checkpoint, uploaded in the background.

They are below `<storage.root>/students/<name>/step-000001000/`. The text file `latest` names the newest, and
`best` the best one if a held-out figure is measured. If the storage is not the run's own folder, they are
first written below `run.dir`, so that nothing is lost while the storage does not answer, and training never
waits for it.
"""

from __future__ import annotations

import queue
import re
import shutil
import threading
import time
from pathlib import Path

from torch import Tensor

from dsno_cluster import console, liveness
from dsno_cluster.config import Config, dump_config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.model_folder import BEST, LATEST, META, AboutModel, step_name, write_model
from dsno_cluster.storage import FolderStorage, Patience, Storage, open_storage
from dsno_cluster.training.identity import Inputs
from dsno_cluster.training.ownership import students_claim

RETRY_SECONDS = (5.0, 15.0, 60.0)  # between attempts at an upload; then every minute until the run ends
LAST_ATTEMPTS = 3  # attempts at an upload once the training is done


class Publisher:
    """Writes and uploads students; used only by rank 0. `finish` waits for pending uploads."""

    def __init__(self, config: Config, inputs: Inputs) -> None:
        self.config, self.prefix = config, config.student_prefix
        # few attempts: a failed upload is retried later anyway
        patience = Patience(attempts=3, longest_pause_seconds=2.0)
        self.shared = open_storage(config.storage.root, config.storage.endpoint_url, patience)
        self.local = FolderStorage(config.run_dir)
        self.local.tidy(self.prefix)
        self.claim = students_claim(config, inputs, self.shared)
        self.uploads: queue.Queue[str | None] | None = None if self.claim.within else queue.Queue()
        self.lost: UserError | None = None  # says who else owns the name now
        self.closing = threading.Event()
        self.uploaded: set[str] = set()  # by this process, or found in the storage
        self.failed: dict[str, Exception] = {}
        if self.uploads is not None:
            self.thread = threading.Thread(target=self._upload_all, name="uploads", daemon=True)
            self.thread.start()

    def publish(
        self, step: int, students: dict[float, dict[str, Tensor]], about: AboutModel, *, best: bool = False
    ) -> None:
        """Write the student of `step`: whole weights by EMA decay, of which the first is the default.

        Raises WorkError if it cannot be written, or if the name has become another training's.
        """
        try:
            if self.uploads is None:
                self.claim.hold()
            elif self.lost is not None:
                raise self.lost
        except UserError as error:
            raise WorkError(str(error)) from error
        storage = self.shared if self.uploads is None else self.local
        first, *others = students
        more = {decay: students[decay] for decay in others}
        folder = f"{self.prefix}{step_name(step)}/"
        write_model(storage, folder, students[first], dump_config(self.config), about, averages=more)
        for text in (LATEST, BEST) if best else (LATEST,):
            storage.write(self.prefix + text, (step_name(step) + "\n").encode())
        if self.uploads is not None:
            self.uploads.put(step_name(step))

    def finish(self) -> None:
        """Wait for the uploads. Raises WorkError if one of them failed."""
        if self.uploads is None:
            return
        self.closing.set()
        self.uploads.put(None)
        self.thread.join()
        if self.failed:
            name, problem = max(self.failed.items())
            raise WorkError(
                f"trained, but a student is not uploaded, {name}: {problem}; the same command tries again from "
                f"{self.local.root / self.prefix}"
            )

    def _upload_all(self) -> None:
        """Upload what an earlier run left here, oldest first, then what is put into the queue until its end."""
        assert self.uploads is not None
        for folder in sorted((self.local.root / self.prefix).glob(f"step-*/{META}")):
            self._upload(folder.parent.name, again=False)
        while (name := self.uploads.get()) is not None:
            self._upload(name)

    def _upload(self, name: str, *, again: bool = True) -> None:
        """Upload a student and update `latest` and `best`.

        `again`: even if the storage has one of that step.
        """
        folder, prefix, attempt = self.local.root / self.prefix / name, f"{self.prefix}{name}/", 0
        while folder.is_dir():
            attempt += 1
            liveness.moved()
            try:
                self.claim.hold()
                if again or self.shared.stat(prefix + META) is None:
                    upload_student(folder, self.shared, prefix)
                self.uploaded.add(name)
                self._name_newest_and_best()
                self.failed.pop(name, None)
                self._drop_uploaded()
                return
            except UserError as error:  # the name is another training's
                self.failed[name] = self.lost = error
                return
            except Exception as error:  # noqa: BLE001 (of whatever kind: training continues)
                self.failed[name] = error
                if self.closing.is_set() and attempt >= LAST_ATTEMPTS:
                    return
                wait = RETRY_SECONDS[min(attempt, len(RETRY_SECONDS)) - 1]
                console.say(
                    f"upload of {name}, attempt {attempt}: {error}; training continues, next attempt in {wait:g} s"
                )
                began = time.monotonic()
                while time.monotonic() - began < wait and not self.closing.wait(1.0):
                    pass

    def _name_newest_and_best(self) -> None:
        """Update the storage's `latest` and `best` to what it holds; never back to an older student."""
        newest, best = max(self.uploaded), _named(self.local, self.prefix + BEST)
        if (_named(self.shared, self.prefix + LATEST) or "") < newest:
            self.shared.write(self.prefix + LATEST, (newest + "\n").encode())
        if best in self.uploaded and _named(self.shared, self.prefix + BEST) != best:
            self.shared.write(self.prefix + BEST, (best + "\n").encode())

    def _drop_uploaded(self) -> None:
        """Delete local students that the storage has, except the newest ones."""
        folders = sorted(
            p for p in (self.local.root / self.prefix).iterdir() if re.fullmatch(r"step-\d+", p.name)
        )
        for folder in folders[: -self.config.training.keep_checkpoints]:
            if folder.name in self.uploaded:
                shutil.rmtree(folder, ignore_errors=True)


def _named(storage: Storage, key: str) -> str | None:
    """The step folder that a text file names, or None."""
    return storage.read(key).decode().strip() if storage.stat(key) is not None else None


def upload_student(folder: Path, storage: Storage, prefix: str) -> None:
    """Copy a model folder to storage, `meta.json` last. Raises WorkError if either side fails."""
    try:
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        raise WorkError(f"{folder}: cannot be read: {error.strerror}") from error
    files[META] = files.pop(META)  # last: with it the folder is complete
    storage.write_folder(prefix, files)
