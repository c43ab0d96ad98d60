"""An evaluation that is stopped within a row of the teacher: its images are kept, and only the others are drawn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, dsno
from training_runs import train, wait_for

from dsno_cluster.config import load_config
from dsno_cluster.evaluation.kept_rows import FOLDER, KeptRows
from dsno_cluster.provenance import Environment
from dsno_cluster.storage import FolderStorage
from dsno_cluster.teachers import compared_samplings, find_teacher
from dsno_cluster.trajectories.spec import spec_of

# The shipped teacher, which notes its calls for a block of 50 samples and comes no further than MOST of them, if that is set.
STOPPING = """
import os
import time
from pathlib import Path
from dsno_cluster import load_teacher

class Stopping:
    shape, num_classes, null_class = (1, 8, 8), 10, 10
    def __init__(self, folder):
        self.teacher, self.folder, self.calls = load_teacher("package:digits-teacher"), Path(folder), 0
    def __call__(self, x, t, labels=None):
        if len(x) == 50:
            self.calls += 1
            while self.calls > int(os.environ.get("MOST", 1000)):
                time.sleep(0.1)
            with (self.folder / "calls").open("a") as file:
                file.write("x")
        return self.teacher(x, t, labels)
"""
HERE = Environment(device="a chip", versions={"torch": "1"})


def kept_rows(root: Path, *words: str) -> tuple[KeptRows, list[Any]]:
    config = load_config("configs/digits.yaml", [*TINY, f"storage.root={root}", *words])
    teacher = find_teacher(config)
    rows = KeptRows(FolderStorage(root), spec_of(config, teacher), config.evaluation)
    return rows, compared_samplings(config, teacher)


def test_only_what_is_whole_and_of_the_same_row_and_chip_is_taken(tmp_path: Path) -> None:
    rows, (one, two, *_) = kept_rows(tmp_path)
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    samples = range(50, 100)
    assert rows.read(one, HERE, samples) is None and rows.count([one]) == 0
    rows.keep(one, HERE, samples, images)
    kept = rows.read(one, HERE, samples)
    assert kept is not None and torch.equal(kept, images)
    assert rows.count([one]) == 50 and rows.count([two]) == 0 and rows.count([one, two]) == 50
    assert rows.read(one, HERE, range(50)) is None and rows.read(two, HERE, samples) is None
    for other in (
        HERE.model_copy(update={"device": "another chip"}),
        HERE.model_copy(update={"versions": {"torch": "2"}}),
    ):
        assert rows.read(one, other, samples) is None
    for words in (
        "evaluation.seed=7",
        "evaluation.threads=2",
        "teacher.precision=bfloat16",
        "trajectories.clip_denoised=true",
        "trajectories.guidance_scale=2.0",
        "evaluation.batch_size=25",
    ):
        others, (same, *_) = kept_rows(tmp_path, words)
        assert others.read(same, HERE, samples) is None and others.count([same]) == 0, words
    # metrics, and how many samples there are, are none of its business
    others, (same, *_) = kept_rows(tmp_path, "evaluation.metrics=[kid]", "evaluation.num_samples=1000")
    assert others.read(same, HERE, samples) is not None
    (file,) = (tmp_path / FOLDER).iterdir()
    data = file.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert rows.read(one, HERE, samples) is None
    rows.drop([two])
    assert file.exists()
    rows.drop([one])
    assert not file.exists()


def test_a_storage_that_takes_nothing_does_not_end_the_evaluation(tmp_path: Path) -> None:
    rows, (one, *_) = kept_rows(tmp_path)
    (tmp_path / "evaluation").write_bytes(b"no folder")
    rows.keep(one, HERE, range(50), torch.zeros(50, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.slow
def test_an_evaluation_killed_within_a_row_goes_on_within_it(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_data, tmp_path / "trained")
    (tmp_path / "stopping_teacher.py").write_text(STOPPING)

    def words(root: Path) -> list[str]:
        shutil.copytree(tmp_path / "trained/students", root / "students", dirs_exist_ok=True)
        teacher = f"teacher.options={{folder: '{tmp_path}'}}"
        where = [f"storage.root={root}", "teacher.path=stopping_teacher:Stopping", teacher]
        return ["eval", *TINY, *where, "--launcher", "local", "--actors", "1"]

    def calls() -> int:
        done = len((tmp_path / "calls").read_text())
        (tmp_path / "calls").unlink()
        return done

    def rows_of(root: Path) -> Any:
        return json.loads((root / "evaluation/digits/metrics.json").read_text())["teacher_rows"]

    killed = words(tmp_path / "killed")
    path = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    first = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *killed],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **path, "MOST": "20"},
    )
    kept = tmp_path / "killed" / FOLDER
    wait_for(lambda: (tmp_path / "calls").exists() and (tmp_path / "calls").stat().st_size == 20)
    wait_for(lambda: len(list(kept.glob("*-shard-*"))) >= 3)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert calls() == 20 and not (kept.parent / "digits/metrics.json").exists()
    sys.path.append(str(tmp_path))
    try:
        rows, samplings = kept_rows(
            tmp_path / "killed", *[word for word in killed if word.startswith("teacher.")]
        )
    finally:
        sys.path.remove(str(tmp_path))
    saved = sum(rows.count([sampling]) // 50 * sampling.evaluations for sampling in samplings)
    assert 6 <= saved <= 20

    again = dsno(*killed, **path)
    assert again.returncode == 0, again.stderr
    assert "of the teacher's samples are kept from an evaluation that did not finish" in again.stderr
    made_again = calls()
    assert not list(kept.glob("*-shard-*"))  # the rows are recorded
    whole = dsno(*words(tmp_path / "whole"), **path)
    assert whole.returncode == 0, whole.stderr
    assert made_again == calls() - saved
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
