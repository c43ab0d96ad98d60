"""Sizes of a U-Net by arithmetic, against the network itself, and batches that are split by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_tensors import pretended_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsno_cluster import load_teacher
from dsno_cluster.config import Network, load_config
from dsno_cluster.networks import activations
from dsno_cluster.networks.activations import (
    MOST_ELEMENTS,
    largest_tensor,
    parameter_count,
    samples_at_a_time,
    shape_of,
)
from dsno_cluster.networks.unet import UNet
from dsno_cluster.students.dsno import DSNO, Form

TIMES = (0.5, 0.25, 0.1, 0.0)


def network_of(name: str) -> Network:
    return load_config(f"configs/{name}.yaml").network


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes, among images (N, C, H, W)."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 4:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("name", ["digits", "mnist32", "cifar10", "imagenet64"])
def test_sizes_are_those_of_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(name)
    shape = shape_of(network)
    assert shape is not None
    # as its kernels are: the slow way that pretended tensors take makes all weights of attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(v)
    )
    with pretended_gpu():
        unet = UNet(network, modes=2)
        real = sum(p.numel() for p in unet.parameters())
        labels = torch.zeros(2, dtype=torch.int64) if network.num_classes else None
        denoiser = UNet(network)
        with torch.no_grad(), Largest() as seen:
            denoiser(torch.empty(2, *network.state_shape), torch.empty(2, 1), labels)
    assert parameter_count(shape, network.state_channels, 2, network.class_slots) == real
    assert seen.elements == 2 * largest_tensor(shape, network.state_channels)


@pytest.mark.parametrize("count", [1, 7, 250, 1000])
@pytest.mark.parametrize("elements", [1, 2**20, 2**24, 2**31, 2**40])
def test_parts_stay_below_the_limit_and_are_of_nearly_one_size(elements: int, count: int) -> None:
    part = samples_at_a_time(elements, count)
    assert 1 <= part <= count and (part == 1 or part * elements <= MOST_ELEMENTS)
    parts = -(-count // part)
    assert parts == 1 or (parts - 1) * elements * part < count * elements
    assert part == count or (part + 1) * elements * parts > MOST_ELEMENTS  # no smaller than needed


@pytest.mark.parametrize(
    ("form", "calls_needed"),
    [(Form(3), 21), (Form(3, points="drawn"), 13), (Form(4, "series", "data"), 9)],
    ids=["all", "drawn", "series"],
)
def test_a_student_answers_in_parts_what_it_answers_at_once(
    form: Form, calls_needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    student = DSNO(network_of("digits"), form, TIMES).eval()
    for parameter in student.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    noise, labels = torch.randn(7, 1, 8, 8), torch.arange(7)
    calls: list[int] = []
    forward = student._states

    def counted(noise: Tensor, *rest: Any, **more: Any) -> Tensor:
        calls.append(len(noise))
        return forward(noise, *rest, **more)

    monkeypatch.setattr(student, "_states", counted)
    whole = [
        student.sample(noise, labels),
        student.trajectory(noise, labels),
        student.trajectory(noise, labels, [0.25]),
    ]
    assert calls == [7, 7, 7]  # as it was
    calls.clear()
    monkeypatch.setattr(activations, "MOST_ELEMENTS", 3 * 6144)  # three samples at a point
    parts = [
        student.sample(noise, labels),
        student.trajectory(noise, labels),
        student.trajectory(noise, labels, [0.25]),
    ]
    assert len(calls) == calls_needed and max(calls) <= 3
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with pytest.raises(ValueError, match="labels must be 7"):
        student.sample(noise, labels[:5])


def test_a_teacher_answers_in_parts_what_it_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher("package:digits-teacher")
    noise, labels, t = torch.randn(7, 1, 8, 8), torch.arange(7), torch.linspace(0.1, 0.9, 7)
    whole = teacher(noise, t, labels)
    sizes: list[int] = []
    assert teacher.network is not None
    teacher.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr(activations, "MOST_ELEMENTS", 3 * 6144)
    assert torch.allclose(teacher(noise, t, labels), whole, atol=1e-5)
    assert sizes == [3, 3, 1]
    assert torch.allclose(teacher(noise, 0.5, labels)[2:3], teacher(noise[2:3], 0.5, labels[2:3]), atol=1e-5)
