"""Students whose network is compiled: captured whole, in every form and mode, and with the numbers of those that are not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_gpu_layout import DIFFUSERS, FORMS, SCHEDULER, TIMES, network
from torch._dynamo.utils import counters
from training_runs import link_data, train, weights, words

from dsno_cluster.config import load_config
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.students.dsno import DSNO, Form

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_captured() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def a_student(form: str) -> DSNO:
    torch.manual_seed(0)
    if form == "diffusers":
        pytest.importorskip("diffusers")
        model = DiffusersModel(config=DIFFUSERS, scheduler=SCHEDULER)
        return DSNO(network(11), Form(2), TIMES, backbone=model)
    return DSNO(network(10), FORMS[form], TIMES)


def gradients(student: DSNO) -> dict[str, torch.Tensor]:
    """Of a loss in which every state counts differently."""
    torch.manual_seed(1)
    noise, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    states = student(noise, labels)
    (states.float() * torch.randn(states.shape)).mean().backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("form", "recompute", "precision"),
    [
        ("series", "none", "bfloat16"),
        pytest.param("diffusers", "none", "float32", marks=slow),
        ("convolution", "cheap", "float32"),
        *(
            pytest.param(form, what, precision, marks=slow)
            for form in ("convolution", "series", "diffusers")
            for what in ("none", "cheap", "blocks")
            for precision in ("tf32", "float16")
        ),
    ],
)
def test_the_network_is_captured_whole_and_once(form: str, recompute: str, precision: str) -> None:
    expected = gradients(a_student(form).accelerate(precision=precision).recompute(recompute))
    student = a_student(form).accelerate(precision=precision).recompute(recompute)
    student.backbone.compile(dynamic=False, fullgraph=True, backend="eager")  # captured, then run as it is
    for _ in range(2):
        student.zero_grad()
        found = gradients(student)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@slow
def test_compiled_kernels_give_the_same_gradients() -> None:
    expected = gradients(a_student("series"))
    found = gradients(a_student("series").accelerate(compile=True))
    for name, gradient in expected.items():
        assert torch.linalg.vector_norm(found[name] - gradient) < 1e-3 * (
            torch.linalg.vector_norm(gradient) + 1e-6
        ), name


TRAINING = """
import json, sys
from torch._dynamo.utils import counters
from dsno_cluster.config import load_config
from dsno_cluster.students import dsno
from dsno_cluster.training import loop
dsno.compile_in_place = lambda network, **_: network.compile(dynamic=False, fullgraph=True, backend="eager")
loop.train(load_config("configs/digits.yaml", sys.argv[1:]))
print(json.dumps([counters["stats"], counters["graph_break"]]))
"""


@slow
@pytest.mark.parametrize("stage", ["0", "2"])
def test_a_training_is_captured_within_the_engine(stage: str, tiny_data: Path, tmp_path: Path) -> None:
    out = link_data(tiny_data, tmp_path / "captured")
    # one rank is of stage 0; the scale of float16 needs another
    more = ["training.precision=float16", f"training.zero_stage={stage}"] if stage == "2" else []
    command = [sys.executable, "-c", TRAINING, *words(out, "training.compile=true", *more)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"the student's network is compiled, with kernels kept in {out}/kernels" in done.stderr
    stats, breaks = json.loads(done.stdout.splitlines()[-1])
    assert stats["unique_graphs"] == 1 and not breaks
    train(tiny_data, tmp_path / "as it is", *more)
    found, expected = weights(out), weights(tmp_path / "as it is")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_evaluation_compiles_where_it_is_asked_or_sees_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsno_cluster.evaluation.evaluate import decided

    for asked, gpu, compiled in (
        ("auto", True, True),
        ("auto", False, False),
        ("true", False, True),
        ("false", True, False),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        config = decided(load_config("configs/digits.yaml", [f"evaluation.compile={asked}"]))
        assert config.evaluation.compile is compiled
        assert ("network is compiled" in capsys.readouterr().err) is compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_graphs_give_the_same_states_and_gradients() -> None:
    """On a GPU: CUDA graphs of a small student, twice with other noise, since a replay writes into the same memory."""
    device = torch.device("cuda")
    plain, replayed = (a_student("series").to(device) for _ in range(2))
    replayed.accelerate(compile=True, graphs=True)
    kept = []
    for seed in range(4):
        torch.manual_seed(seed)
        noise, labels = torch.randn(4, 3, 16, 16, device=device), torch.tensor([0, 1, 2, 3])
        for student in (plain, replayed):
            student.zero_grad(set_to_none=True)
            kept.append(student(noise, labels))
            kept[-1].square().mean().backward()
        for one, other in zip(plain.parameters(), replayed.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-4)
    for expected, found in zip(kept[::2], kept[1::2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
