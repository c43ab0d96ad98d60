"""A test cluster for the tests, and a user who works on its login host."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testbed
from testbed import Cluster
from tiny import TINY

from dsno_cluster.cluster.records import AttemptProgress, Outcome, Stopped
from dsno_cluster.cluster.runs import Attempt, Run, newest_attempts

# shards of about a second, so that there is time for things to go wrong
SLOW = [*TINY, "trajectories.steps=80", "trajectories.num_samples=384"]
SHARDS = 24


@contextlib.contextmanager
def started(nodes: int, *, accounting: bool = False) -> Iterator[Cluster]:
    """A cluster of its own in a new folder; gone at the end."""
    if (reason := testbed.missing()) is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="dsno-testbed-")) / "cluster"
    folder.parent.chmod(0o755)  # the database server runs as a user of its own
    cluster = Cluster(folder, nodes, accounting, folder.parent.name.removeprefix("dsno-"))
    cluster.up()
    try:
        yield cluster
    finally:
        cluster.down()
        folder.parent.rmdir()


@dataclass(frozen=True)
class User:
    """Somebody on the login host, in a folder of their own with profiles and a place on S3 (or on the shared disk)."""

    cluster: Cluster
    home: Path
    on_s3: bool = True
    account: str = "root"

    @property
    def root(self) -> str:
        return f"s3://bucket/{self.home.name}" if self.on_s3 else str(self.home / "out")

    @property
    def storage(self) -> list[str]:
        if self.on_s3:
            s3 = f"storage.endpoint_url={self.cluster.s3_url}"
            return [f"storage.root={self.root}", f"run.dir={self.home}/run", s3]
        return ["storage.root=out", "run.dir=run"]  # relative, as the shipped configs have it

    @staticmethod
    def new(cluster: Cluster, name: str, on_s3: bool = True, account: str = "root") -> User:
        home = cluster.shared / name
        home.mkdir()
        user = User(cluster, home, on_s3, account)
        user.profile()
        shutil.chown(home, account, account)
        return user

    def profile(self, **values: Any) -> None:
        """Write jobs/*.yaml for every stage."""
        testbed.write_profiles(self.home, **values)

    def dsno(self, *words: str, status: int = 0, timeout: float = 240) -> Any:
        """Run `dsno-cluster`; its exit status must be `status`."""
        done = self.cluster.run(
            *("dsno-cluster", *words),
            cwd=self.home,
            timeout=timeout,
            check=False,
            account=self.account,
            **self.variables,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    @property
    def variables(self) -> dict[str, str]:
        own = {"HOME": str(self.home), "XDG_STATE_HOME": str(self.home / "state")}
        return {"OMP_NUM_THREADS": "1", **own}

    def start(self, *words: str) -> Any:
        """Start `dsno-cluster` and let it run."""
        words = ("dsno-cluster", *words)
        return self.cluster.start(*words, cwd=self.home, account=self.account, **self.variables)

    def submit(self, stage: str, *words: str) -> Run:
        """Submit a stage of the user's storage; returns its run."""
        said = self.dsno(stage, *words, *self.storage, "--launcher", "slurm").stderr
        return self.run_of(said)

    def run_of(self, said: str) -> Run:
        match = re.search(r"files: (\S+)", said)
        assert match, said
        return Run(Path(match[1]))

    def row(self, run: Run) -> dict[str, Any]:
        """What `status` says of a run."""
        return dict(json.loads(self.dsno("status", run.id, "--json").stdout)["runs"][0])

    def ends(self, run: Run, state: str = "done", seconds: float = 240) -> dict[str, Any]:
        """Wait until a run ends, as it must in `state`. A requeued job is hurried: Slurm lets it wait for two minutes."""
        deadline = time.monotonic() + seconds
        while True:
            # Slurm is asked, as `status` costs a second of this machine's processors
            while self.in_queue(run):
                assert time.monotonic() < deadline, f"{self.row(run)}\n{self.all_logs(run)}"
                time.sleep(1)
            row = self.row(run)
            if row["state"] in ("done", "failed", "cancelled"):
                assert row["state"] == state, f"{row}\n{self.all_logs(run)}"
                return row
            assert time.monotonic() < deadline, f"{row}\n{self.all_logs(run)}"
            time.sleep(1)

    def in_queue(self, run: Run) -> bool:
        """Whether a job of a run waits or runs; one that was requeued begins at once."""
        job = ",".join(run.record().jobs)
        listing = self.cluster.run("squeue", "-h", "-j", job, "-o", "%T %r", check=False).stdout.strip()
        if listing == "PENDING BeginTime":
            # the end of the attempt before, heard of after the next began, would be taken for its end
            time.sleep(5)
            self.cluster.run("scontrol", "update", f"jobid={job}", "starttime=now", check=False)
        return bool(listing)

    def all_logs(self, run: Run) -> str:
        files = [run.folder / "batch.log", *sorted(run.folder.rglob("attempts/*/task-*.log"))]
        return "\n".join(f"== {f}\n{f.read_text()[-3000:]}" for f in files if f.is_file())

    def read(self, key: str) -> str:
        """A text of the user's storage; `*` of a key stands for a folder."""
        script = (
            "import fnmatch, sys; from dsno_cluster.storage import open_storage; root, endpoint, key = sys.argv[1:]; "
            "storage = open_storage(root, endpoint or None); keys = [s.key for s in storage.list(key.split('*')[0])]; "
            "key, = fnmatch.filter(keys, key); print(key); print(storage.read(key).decode())"
        )
        endpoint = self.cluster.s3_url if self.on_s3 else ""
        return str(self.cluster.run("python", "-c", script, self.root, endpoint, key).stdout)

    def manifest(self) -> dict[str, Any]:
        """The manifest of the user's only data set, and its key."""
        key, _, content = self.read("trajectories/*/manifest.json").partition("\n")
        return {"key": key, **json.loads(content)}

    def verify(self) -> None:
        """`verify` finds the user's data set whole, with no shard too many or too few."""
        folder = f"{self.root}/{self.manifest()['key'].removesuffix('/manifest.json')}"
        s3 = ["--endpoint-url", self.cluster.s3_url] if self.on_s3 else []
        self.dsno("verify", folder, *s3)

    def shards_made(self) -> int:
        """Shards that are there now (on the shared disk)."""
        return len(list((self.home / "out").glob("trajectories/*/shard-*.safetensors")))

    def losses(self) -> list[float]:
        lines = (self.home / "run/students/digits/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


def is_up(cluster: Cluster, node: str) -> bool:
    return Path(f"/proc/{(cluster.folder / node / 'pid').read_text()}").exists()


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return found


def ray_processes(cluster: Cluster, node: str) -> list[str]:
    """Command lines of the processes of a node that have anything to do with Ray; zombies are none."""
    listing = cluster.run("ps", "-eo", "stat=,args=", host=node).stdout.splitlines()
    found = [line.split(maxsplit=1)[1] for line in listing if not line.startswith("Z")]
    return [line for line in found if "ray" in line.lower() and "ps -eo" not in line]


def last(run: Run) -> Attempt:
    return run.attempts()[-1]


def newest(run: Run) -> Attempt:
    """The attempt that is furthest, of those of all tasks of an array."""
    return newest_attempts(run)[-1]


def done_by(run: Run) -> int:
    """How much of its work the last attempt says is done; 0 before it begins."""
    attempts = run.attempts()
    progress = attempts[-1].read(AttemptProgress) if attempts else None
    return progress.done if progress else 0


def why_stopped(attempt: Attempt) -> str | None:
    """The reason for which an attempt was asked to end; None if it was not asked."""
    stopped = attempt.read(Stopped)
    return stopped.why if stopped else None


def why_ended(attempt: Attempt) -> str:
    """The reason that an attempt's batch script noted."""
    outcome = attempt.read(Outcome)
    return outcome.reason if outcome else ""
