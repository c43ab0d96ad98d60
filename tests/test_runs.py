"""Run folders: when a job is given up, whose failure counts, how runs are found and told of."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest
from tiny import TINY, dsno, small_disk

from dsno_cluster.cli import main
from dsno_cluster.cluster.attempt import main as begin_or_end
from dsno_cluster.cluster.launchers import states_of
from dsno_cluster.cluster.reasons import lost_nodes, why
from dsno_cluster.cluster.records import AttemptProgress, Begin, Failure, Outcome, Result, Stopped, WhyStopped
from dsno_cluster.cluster.runs import BATCH_LOG, Run, all_runs, create_run, find_run, fruitless
from dsno_cluster.cluster.stage import Submission
from dsno_cluster.cluster.status import run_to_cancel
from dsno_cluster.config import Config, load_config, load_profile
from dsno_cluster.errors import LONE_SIGNAL, LOST_RANK, UserError, WorkError
from dsno_cluster.stages import TRAIN

# what scripts read of `status --json`
ROW = {
    "run",
    "stage",
    "job",
    "launcher",
    "state",
    "why",
    "nodes",
    "attempts",
    "done",
    "total",
    "unit",
    "rate",
}
ROW |= {"seconds_left", "last_error", "folder", "code"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    return new_run(config)


def new_run(config: Config) -> Run:
    submission = Submission(TRAIN, config, load_profile(TRAIN.name, {}), "dsno-cluster train")
    return create_run(submission, snapshot=False)


def attempts(run: Run, *starts: int | None, stopped: dict[int, WhyStopped] | None = None) -> int:
    """The streak after attempts that began at `starts` (None: ended before the work began)."""
    for number, start in enumerate(starts):
        attempt = run.attempt(number)
        attempt.folder.mkdir(parents=True)
        if start is not None:
            attempt.write(AttemptProgress(title="training", start=start, reached=start))
        if stopped and number in stopped:
            attempt.write(Stopped(why=stopped[number]))
    return fruitless(run.attempts())


@pytest.mark.parametrize(
    ("starts", "streak"),
    [
        ((), 0),
        ((0,), 1),
        ((0, 0, 0), 3),
        ((0, 100, 200, 300), 1),
        ((0, 100, 100), 2),
        ((None, None), 2),
        ((0, 100, 200, None), 2),  # one bad start does not undo what was gained
        ((0, 100, None, 200), 1),
    ],
)
def test_attempts_that_gained_nothing_are_counted(
    run: Run, starts: tuple[int | None, ...], streak: int
) -> None:
    assert attempts(run, *starts) == streak


def test_a_run_folder_of_an_earlier_version_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without schema versions, without the kind of the stage, and with paths relative to the folder of submission."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kinds = {}
    for stage in ("train", "eval"):
        folder = tmp_path / f"runs/jobs/digits-{stage}-20260101-120000"
        (folder / "attempts/0").mkdir(parents=True)
        record = {"name": "digits", "stage": stage, "root": str(tmp_path / "runs"), "submitted": 1.0}
        record |= {"command": f"dsno-cluster {stage}", "cwd": str(tmp_path), "code": {"version": "0.1.0"}}
        record |= {"job": "17", "launcher": "local", "host": socket.gethostname()}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "config.yaml").write_text("name: digits\n" + Path("configs/digits.yaml").read_text())
        files = {
            "begin": {"time": 1.0, "job": "17", "nodes": "node1", "batch_log_bytes": 0},
            "progress": {
                "title": "t",
                "unit": "steps",
                "start": 0,
                "reached": 0,
                "total": 8,
                "done": 2,
                "rate": 1.5,
            },
            "failure-0": {"time": 2.0, "kind": "work", "reason": "no space", "rank": 0, "host": "node1"},
        }
        for name, content in files.items():
            (folder / f"attempts/0/{name}.json").write_text(json.dumps(content))
        run = find_run(str(folder))
        kinds[stage] = run.record().kind
        assert run.config().storage.root == str(tmp_path / "runs")
        assert main(["status", str(folder), "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["runs"]
        assert set(row) == ROW and row["code"]["version"] == "0.1.0"
        assert (row["state"], row["last_error"], row["done"], row["total"]) == ("failed", "no space", 2, 8)
    assert kinds == {"train": "ranks", "eval": "ray"}


def test_every_file_names_its_schema(run: Run) -> None:
    attempt = run.attempt(0)
    attempt.folder.mkdir(parents=True)
    for record in (
        Begin(),
        Result(result="x"),
        Stopped(why="signal"),
        Failure(kind="bug", reason="", rank=3),
    ):
        attempt.write(record)
    files = [run.folder / "run.json", *attempt.folder.glob("*.json")]
    assert len(files) == 5 and all(json.loads(f.read_text())["schema_version"] == 1 for f in files)


def test_preempted_attempts_are_not_counted(run: Run) -> None:
    assert attempts(run, 0, 0, 0, 0, stopped={1: "preempted", 2: "preempted", 3: "time limit"}) == 2


def test_the_reason_is_that_of_the_rank_that_is_to_blame(run: Run) -> None:
    attempt = run.attempt(0)
    attempt.folder.mkdir(parents=True)
    assert "ended by SIGKILL" in why(attempt, 137) and "memory" not in why(attempt, 137)
    assert "loss of a node" in why(attempt, None)
    attempt.write(Failure(kind="work", rank=0, reason=f"{LOST_RANK} (connection reset)"))
    log = run.folder / "batch.log"
    log.write_text(
        "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Exited with exit code 1\n"
    )
    assert why(attempt, 137).startswith("task 1 on node2 was killed by SIGKILL, from outside")
    # another rank was lost in another way: srun ends the others after the first
    log.write_text(
        "srun: error: node1: task 0: Exited with exit code 1\nsrun: error: node2: task 1: Killed\n"
    )
    assert why(attempt, 137).startswith(LOST_RANK)
    attempt.write(Failure(kind="work", rank=3, reason="the loss is not finite"))
    assert why(attempt, 1) == "the loss is not finite"


def test_of_a_ray_stage_the_driver_is_to_blame(run: Run) -> None:
    """Another node's failure is one that the stage went on without."""
    run.note(stage="gen-trajectories", kind="ray")
    attempt = run.attempt(0)
    attempt.folder.mkdir(parents=True)
    attempt.write(Begin(nodes="node[1-3]", batch_log_bytes=4))
    attempt.write(Failure(kind="user", rank=2, host="node3", reason="Ray on node3 ended by itself"))
    (run.folder / "batch.log").write_text(
        "of an attempt before\nsrun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Killed\n"
    )
    assert attempt.failure() is None
    assert [lost.host for lost in attempt.node_losses()] == ["node3"]
    assert why(attempt, 137).startswith("task 0 on node1 was killed by SIGKILL, from outside")
    (run.folder / "batch.log").write_text(
        "old\nsrun: error: node2: task 1: Killed\nsrun: error: Node failure on node4\n"
        "srun: error: Node failure on node2\n"  # which is told of already
    )
    killed, said, lost = lost_nodes(attempt)
    assert killed.startswith("task 1 on node2 was killed") and said == "Ray on node3 ended by itself"
    assert lost == "Slurm lost node4"
    assert why(attempt, 1) == killed
    attempt.write(Failure(kind="work", rank=0, reason="the bucket is gone"))
    assert why(attempt, 1) == "the bucket is gone"


