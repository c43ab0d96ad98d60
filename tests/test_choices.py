"""What a training decides when it begins: precision, what is compiled, and how many micro-batches fit into memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from gpu_tensors import CUDA
from tiny import TINY
from torch import nn
from torch._dynamo.utils import counters
from training_runs import STUDENT, link_data, metrics, train, weights

from dsno_cluster.config import Config, load_config
from dsno_cluster.students import dsno
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.torch_internals import run_what_cannot_be_compiled
from dsno_cluster.training import choices
from dsno_cluster.training.beginning import Beginning, make_student
from dsno_cluster.training.checkpoint import CheckpointState
from dsno_cluster.training.memory import TrainingMemory, training_memory
from dsno_cluster.training.ranks import Ranks

CPU = Ranks(0, 0, 1, torch.device("cpu"))
GPU = replace(CPU, device=CUDA)
DRAWN = ["student={operator: convolution, modes: 3, points: drawn}", "training.most_points=3"]


def configured(*more: str) -> Config:
    return load_config("configs/digits.yaml", [*TINY, "training.batch_size=24", *more])


def saved(config: Config, **more: Any) -> CheckpointState:
    """The state of an earlier run, as far as choices look at it."""
    return cast(CheckpointState, SimpleNamespace(step=2, world_size=1, accumulation=None, **more))


@pytest.fixture
def a_gpu_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)


@pytest.mark.usefixtures("a_gpu_with_bfloat16")
def test_precision_is_that_of_the_device_and_stays() -> None:
    auto = configured("training.precision=auto")
    for ranks, precision in ((CPU, "float32"), (GPU, "bfloat16")):
        assert choices.decide(auto, ranks, None).training.precision == precision
        kept = choices.decide(auto, ranks, saved(auto, precision="float16"))
        assert kept.training.precision == "float16"
        asked = configured("training.precision=tf32")
        assert choices.decide(asked, ranks, saved(asked, precision="float16")).training.precision == "tf32"


@pytest.mark.usefixtures("a_gpu_with_bfloat16")
@pytest.mark.parametrize(
    ("ranks", "more", "compiled"),
    [
        (GPU, [], True),
        (CPU, [], False),
        (CPU, ["training.compile=true"], True),
        (GPU, ["training.compile=false"], False),
        (GPU, ["training.steps=999"], False),
        (replace(GPU, world_size=2), ["training.zero_stage=3"], False),
        (replace(GPU, world_size=2), ["training.zero_stage=2"], True),
    ],
)
def test_a_gpu_compiles_what_is_worth_it(
    ranks: Ranks, more: list[str], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_fail: list[bool] = []
    monkeypatch.setattr(choices, "run_what_cannot_be_compiled", lambda: may_fail.append(True))
    config = configured("training.steps=1000", *more)
    assert choices.decide(config, ranks, None).training.compile is compiled
    assert bool(may_fail) is (compiled and "training.compile=true" not in more)  # what nobody asked for


def fitted(config: Config, gigabytes: float, state: CheckpointState | None = None, **more: Any) -> int:
    beginning = cast(Beginning, SimpleNamespace(backbone=None, network=None, state=state))
    student = make_student(config, None)
    decided = choices.decide_accumulation(
        config, CPU, beginning, student, free=lambda device: int(gigabytes * 1e9), **more
    )
    return decided.training.micro_batches


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, which has nobody to agree with."""
    monkeypatch.setattr(choices, "_smallest", lambda count, ranks: count)


@pytest.mark.usefixtures("alone")
def test_the_largest_micro_batch_that_fits_with_a_tenth_to_spare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured("training.accumulation=auto", "training.precision=float32")
    memory = training_memory(config, device="cpu")
    monkeypatch.setattr(choices, "training_memory", lambda *_, **__: memory)  # it takes seconds
    for micro_batch, accumulation in ((24, 1), (12, 2), (8, 3), (1, 24)):
        enough = memory.at(micro_batch).total / 0.9 / 1e9 + 1e-6
        assert fitted(config, enough) == accumulation
        assert f"{accumulation} micro-batch(es) of {micro_batch} images" in capsys.readouterr().err
        if micro_batch > 1:
            assert fitted(config, enough - 2e-6) > accumulation
    assert fitted(config, 0.0) == 24  # nothing fits: the least
    assert fitted(configured("training.accumulation=2"), 0.0) == 2
    before = saved(config)
    before.accumulation = 4
    assert fitted(config, 100.0, before) == 4
    before.world_size = 2
    assert fitted(config, 100.0, before) == 1


