"""Solvers against the closed-form trajectories of a Gaussian teacher."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dsno_cluster import load_teacher, solve
from dsno_cluster.diffusion.schedule import refine, time_points
from dsno_cluster.diffusion.solvers import count_evaluations
from dsno_cluster.diffusion.teachers import Teacher, gaussian_teacher, gaussian_trajectory

MEAN, STD = 0.3, 0.4
TIMES = (0.5625, 0.25, 0.0625)


def exact_states(noise: torch.Tensor) -> torch.Tensor:
    return torch.stack([gaussian_trajectory(noise, t, MEAN, STD) for t in TIMES], dim=1)


def largest_error(solver: str, steps: int) -> float:
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = gaussian_teacher(MEAN, STD, (1, 4, 4))
    return float((solve(teacher, noise, TIMES, solver, steps) - exact_states(noise)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    errors = [largest_error(solver, steps) for steps in (64, 128, 256)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(measured) > order - 0.25, (errors, measured)
    assert max(measured) < order + 0.6, (errors, measured)


@pytest.mark.parametrize(("solver", "tolerance"), [("ddim", 1.5e-2), ("heun", 5e-3), ("dpmpp-2m", 5e-3)])
def test_end_point_is_right(solver: str, tolerance: float) -> None:
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    end = solve(gaussian_teacher(MEAN, STD, (1, 4, 4)), noise, [0.0], solver, 256)[:, 0]
    assert torch.allclose(end, gaussian_trajectory(noise, 0.0, MEAN, STD), atol=tolerance)
    assert end.dtype == torch.float32


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp-2m"])
def test_evaluations_are_counted(solver: str) -> None:
    calls = 0
    exact = gaussian_teacher(MEAN, STD, (1, 2, 2))

    def counting(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return exact.denoise(x, t, labels)

    teacher = Teacher(counting, (1, 2, 2), 0, None, {})
    for times in ([0.5, 0.0], [0.6, 0.3]):
        calls = 0
        solve(teacher, torch.randn(2, 1, 2, 2), times, solver, 10)
        assert calls == count_evaluations(solver, 10, times=times)


def test_time_points_of_the_paper() -> None:
    assert time_points("quadratic", 4) == (0.5625, 0.25, 0.0625, 0.0)
    assert time_points("uniform", 4) == (0.75, 0.5, 0.25, 0.0)


@pytest.mark.parametrize("steps", [4, 5, 18, 512])
def test_grid_passes_through_the_time_points(steps: int) -> None:
    grid = refine(time_points("quadratic", 4), steps)
    assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0
    assert set(time_points("quadratic", 4)) <= set(grid)
    assert all(a > b for a, b in itertools.pairwise(grid))
    if steps == 512:  # the published grid
        assert grid == pytest.approx([1 - i / 512 for i in range(513)])


def test_bad_requests_are_refused() -> None:
    teacher, noise = gaussian_teacher(0.0, 1.0, (1, 2, 2)), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="descend"):
        solve(teacher, noise, [0.2, 0.5])
    with pytest.raises(ValueError, match="ddim, heun"):
        solve(teacher, noise, [0.0], "euler")
    with pytest.raises(ValueError, match="null class"):
        solve(teacher, noise, [0.0], guidance_scale=2.0)


def test_guidance_and_labels_of_the_shipped_teacher() -> None:
    teacher = load_teacher("package:digits-teacher")
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 10
    x0 = teacher(noise, 0.9, labels)
    nulls = torch.full_like(labels, 10)
    assert torch.equal(teacher(noise, 0.9), teacher(noise, 0.9, nulls))
    guided = solve(teacher, noise, [0.0], "ddim", 1, labels, guidance_scale=2.0)[:, 0]
    start, unguided = teacher(noise, 1.0, labels), solve(teacher, noise, [0.0], "ddim", 1, labels)[:, 0]
    assert torch.allclose(guided - unguided, start - teacher(noise, 1.0, nulls), atol=2e-2)
    assert x0.shape == noise.shape
    clipped = solve(teacher, noise, [0.0], "ddim", 4, labels, clip_denoised=True)
    assert clipped.abs().max() <= 1.0 + 1e-3 < solve(teacher, noise, [0.0], "ddim", 4, labels).abs().max()