def test_a_run_folder_that_cannot_be_read_hides_no_other(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "state/dsno-cluster/runs/other"
    other.symlink_to(tmp_path / "locked")
    is_file = Path.is_file

    def denied(path: Path) -> bool:  # root, as which tests may run, is denied nothing
        if path.parent.name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)
    assert all_runs() == [run]
    assert "locked: left out: Permission denied" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("place", "name", "reason"),
    [("file", "digits", "Not a directory"), ("file/below", "digits", "Not a directory"),
     ("here", "n" * 240, "File name too long"), ("/proc/nowhere", "digits", "No such file or directory")],
)  # fmt: skip
def test_a_run_folder_that_cannot_be_made_is_one_line(
    place: str, name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    config = load_config("configs/digits.yaml", [f"run.dir={tmp_path / place}", f"name={name}"])
    with pytest.raises(WorkError) as told:
        new_run(config)
    assert f": cannot be made: {reason}; choose another run.dir or name" in str(told.value)
    assert "\n" not in str(told.value)


def test_runs_are_found_by_what_people_have_at_hand(run: Run) -> None:
    run.note(job="4711")
    for word in (run.id, run.id[:-2], "4711", str(run.folder)):
        assert find_run(word) == run
    with pytest.raises(UserError, match=f"the newest is {run.id}"):
        find_run("nothing")


def test_of_several_runs_the_one_that_has_not_ended_is_cancelled(run: Run) -> None:
    config = load_config("configs/digits.yaml", [f"storage.root={run.folder.parents[1]}"])
    other = new_run(config)
    alive = psutil.Process()
    for one, job in ((run, "none"), (other, str(alive.pid))):
        one.note(job=job, launcher="local", host=socket.gethostname(), submitted=alive.create_time())
    run.attempt(0).folder.mkdir(parents=True)
    run.attempt(0).write(Result(result="a student"))
    word = "digits-train"
    with pytest.raises(UserError, match="stands for 2 runs"):
        find_run(word)
    assert run_to_cancel(word) == other
    other.attempt(0).folder.mkdir(parents=True)
    other.attempt(0).write(Result(result="a student"))
    with pytest.raises(UserError, match="stands for 2 runs"):
        run_to_cancel(word)


@pytest.mark.parametrize("columns", [80, 160])
def test_status_is_read_on_any_terminal(run: Run, columns: int) -> None:
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "dsno_cluster.cli", "status"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    assert subprocess.run(command, stdout=terminal, env=environment, check=False).returncode == 0
    os.close(terminal)
    shown = os.read(ours, 1 << 16).decode()
    assert run.id in shown and "it was never submitted" in shown  # whole, not a letter a line
    assert ("last error: it was never submitted" in shown) == (columns == 80)


def test_a_cancelled_local_run_is_not_a_failed_one(run: Run) -> None:
    """Its processes are gone, and said nothing."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    run.note(job=str(gone.pid), launcher="local", host=socket.gethostname())
    assert states_of([run])[run].word == "failed"
    run.cancel()
    assert states_of([run])[run].word == "cancelled"


@pytest.mark.slow
def test_status_of_a_local_run(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "trajectories").symlink_to(tiny_data / "trajectories")
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "PATH": "/usr/bin:/bin"}
    words = ["train", *TINY, f"storage.root={tmp_path}", "--tasks-per-node", "2", "--launcher", "local"]
    assert "no submitted runs" in dsno("status", **state).stdout
    trained = dsno(*words, "training.threads=1", **state)
    assert trained.returncode == 0, trained.stderr
    (row,) = json.loads(dsno("status", "--json", **state).stdout)["runs"]
    assert (row["state"], row["done"], row["total"], row["attempts"]) == ("done", 4, 4, 1)
    assert "4/4 steps" in dsno("status", **state).stdout
    assert "training the student: 4/4 steps" in dsno("logs", **state).stdout
    assert "done already" in dsno("cancel", row["run"], **state).stderr


def test_a_message_that_cannot_be_printed_changes_no_exit_status() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "dsno_cluster.cli", "status", "no-such-run"]
        assert subprocess.run(command, stderr=full, check=False).returncode == 2


def test_how_an_attempt_ends_is_noted_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1m"):
        attempt = Run(tmp_path / "small/run").attempt(0)
        attempt.open(Begin())
        with pytest.raises(OSError, match="No space left"), (tmp_path / "small/full").open("wb") as full:
            full.write(bytes(2 << 20))
        failure = Failure(kind="work", reason="the disk is full", rank=0)
        for note in (failure, Stopped(why="preempted"), Outcome(state="again", reason="the disk is full")):
            attempt.note(note)
        attempt.note(Result(result="x" * 9000))  # there is no room for that much
        attempt.close()
        assert attempt.failure() == failure
        assert attempt.read(Stopped) and attempt.read(Outcome) and not attempt.read(Result)
        assert not list(attempt.folder.glob(".*"))


def test_attempts_that_slurm_takes_before_they_can_note_it_are_not_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by ten requeues in a row: Slurm kills the batch script with its tasks, and leaves a line in its log."""
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    taken = "slurmstepd-node1: error: *** JOB 2 ON node1 CANCELLED AT 2026-11-29T03:12:17 DUE TO JOB REQUEUE ***\n"
    for number in range(11):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        assert begin_or_end(["begin", str(run.folder)]) == 0
        with (run.folder / BATCH_LOG).open("a") as log:
            log.write(taken)
        if number % 4 == 1:  # the batch script had time
            run.attempt(number).write(Outcome(state="again", reason="it was requeued"))
        if number % 2 == 0:  # a rank had, which did not see the others end
            run.attempt(number).write(Failure(kind="work", reason=LONE_SIGNAL, rank=1))
