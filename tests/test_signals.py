"""A signal that asks a task to end is never lost, whatever the task is doing while it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from submitit.core.utils import DelayedSubmission

from dsno_cluster.cluster.records import Stopped
from dsno_cluster.cluster.runs import create_run
from dsno_cluster.cluster.stage import StageResult, Submission
from dsno_cluster.cluster.task import StageTask
from dsno_cluster.config import load_config, load_profile
from dsno_cluster.stages import TRAIN
from dsno_cluster.training.preemption import StopSignals

FOREVER = 100.0
# what srun starts, as submitit does it; a signal may come as soon as submitit has set its handlers
PROCESS = """
import os, signal, sys
from submitit.core import job_environment, submission
handle = job_environment.JobEnvironment._handle_signals
def handle_and_signal(*words):
    handle(*words)
    if sys.argv[2] == "early":
        os.kill(os.getpid(), signal.SIGTERM)
job_environment.JobEnvironment._handle_signals = handle_and_signal
submission.process_job(sys.argv[1])
"""


def signal_me() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)


def runs_on(*_: Any) -> StageResult:
    time.sleep(FOREVER)
    return StageResult("never")


def both_at_once(*_: Any) -> StageResult:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2, signal.SIGTERM])
    return runs_on()


def swallows_it(*_: Any) -> StageResult:
    """As some packages do that try an import."""
    try:
        signal_me()
    except BaseException:  # noqa: BLE001
        print("swallowed", flush=True)
    return runs_on()


class Destroyed:
    def __del__(self) -> None:
        signal_me()


def is_signalled_in_a_destructor(*_: Any) -> StageResult:
    Destroyed()
    print("swallowed", flush=True)
    return runs_on()


def turns_it_into_an_error(*_: Any) -> StageResult:
    try:
        signal_me()
        return runs_on()
    except BaseException as error:
        raise ImportError("a package is missing") from error


def cleans_up(*_: Any) -> StageResult:
    try:
        signal_me()
        return runs_on()
    finally:
        time.sleep(2.5)
        print("cleaned up", flush=True)


@pytest.mark.parametrize(
    ("stage", "moment", "printed"),
    [
        (runs_on, "early", ""),
        (both_at_once, "later", ""),
        (swallows_it, "later", "swallowed"),
        (is_signalled_in_a_destructor, "later", "swallowed"),
        (turns_it_into_an_error, "later", ""),
        (cleans_up, "later", "cleaned up"),
    ],
)
def test_a_signal_while_a_task_starts_ends_it(
    stage: Any, moment: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    profile = load_profile(TRAIN.name, {})
    run = create_run(Submission(TRAIN, config, profile, "dsno-cluster train"), snapshot=False)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        task = StageTask(replace(TRAIN, work=stage), TRAIN.options(), str(run.folder))
        DelayedSubmission(task).dump(run.folder / "17_submitted.pkl")
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    local = {"EXECUTOR": "local", "LOCAL_JOB_ID": "17", "LOCAL_NTASKS": "2", "LOCAL_GLOBALID": "1"}
    environment = os.environ | {f"SUBMITIT_{name}": value for name, value in local.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(run.folder), moment],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and printed in done.stdout, done.stderr
    assert "race condition" not in done.stderr


@pytest.mark.parametrize("rank_0", ["stops too", "hears nothing"])
def test_a_rank_that_alone_is_told_to_end_ends_the_others(
    rank_0: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    run = create_run(
        Submission(TRAIN, config, load_profile(TRAIN.name, {}), "dsno-cluster train"), snapshot=False
    )
    DelayedSubmission(StageTask(TRAIN, TRAIN.options(), str(run.folder))).dump(
        run.folder / "17_submitted.pkl"
    )
    attempt = run.attempt(0)
    attempt.folder.mkdir(parents=True)
    if rank_0 == "stops too":
        attempt.note(Stopped(why="signal"))
    slurm = {
        "JOB_ID": "17",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "0",
        "NNODES": "1",
        "NODEID": "0",
        "JOB_NODELIST": "localhost",
    }
    environment = os.environ | {"SUBMITIT_EXECUTOR": "slurm"} | {f"SLURM_{k}": v for k, v in slurm.items()}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(run.folder), "early"],
        env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    failure = attempt.failure()
    if rank_0 == "stops too":
        assert done.returncode == 0 and failure is None, done.stderr
    else:
        assert done.returncode == 1 and failure is not None, done.stderr
        assert failure.rank == 1 and "no other" in failure.reason


def test_a_training_whose_signal_was_swallowed_ends_after_its_first_step() -> None:
    with StopSignals() as stop:
        swallows = False
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
        except KeyboardInterrupt:  # Preempted is one
            swallows = True
        stop.steps_begin()
        assert swallows and stop.preempt
