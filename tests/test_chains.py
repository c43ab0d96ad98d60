"""Chains and arrays of jobs: what the beginning and the end of each decide, by what the others left in the run folder."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from dsno_cluster.cluster.attempt import FINISHED
from dsno_cluster.cluster.attempt import main as begin_or_end
from dsno_cluster.cluster.launchers import State, states_of
from dsno_cluster.cluster.launchers.protocol import state_of_array
from dsno_cluster.cluster.records import AttemptProgress, AttemptRecord, Failure, Outcome, Result, Stopped
from dsno_cluster.cluster.runs import Run, create_run, find_run
from dsno_cluster.cluster.stage import SharedOptions, Submission
from dsno_cluster.cluster.status import history, log_lines, overview
from dsno_cluster.cluster.task import PLACE_IN_CHAIN
from dsno_cluster.config import load_config, load_profile
from dsno_cluster.errors import UserError
from dsno_cluster.stages import GEN_TRAJECTORIES, TRAIN

Asked = Callable[[], list[str]]
# two tasks of the array 10, as squeue lists them
QUEUE = "10_1|RUNNING|None|node1|2026-11-29T03:12:17|node1\\n10_2|PENDING|Resources|||"
JOBS = ("10", "11", "12")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands, which note what they are asked."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "bin").mkdir()
    for name, answer in (
        ("scancel", ""),
        ("scontrol", "JobState=RUNNING Restarts=0"),
        ("squeue", QUEUE),
    ):
        tool = tmp_path / "bin" / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/asked\necho "{answer}"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")


@pytest.fixture
def run(slurm: None, tmp_path: Path) -> Run:
    """A chain of three."""
    profile = load_profile(TRAIN.name, {"chain": len(JOBS)})
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    made = create_run(Submission(TRAIN, config, profile, "dsno-cluster train"), snapshot=False)
    made.note(job=JOBS[0], successors=JOBS[1:], launcher="slurm")
    return made


@pytest.fixture
def cancelled(tmp_path: Path) -> Asked:
    """The jobs that Slurm was asked to cancel so far."""

    def read() -> list[str]:
        asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
        return [job for line in asked.splitlines() if line.startswith("scancel") for job in line.split()[1:]]

    return read


def at(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE_IN_CHAIN, str(place))
    monkeypatch.setenv("SLURM_JOB_ID", JOBS[place])


def begin(run: Run, place: int, monkeypatch: pytest.MonkeyPatch) -> int:
    at(place, monkeypatch)
    return begin_or_end(["begin", str(run.folder)])


def end(run: Run, status: int = 1) -> int:
    return begin_or_end(["end", str(run.folder), str(status)])


def outcome(run: Run, number: int) -> tuple[str, str]:
    found = run.attempt(number).read(Outcome)
    assert found is not None
    return found.state, found.reason


def test_each_job_continues_what_the_one_before_left(
    run: Run, cancelled: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(3):
        assert run.job == JOBS[place]
        assert begin(run, place, monkeypatch) == 0
        run.attempt(place).write(AttemptProgress(title="training", start=place, reached=place))
        run.attempt(place).note(Stopped(why="time limit"))
        assert end(run, 0) == 1
    assert [outcome(run, place)[0] for place in range(3)] == ["again", "again", "failed"]
    assert outcome(run, 0)[1] == "its time limit was near"
    assert outcome(run, 2)[1].endswith("it was the last of the 3 jobs of its chain: the same command resumes")
    assert not cancelled()
    assert [find_run(job) for job in JOBS] == [run] * 3
    assert states_of([run])[run].word == "failed"


def test_the_others_are_cancelled_when_one_is_done(
    run: Run, cancelled: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run, 0, monkeypatch)
    run.attempt(0).note(Result(result="there"))
    assert end(run) == 0 and cancelled() == ["11", "12"]


def test_an_outcome_stands_if_the_others_cannot_be_cancelled(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    begin(run, 0, monkeypatch)
    run.attempt(0).note(Result(result="there"))
    monkeypatch.setattr("dsno_cluster.cluster.attempt.cancel_jobs", fails)
    assert end(run) == 0 and outcome(run, 0) == ("done", "")


@pytest.mark.parametrize(
    ("note", "status"),
    [
        (Result(result="there"), FINISHED),  # noted before its node was lost
        (Outcome(state="done"), FINISHED),
        (Outcome(state="failed", reason="a key is unknown"), 1),
        (Outcome(state="cancelled"), 1),
        (Stopped(why="cancelled"), 1),  # noted before its batch script was killed as well
    ],
)
def test_a_job_that_begins_after_the_end_ends_at_once(
    note: AttemptRecord, status: int, run: Run, cancelled: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run, 0, monkeypatch)
    run.attempt(0).write(note)
    assert begin(run, 1, monkeypatch) == status
    assert len(run.attempts()) == 1 and cancelled() == ["12"]


def test_an_error_of_the_user_is_not_repeated(
    run: Run, cancelled: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run, 0, monkeypatch)
    run.attempt(0).note(Failure(kind="user", reason="no such teacher", rank=0))
    assert end(run) == 2
    assert outcome(run, 0) == ("failed", "no such teacher") and cancelled() == ["11", "12"]


def test_jobs_without_progress_are_given_up(
    run: Run, cancelled: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = run.folder / "profile.yaml"
    profile.write_text(profile.read_text().replace("retries: 3", "retries: 1"))
    for place in range(2):
        assert begin(run, place, monkeypatch) == 0
        run.attempt(place).note(Failure(kind="work", reason="the GPU fell off", rank=0))
        assert end(run) == 1
    assert outcome(run, 0) == ("again", "the GPU fell off")
    assert outcome(run, 1)[1].startswith("given up: 2 attempts in a row made no progress")
    assert cancelled() == ["12"]


@pytest.mark.parametrize("done", [True, False])
def test_the_second_begins_only_if_the_stage_before_is_done(
    done: bool, run: Run, cancelled: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm cancels the first job if that stage fails, and then starts the second."""
    before = create_run(Submission(TRAIN, run.config(), run.profile(), "dsno-cluster train"), snapshot=False)
    if done:
        before.attempt(0).folder.mkdir(parents=True)
        before.attempt(0).write(Result(result="there"))
    run.note(after=str(before.folder))
    assert begin(run, 1, monkeypatch) == (0 if done else 1)
    if not done:
        assert outcome(run, 1) == ("cancelled", "the stage that it waited for did not succeed")
        assert cancelled() == ["12"]


