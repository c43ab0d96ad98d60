"""The host waits for no figure of a training step: as on a GPU, they are read when the next step is on its way, or due."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import checkpoints, link_data, metrics, train, weights, words

# A training on the CPU as a GPU would have it: what an operation would read back from the device is counted, by step.
COUNTED = """
import json, os, signal, sys
sys.path.insert(0, "tests")
from collections import Counter
import torch
from gpu_tensors import READS
from torch.utils._python_dispatch import TorchDispatchMode
from dsno_cluster.config import load_config
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.training import engine, loop, readback
from dsno_cluster.training.objectives.trajectories import TrajectoryObjective

class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if on_the_host:
            return func(*args, **(kwargs or {}))
        # aten::lift_fresh: a tensor of numbers on the host, which would be copied to the device, and waited for
        if name in (*READS, "aten::_local_scalar_dense", "aten::lift_fresh"):
            reads[name] += 1
        return func(*args, **(kwargs or {}))

on_the_host = []
def of_the_host(call):  # what works with numbers on the host with a GPU too
    def unseen(*args, **more):
        on_the_host.append(call)
        try:
            return call(*args, **more)
        finally:
            on_the_host.pop()
    return unseen

as_asked, fused = readback.Readback, engine.make_optimizer
class Behind(as_asked):
    def __init__(self, ranks):
        super().__init__(ranks, behind=True)
    def send(self, step, *more):
        super().send(step, *more)
        by_step[step + 1] = dict(reads)
        reads.clear()
reads, by_step = Counter(), {}
loop.Readback = Behind
if sys.argv[1] == "count":
    engine.make_optimizer = lambda *a, **k: fused(*a, **{**k, "fused": True})
    DSNO._checked = of_the_host(DSNO._checked)  # test_gpu_layout.py shows it
    TrajectoryObjective.summary = of_the_host(TrajectoryObjective.summary)
    torch.nn.functional.one_hot = of_the_host(torch.nn.functional.one_hot)  # on a GPU it does not look at the labels
    with Reads():
        loop.train(load_config("configs/digits.yaml", sys.argv[2:]))
else:
    loss = TrajectoryObjective.loss
    def with_an_accident(self, student, batch, step):
        if sys.argv[1] == "signal" and step == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        found, figures = loss(self, student, batch, step)
        return found, figures * float("nan") if sys.argv[1] == f"nan {step + 1}" else figures
    TrajectoryObjective.loss = with_an_accident
    loop.train(load_config("configs/digits.yaml", sys.argv[2:]))
print(json.dumps(by_step))
"""
STEPS = ("training.steps=7", "training.log_every=100", "training.checkpoint_every=4")


def behind(out: Path, what: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COUNTED, what, *words(out, *STEPS, *more)[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("more", [[], pytest.param(["training.accumulation=2"], marks=pytest.mark.slow)])
def test_a_step_reads_nothing_back_unless_it_is_due(more: list[str], tiny_data: Path, tmp_path: Path) -> None:
    done = behind(link_data(tiny_data, tmp_path), "count", *more)
    assert done.returncode == 0, done.stderr
    reads = {int(step): found for step, found in json.loads(done.stdout.splitlines()[-1]).items()}
    assert sorted(reads) == list(range(1, 8))
    # steps 4 and 7 are saved: what that reads shows in the step after
    assert {step: reads[step] for step in (2, 3, 4, 6, 7)} == {step: {} for step in (2, 3, 4, 6, 7)}, reads


@pytest.mark.slow
def test_the_numbers_are_those_of_a_training_that_waits(tiny_data: Path, tmp_path: Path) -> None:
    done = behind(link_data(tiny_data, tmp_path / "behind"), "train", "training.log_every=2")
    assert done.returncode == 0, done.stderr
    train(tiny_data, tmp_path / "waits", *STEPS, "training.log_every=2")
    one, other = (weights(tmp_path / name, 7) for name in ("behind", "waits"))
    assert all(one[name].equal(other[name]) for name in one)
    lines = [metrics(tmp_path / name) for name in ("behind", "waits")]
    same = ("step", "loss", "lr", "distance_per_time")
    assert [[line[key] for key in same] for line in lines[0]] == [
        [line[key] for key in same] for line in lines[1]
    ]


@pytest.mark.parametrize(
    ("what", "says", "saved"),
    [
        ("nan 3", "step 3: the loss is not finite; the batch: samples ", []),  # read only when step 4 is due
        pytest.param(
            "nan 4", "step 4: the loss is not finite; the batch: samples ", [], marks=pytest.mark.slow
        ),
        # it came in step 2
        pytest.param("signal", "stopped by a signal: saved at step 3", [3], marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_read_late_is_judged_before_anything_is_saved(
    what: str, says: str, saved: list[int], tiny_data: Path, tmp_path: Path
) -> None:
    done = behind(link_data(tiny_data, tmp_path), what)
    assert done.returncode != 0 and says in done.stderr, done.stderr
    assert checkpoints(tmp_path) == saved
