"""Guidance in one batch of 2N: what it evaluates, and that data sets made before are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.solvers import SOLVERS, Method, count_evaluations, solve_with
from dsno_cluster.storage import FolderStorage
from dsno_cluster.teachers import Teacher, find_teacher, gaussian_trajectory
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.spec import former_specs, read_spec, spec_of

GUIDED = "trajectories.guidance_scale=2.0"


def two_gaussians(mean: float, std: float) -> Teacher:
    """Two classes of which each is one Gaussian, and "no class", which is both."""
    options = {
        "means": [mean, -mean],
        "stds": std,
        "shape": [1, 2, 2],
        "classes": [0, 1],
        "null_class": True,
    }
    return load_teacher("closed-form:mixture", options=options)


def counted(teacher: Teacher) -> tuple[list[int], Callable[..., Tensor]]:
    """The numbers of samples of each call, and the teacher that notes them."""
    sizes: list[int] = []

    class Counting:
        null_class = teacher.null_class

        def __call__(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
            sizes.append(len(x))
            return teacher(x, t, labels)

    return sizes, Counting()


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_batch_of_2n_is_the_guidance_of_two_calls(solver: str) -> None:
    teacher = load_teacher("package:digits-teacher")
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, times = torch.arange(6), (0.25, 0.0)
    sizes, counting = counted(teacher)
    method = Method(solver, 6, guidance_scale=2.5, joint_guidance=True)
    joint = solve_with(method, counting, noise, times, labels)
    calls = count_evaluations(solver, 6, 2.5, times) // 2
    assert sizes == [12] * calls  # as many evaluations, in half as many calls
    sizes.clear()
    apart = solve_with(Method(solver, 6, guidance_scale=2.5), counting, noise, times, labels)
    assert sizes == [6] * (2 * calls)
    assert torch.allclose(joint, apart, atol=1e-4)
    assert torch.equal(joint, solve(teacher, noise, times, solver, 6, labels, 2.5))


@pytest.mark.parametrize("joint", [True, False])
def test_guidance_by_a_teacher_without_a_network_is_the_closed_form(joint: bool) -> None:
    """Guidance with scale 0 leaves "no class"; with a null class equal to one class, any scale leaves that class."""
    mean, std = 0.4, 0.3
    teacher = two_gaussians(mean, std)
    noise = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    labels, scale = torch.tensor([0, 1] * 4), 3.0
    found = solve_with(
        Method("ddim", 1, guidance_scale=scale, joint_guidance=joint), teacher, noise, (0.0,), labels
    )[:, 0]
    # from pure noise (alpha 4.5e-5) x0 is the mean: 0 without a class, +-mean with one; one DDIM step ends there
    signs = torch.where(labels == 0, 1.0, -1.0)[:, None, None, None]
    assert torch.allclose(found, (scale * mean * signs).expand_as(found), atol=1e-3)
    same = load_teacher(
        "closed-form:mixture",
        options={
            "means": [mean, mean],
            "stds": std,
            "shape": [1, 2, 2],
            "classes": [0, 1],
            "null_class": True,
        },
    )
    steps = Method("abm3", 64, guidance_scale=scale, joint_guidance=joint)
    states = solve_with(steps, same, noise, (0.5, 0.0), labels)
    exact = torch.stack([gaussian_trajectory(noise, t, mean, std) for t in (0.5, 0.0)], dim=1)
    assert float((states - exact).norm() / exact.norm()) < 1e-3


def test_guided_data_sets_of_earlier_versions_are_found(tmp_path: Path) -> None:
    words = [GUIDED, f"storage.root={tmp_path}"]
    config = load_config("configs/digits.yaml", words)
    teacher = find_teacher(config)
    spec = spec_of(config, teacher)
    assert spec.joint_guidance and spec.method.joint_guidance
    (former,) = former_specs(spec, teacher)
    assert former.hash == "1eb5dba4e60122e1" and not former.method.joint_guidance  # as version 0.2 named it
    assert read_spec(former.model_dump(mode="json"), "here") == former
    assert make_plan(config).folder == spec.folder
    FolderStorage(tmp_path).write(f"{former.folder}manifest.json", b"{}")
    plan = make_plan(config)
    assert plan.folder == former.folder and plan.other_folders == (spec.folder,)


def test_without_guidance_the_name_stays() -> None:
    config = load_config("configs/digits.yaml")
    teacher = find_teacher(config)
    spec = spec_of(config, teacher)
    assert not spec.joint_guidance and former_specs(spec, teacher) == ()
    assert "joint_guidance" not in spec.model_dump(mode="json")