@pytest.mark.usefixtures("alone")
def test_what_does_not_fit_when_it_is_tried_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("training.accumulation=auto", "training.precision=float32")
    tried = []

    def pass_in_little_memory(student: DSNO, distance: Any, config: Config, images: int, device: Any) -> None:
        tried.append(images)
        if images > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    memory = TrainingMemory(0, 0, 0, 0, 0, 0, 0, 0, per_image=1, micro_batch=24)
    monkeypatch.setattr(choices, "training_memory", lambda *_, **__: memory)
    monkeypatch.setattr(choices, "one_pass", pass_in_little_memory)
    assert fitted(config, 100.0, tries=True) == 4
    assert tried == [24, 12, 8, 6]


def test_the_memory_that_a_cgroup_leaves(tmp_path: Path) -> None:
    own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
    folder = tmp_path / own
    folder.mkdir(parents=True, exist_ok=True)
    assert choices._left_in_cgroup(tmp_path) == []
    (folder / "memory.current").write_text("300\n")
    for limit, left in (("max", []), ("1000", [700])):
        (folder / "memory.max").write_text(f"{limit}\n")
        assert choices._left_in_cgroup(tmp_path) == left
    assert choices.free_memory(torch.device("cpu")) > 0


@pytest.mark.slow
def test_the_choice_is_recorded_and_a_resumed_run_takes_it(tiny_data: Path, tmp_path: Path) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    done = train(tiny_data, out, "training.accumulation=auto")
    assert "training.accumulation auto: 1 micro-batch(es) of 16 images on each rank" in done.stderr
    meta = json.loads((out / STUDENT / "step-000000002/meta.json").read_text())
    assert (meta["accumulation"], meta["precision"], meta["compiled"]) == (1, "float32", False)
    shutil.rmtree(out / STUDENT / "resume/step-000000004")
    shutil.rmtree(out / STUDENT / "step-000000004")
    state_file = out / STUDENT / "resume/step-000000002/state.json"
    state_file.write_text(state_file.read_text().replace('"accumulation": 1', '"accumulation": 4'))
    again = train(tiny_data, out, "training.accumulation=auto")
    assert "accumulation auto" not in again.stderr
    assert json.loads((out / STUDENT / "step-000000004/meta.json").read_text())["accumulation"] == 4
    # the same numbers as with all images at once, up to the order of sums
    train(tiny_data, tmp_path / "whole")
    assert [x["loss"] for x in metrics(out)] == pytest.approx(
        [x["loss"] for x in metrics(tmp_path / "whole")], rel=2e-4
    )
    assert weights(out).keys() == weights(tmp_path / "whole").keys()


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is captured, as always, and then run without a compiler."""

    def capture(network: nn.Module, *, graphs: bool = False) -> None:
        network.compile(dynamic=False, fullgraph=True, backend="eager")

    monkeypatch.setattr(dsno, "compile_in_place", capture)
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.usefixtures("captured")
def test_drawn_points_are_compiled_at_most_twice() -> None:
    config = configured(*DRAWN, "training.precision=float32", "training.compile=true")
    assert choices.compiled_points(config) == {1, 3}
    student, plain = (make_student(config, None) for _ in range(2))
    plain.load_state_dict(student.state_dict())
    choices.accelerate(student, config, CPU)
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    for points in ([3], [0, 1], [0, 1, 3], [1, 2], [2], [1, 2, 3], [0]):
        found, expected = student(noise, labels, points), plain(noise, labels, points)
        assert found.equal(expected)
        found.mean().backward()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters


def test_a_network_that_cannot_be_compiled_runs_as_it_is() -> None:
    run_what_cannot_be_compiled()
    try:
        network = nn.Linear(2, 2)
        network.compile(backend=lambda graph, inputs: 1 / 0)
        x = torch.randn(3, 2)
        assert torch.equal(network(x), network.forward(x))
    finally:
        torch._dynamo.config.suppress_errors = False
        torch._dynamo.reset()
