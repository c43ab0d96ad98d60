"""A run in which nothing fails prints no warning of a library, compiles nothing and leaves nothing."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
from tiny import TINY, dsno
from training_runs import link_data, train, words

from dsno_cluster.cluster.records import Failure
from dsno_cluster.cluster.runs import Run
from dsno_cluster.cluster.submitit_internals import start_on_this_machine

COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "clang++", "nvcc", "ninja", "x86_64-linux-gnu-gcc")

pytestmark = pytest.mark.slow


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compilers that are found first, and do nothing but note in this file that they were called."""
    called, folder = tmp_path / "called", tmp_path / "cuda" / "bin"
    folder.mkdir(parents=True)
    for name in COMPILERS:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {called}\nexit 1\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(folder.parent))
    called.touch()
    return called


def test_two_ranks_train_without_a_warning_or_a_compiler(
    compilers: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    done = dsno(
        *words(out),
        "--launcher", "local", "--tasks-per-node", "2",
        PYTHONWARNINGS="default,ignore::ResourceWarning",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logs = [log.read_text() for log in out.glob("jobs/*/submitit/*_log.*")]
    assert len(logs) == 4
    for said in (done.stdout, done.stderr, *logs):
        assert "arning" not in said and "WARN" not in said and "CUDA" not in said, said
    assert compilers.read_text() == ""


# As with a GPU, except that there is none: DeepSpeed then has operators for CUDA, and asks nvcc about them.
FOR_CUDA = """
from dsno_cluster.training.deepspeed_internals import import_deepspeed
deepspeed = import_deepspeed()
assert deepspeed.get_accelerator().device_name() == "cuda"
from deepspeed.comm.torch import build_shm_op
assert build_shm_op() is None
"""


def test_deepspeed_for_cuda_asks_no_compiler(compilers: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOR_CUDA],
        env={**os.environ, "DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "" and compilers.read_text() == ""


# In one process, as `run` has its stages: the second training makes groups of its own again.
TWICE = """
import gc
import sys
import torch.distributed as dist
from dsno_cluster.config import load_config
from dsno_cluster.stages import TRAIN
from dsno_cluster.students.dsno import DSNO

path, *overrides = sys.argv[1:]
for number in range(2):
    config = load_config(path, [*overrides, f"name=student-{number}"])
    TRAIN.run(config, TRAIN.options(), None, None)
    left = [found for found in gc.get_objects() if isinstance(found, DSNO)]
    assert not left, [type(found) for found in gc.get_referrers(left[0])]
    assert not dist.is_initialized()
"""


def test_a_training_leaves_neither_student_nor_group(tiny_data: Path, tmp_path: Path) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    overrides = words(out)[1:]
    done = subprocess.run(
        [sys.executable, "-c", TWICE, "configs/digits.yaml", *overrides],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train(tiny_data, out, "name=student-2")
    students = [
        (out / f"students/student-{n}/step-000000004/model.safetensors").read_bytes() for n in (0, 1, 2)
    ]
    assert students[0] == students[1] == students[2]


def die_or_wait(run: str) -> str:
    """As with NCCL: what a rank waits for that was lost never comes, and it hears no signal of Python's."""
    rank = int(os.environ["SUBMITIT_LOCAL_GLOBALID"])
    Path(run, f"started-{rank}").write_text(str(os.getpid()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while rank == 0 or not Path(run, "started-0").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGABRT)
    return "never"


def test_a_rank_that_is_lost_ends_the_others_in_our_words(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.attempt(0).folder.mkdir(parents=True)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        task = functools.partial(die_or_wait, str(tmp_path))
        job = start_on_this_machine(task, tmp_path / "submitit", 2, tmp_path / "errors", {})
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    os.waitpid(int(job), 0)
    assert not psutil.pid_exists(int((tmp_path / "started-0").read_text()))
    failure = run.attempt(0).read(Failure) or run.attempt(0)._failures()[0]
    assert failure.rank == 1 and failure.kind == "work"
    assert "was ended by SIGABRT; the same command resumes" in failure.reason


# One GPU, though torch sees none: Ray hands out shares of what it is told.
SHARED = """
import sys
from dsno_cluster import device
from dsno_cluster.cli import main

device.visible_gpus = lambda: 1
sys.exit(main(sys.argv[1:]))
"""


def test_actors_that_share_a_gpu_make_the_same_bytes(tiny_data: Path, tmp_path: Path) -> None:
    command = ["gen-trajectories", *TINY, f"storage.root={tmp_path}", "--launcher", "local"]
    done = subprocess.run(
        [sys.executable, "-c", SHARED, *command, "--gpus-per-actor", "0.25", "--actors", "3"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "99"},  # by which Ray checks that number
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 actor(s) of 1 thread(s) and 0.25 GPU" in done.stderr
    made, others = (
        {p.name: p.read_bytes() for p in root.glob("trajectories/*/shard-*")}
        for root in (tmp_path, tiny_data)
    )
    assert len(made) == 6 and made == others
