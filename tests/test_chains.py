"""Chains of jobs: what the beginning and the end of each of them decide, by what the others left in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dsno_cluster.cluster.attempt import FINISHED
from dsno_cluster.cluster.attempt import main as begin_or_end
from dsno_cluster.cluster.launchers import states_of
from dsno_cluster.cluster.records import AttemptProgress, AttemptRecord, Failure, Outcome, Result, Stopped
from dsno_cluster.cluster.runs import Run, create_run, find_run
from dsno_cluster.cluster.stage import Submission
from dsno_cluster.cluster.task import PLACE_IN_CHAIN
from dsno_cluster.config import load_config, load_profile
from dsno_cluster.stages import TRAIN

Asked = Callable[[], list[str]]
JOBS = ("10", "11", "12")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A chain of three, and Slurm's commands, which note what they are asked."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "bin").mkdir()
    for name, answer in (("scancel", ""), ("scontrol", "JobState=RUNNING Restarts=0"), ("squeue", "")):
        tool = tmp_path / "bin" / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/asked\necho "{answer}"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
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


@pytest.mark.parametrize(
    ("note", "status"),
    [
        (Result(result="there"), FINISHED),  # noted before its node was lost
        (Outcome(state="done"), FINISHED),
        (Outcome(state="failed", reason="a key is unknown"), 1),
        (Outcome(state="cancelled"), 1),
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
