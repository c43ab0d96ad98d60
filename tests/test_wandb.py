"""Trainings in Weights & Biases, offline, with the real package: one run over all resumptions, and no key in a file."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, answer, dsno
from training_runs import STUDENT, link_data, metrics, words

from dsno_cluster.config import load_config
from dsno_cluster.errors import Preempted
from dsno_cluster.training.metrics_log import MetricsLine, MetricsLog, metrics_file

KEY = "0123456789abcdef" * 2 + "01234567"  # as long as a real one
PROJECT = "training.wandb={project: tests}"


def records(folder: Path) -> list[dict[str, Any]]:
    """What wandb's own reader finds in an offline folder."""
    (file,) = folder.glob("*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    surroundings = {**os.environ, "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=surroundings, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record[kind] for record in found if record["type"] == kind]


def starts(student: Path) -> list[Path]:
    return sorted((student / "wandb").glob("offline-run-*"))


def new_log(folder: Path, *overrides: str) -> MetricsLog:
    place = [f"run.dir={folder}", f"storage.root={folder}", *overrides]
    config = load_config("configs/digits.yaml", [*TINY, *place])
    metrics_file(config).parent.mkdir(parents=True, exist_ok=True)
    return MetricsLog(config, 0)


def line(step: int) -> MetricsLine:
    return MetricsLine(
        step=step,
        loss=1 / step,
        lr=0.1,
        seconds=1.0,
        distance_per_time=(None, 0.25),
        images_per_second=1.0,
        data_wait=0.0,
        memory_gb=0.0,
    )


@pytest.mark.slow
def test_a_resumed_training_is_one_run(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    link_data(tiny_data, out)
    surroundings = {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}  # the config decides
    tracked = [PROJECT, "training.heldout_every=2", "training.heldout_samples=8", "training.picture_every=2"]
    for steps in (2, 4):
        command = words(out, *tracked, f"training.steps={steps}", "training.lr_decay=none")
        done = dsno(*command, "--launcher", "local", **surroundings)
        assert done.returncode == 0, done.stderr
    first, second = map(records, starts(out / STUDENT))
    runs = [of_kind("run", found)[0] for found in (first, second)]
    assert runs[0]["run_id"] == runs[1]["run_id"] == (out / STUDENT / "wandb/id").read_text()
    assert all(
        run["project"] == "tests" and run["resume"] and run["display_name"] == "digits" for run in runs
    )
    assert runs[1]["config"]["update"]["training"]["steps"] == 4
    history = [record["item"] for found in (first, second) for record in of_kind("history", found)]
    assert [row["_step"] for row in history] == [1, 2, 3, 4]
    for row, expected in zip(history, metrics(out), strict=True):
        assert row["loss"] == expected["loss"] and row["lr"] == expected["lr"]
        assert row["distance_per_time/0"] == expected["distance_per_time"][0]
    assert history[-1]["heldout_error_per_time/3"] == metrics(out)[-1]["heldout_error_per_time"][3]
    # its reader flattens what is nested
    assert history[-1]["samples._type"] == "images/separated"
    (second_start,) = starts(out / STUDENT)[1:]
    assert all((second_start / "files" / name).is_file() for name in history[-1]["samples.filenames"])
    assert of_kind("exit", second)[0]["exit_code"] == 0
    leaked = [file for file in out.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert leaked == [] and KEY not in done.stderr


def test_a_failed_training_is_marked(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_log(tmp_path, PROJECT) as log:
        log.write(line(1))
        raise ZeroDivisionError
    (folder,) = starts(tmp_path / STUDENT)
    assert of_kind("exit", records(folder))[0]["exit_code"] == 1


def test_training_survives_the_end_of_its_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import psutil

    before = set(psutil.Process().children())
    with new_log(tmp_path, PROJECT) as log:
        log.write(line(1))
        (process,) = set(psutil.Process().children()) - before
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        log.write(line(2))
        log.write(line(3))
        log.picture(3, b"", torch.zeros(2, 1, 8, 8))
    assert [row["step"] for row in map(json.loads, log.file.read_text().splitlines())] == [1, 2, 3]
    assert capsys.readouterr().err.count("training.wandb: gets no more figures") == 1


def test_training_survives_the_end_of_its_process_while_it_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What wandb then raises has no class in common with its other errors."""
    from wandb.sdk.mailbox import HandleAbandonedError

    def abandoned(**_: object) -> None:
        raise HandleAbandonedError

    with pytest.raises(Preempted), new_log(tmp_path, PROJECT) as log:
        (tracker,) = log.trackers
        tracker.run.finish, finish = abandoned, tracker.run.finish
        tracker.wandb.teardown, teardown = abandoned, tracker.wandb.teardown
        raise Preempted
    tracker.wandb.teardown = teardown
    finish()
    teardown()
    assert "training.wandb: gets no more figures" in capsys.readouterr().err


def test_a_tracker_that_cannot_be_closed_leaves_no_other_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(OSError, match="No space"),
        new_log(tmp_path, PROJECT, "training.tensorboard=true") as log,
    ):
        log.write(line(1))
        monkeypatch.setattr(log.trackers[0], "close", full)
    (folder,) = starts(tmp_path / STUDENT)
    assert of_kind("exit", records(folder))[0]["exit_code"] == 0


@pytest.mark.parametrize(
    "override",
    [
        f"training.wandb.api_key={KEY}",
        f"training.wandb={{project: tests, api_key: {KEY}}}",
        f"training.wandb={{project: tests, WANDB_TOKEN: {KEY}}}",
        f"training.wandb={KEY}",
        f"training.wandb={{project: {KEY}}}",
        f"training.wandb={{project: tests, entity: wandb_v1_{KEY}}}",
    ],
)
def test_a_key_in_a_config_is_refused_and_not_repeated(override: str, tmp_path: Path) -> None:
    told = answer("train", *TINY, f"storage.root={tmp_path}", override, "--launcher", "local")
    assert told.returncode == 2 and len(told.stderr.splitlines()) == 1
    assert "training.wandb" in told.stderr and KEY not in told.stdout + told.stderr
    assert list(tmp_path.iterdir()) == []


def test_online_needs_a_key_and_the_package_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsno_cluster.errors import UserError

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    with pytest.raises(UserError, match=r"No API key configured.*`wandb login`.*mode: offline"):
        new_log(tmp_path, "training.wandb={project: tests, mode: online}")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        new_log(tmp_path, PROJECT)