@pytest.mark.parametrize(
    ("job", "advice"),
    [
        ("11", "`scancel 11` lets the next job of its chain continue"),
        ("12", "it is the last of its chain: `scancel 12`, then the same command resumes"),
    ],
)
def test_what_lets_work_continue_whose_first_node_is_lost(
    job: str, advice: str, slurm: None, tmp_path: Path
) -> None:
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    profile = load_profile(GEN_TRAJECTORIES.name, {"chain": len(JOBS)})
    run = create_run(Submission(GEN_TRAJECTORIES, config, profile, "dsno-cluster"), snapshot=False)
    run.note(job=JOBS[0], successors=JOBS[1:], launcher="slurm")
    listed = f"{job}|RUNNING|None|node2|2026-11-29T03:12:17|node1"
    (tmp_path / "bin/squeue").write_text(f"#!/bin/sh\necho '{listed}'\n")
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho node2\n")
    found = states_of([run])[run]
    assert found.word == "stalled" and found.why.endswith(advice), found


@pytest.mark.parametrize("chain", [1, 3])
def test_preempted_where_slurm_must_not_requeue(
    chain: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain continues; a job by itself is cancelled, as its partition says."""
    profile = run.folder / "profile.yaml"
    profile.write_text(profile.read_text().replace("chain: 3", f"chain: {chain}"))
    fields = (
        "JobState=COMPLETING Restarts=0 RunTime=00:01:00 TimeLimit=01:00:00 PreemptTime=2026-11-29T03:12:17"
    )
    (tmp_path / "bin/scontrol").write_text(f"#!/bin/sh\necho {fields}\n")
    begin(run, 0, monkeypatch)
    end(run)
    assert outcome(run, 0)[0] == ("again" if chain > 1 else "cancelled")


@pytest.fixture
def array(slurm: None, tmp_path: Path) -> Run:
    """An array of three tasks."""
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    profile, options = load_profile(GEN_TRAJECTORIES.name, {}), SharedOptions(array=3)
    submission = Submission(GEN_TRAJECTORIES, config, profile, "dsno-cluster", options)
    made = create_run(submission, snapshot=False)
    made.note(job="10", launcher="slurm")
    for place, task in enumerate(made.tasks):
        task.note(job=f"10_{place}", launcher="slurm")
    return made


def test_a_task_of_an_array_begins_and_ends_by_itself(
    array: Run, cancelled: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until one is done: then those that wait are cancelled, and one that begins all the same ends at once."""
    monkeypatch.setenv(
        "SLURM_JOB_ID", "10"
    )  # as the last task of an array has it, which stands for all of them
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    first, second, third = array.tasks
    for place, task in enumerate((first, second)):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(place))
        assert begin_or_end(["begin", str(task.folder)]) == 0
        task.attempt(0).write(AttemptProgress(title="solving", start=0, reached=0, done=place, total=9))
    first.attempt(0).note(Failure(kind="user", reason="another kind of device", rank=0))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert end(first) == 2 and not cancelled()
    assert "scontrol show job -o 10_0\n" in (tmp_path / "asked").read_text()  # not the whole array
    (row,) = overview([array])
    assert (row.state, row.why, row.job, row.attempts) == (
        "running",
        "1 failed, 1 running, 1 waiting: for free nodes",
        "10",
        2,
    )
    assert (row.done, row.total, row.last_error) == (1, 9, "task 0: another kind of device")

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    second.attempt(0).note(Result(result="there"))
    assert end(second, 0) == 0 and cancelled() == ["--state=PENDING", "10"]
    assert begin_or_end(["begin", str(third.folder)]) == FINISHED and not third.attempts()
    assert states_of([array])[array].word == "done"
    assert history(array) == ["task 0, attempt 0: another kind of device"]
    assert [find_run(word) for word in ("10", "10_2")] == [array] * 2
    (second.attempt(0).log(0)).write_text("solved\n")
    assert list(log_lines(array, 1, None, follow=False)) == ["solved"]
    with pytest.raises(UserError, match=r"--rank 3: .* is an array of 3 tasks, counted from 0"):
        list(log_lines(array, 3, None, follow=False))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["failed", "running"], "running"),
        (["failed", "waiting", "ending"], "ending"),
        (["done", "running", "failed"], "done"),
        (["failed", "cancelled"], "cancelled"),
        (["ended", "failed"], "failed"),
    ],
)
def test_the_state_of_an_array(words: list[str], found: str) -> None:
    assert state_of_array([State(word) for word in words]).word == found
