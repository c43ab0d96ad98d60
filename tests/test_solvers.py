"""Solvers against the closed-form trajectories of a Gaussian teacher."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dsno_cluster import load_teacher, solve
from dsno_cluster.diffusion.accuracy import cheapest, reference_method, relative_errors
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.schedule import (
    fine_end,
    karras_sigmas,
    make_grid,
    refine,
    time_of_angle,
    time_points,
)
from dsno_cluster.diffusion.solvers import (
    SOLVERS,
    Method,
    count_evaluations,
    interpolation_weights,
    solve_with,
)
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import Teacher, TeacherInfo, gaussian_teacher, gaussian_trajectory
from dsno_cluster.teachers.identity import GaussianIdentity

MEAN, STD = 0.3, 0.4
TIMES = (0.5625, 0.25, 0.0625)


def exact_states(noise: torch.Tensor) -> torch.Tensor:
    return torch.stack([gaussian_trajectory(noise, t, MEAN, STD) for t in TIMES], dim=1)


def largest_error(solver: str, steps: int, grid: str) -> float:
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = gaussian_teacher(MEAN, STD, (1, 4, 4))
    states = solve(teacher, noise, TIMES, solver, steps, grid=grid)
    return float((states - exact_states(noise)).abs().max())


@pytest.mark.parametrize("grid", ["uniform", "fine-end"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp-2m", 2), ("abm3", 3)])
def test_order_of_convergence(solver: str, order: int, grid: str) -> None:
    errors = [largest_error(solver, steps, grid) for steps in (64, 128, 256)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(measured) > order - 0.25, (errors, measured)
    assert max(measured) < order + 0.6, (errors, measured)


def test_heun_of_edm_is_of_second_order_on_edms_grid() -> None:
    """From the noise at sigma = 80, where the closed form is that of a Gaussian with the variances of both added."""
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher, errors = gaussian_teacher(MEAN, STD, (1, 4, 4)), []
    for steps in (32, 64, 128):
        sigmas = karras_sigmas(steps, 0.002, 80.0)
        grid = [*(time_of_angle(math.atan(sigma)) for sigma in sigmas), 0.0]
        found = solve(teacher, noise, grid[1:], "heun-edm", steps, grid=grid)
        worst = []
        for sigma, state in zip(sigmas[1:], found.unbind(1), strict=False):
            shrunk = math.sqrt((STD**2 + sigma**2) / (STD**2 + 80.0**2))
            exact = MEAN + shrunk * (80.0 * noise - MEAN)
            worst.append(float((state * math.sqrt(1 + sigma**2) - exact).abs().max()))
        errors.append(max(worst))
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 0.01 and 1.75 < min(measured) <= max(measured) < 2.6, (errors, measured)


@pytest.mark.parametrize(
    ("solver", "tolerance"), [("ddim", 1.5e-2), ("heun", 5e-3), ("dpmpp-2m", 5e-3), ("abm3", 2e-5)]
)
def test_end_point_is_right(solver: str, tolerance: float) -> None:
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    end = solve(gaussian_teacher(MEAN, STD, (1, 4, 4)), noise, [0.0], solver, 256)[:, 0]
    assert torch.allclose(end, gaussian_trajectory(noise, 0.0, MEAN, STD), atol=tolerance)
    assert end.dtype == torch.float32


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(solver: str) -> None:
    calls = 0
    exact = gaussian_teacher(MEAN, STD, (1, 2, 2))

    def counting(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return exact.denoise(x, t, labels)

    info = TeacherInfo(GaussianIdentity(mean=0.0, std=1.0, shape=(1, 2, 2)), (1, 2, 2), 0)
    teacher = Teacher(info, counting)
    for times in ([0.5, 0.0], [0.6, 0.3]):
        for grid in ("uniform", "fine-end", [1.0, 0.8, 0.6, 0.5, 0.3, 0.1, 0.0]):
            calls = 0
            states = solve(teacher, torch.randn(2, 1, 2, 2), times, solver, 10, grid=grid)
            assert calls == count_evaluations(solver, 10, times=times, grid=grid)
            assert states.shape == (2, 2, 1, 2, 2)


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


@pytest.mark.parametrize("name", ["uniform", "fine-end"])
def test_grids_hit_any_time_points(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for points in (1, 2, 3, 5, 9):
        for end in (0.0, 0.031):
            inner = torch.rand(points - 1, generator=draw, dtype=torch.float64) * 0.9 + 0.05
            times = [*sorted(inner.tolist(), reverse=True), end]
            for steps in (points + 2, 17, 100):
                grid = make_grid(name, times, steps)
                assert len(grid) == steps + 1 and (grid[0], grid[-1]) == (1.0, 0.0)
                assert all(a > b for a, b in itertools.pairwise(grid)) and set(times) <= set(grid)


def test_fine_end_is_finer_at_the_end() -> None:
    for times in ((0.5625, 0.25, 0.0625, 0.0), (0.0,)):
        grid = fine_end(times, 64)
        end = [a - b for a, b in itertools.pairwise(grid) if a <= 1 / 16]
        assert 7 <= len(end) <= 9 and end == sorted(end, reverse=True)
        assert max(end) < 0.75 * min(a - b for a, b in itertools.pairwise(grid) if b >= 1 / 16)


def test_a_grid_that_is_given() -> None:
    teacher, noise = gaussian_teacher(MEAN, STD, (1, 2, 2)), torch.randn(3, 1, 2, 2)
    as_named = solve(teacher, noise, TIMES, "ddim", 20, grid="uniform")
    assert torch.equal(as_named, solve(teacher, noise, TIMES, "ddim", grid=refine(TIMES, 20)))
    with pytest.raises(ValueError, match=r"0.3 is not on the grid of 2 steps; the nearest there is 0.4"):
        solve(teacher, noise, [0.3, 0.0], grid=[1.0, 0.4, 0.0])
    with pytest.raises(ValueError, match="descend"):
        solve(teacher, noise, [0.0], grid=[1.0, 0.4, 0.4, 0.0])
    with pytest.raises(ValueError, match="uniform, fine-end"):
        solve(teacher, noise, [0.0], grid="karras")


def test_interpolation_weights_integrate_polynomials() -> None:
    nodes, a, b = [0.9, 0.7, 0.2], 0.7, 0.4
    for count in (1, 2, 3):
        weights = interpolation_weights(nodes[:count], a, b)
        for degree in range(count):
            exact = (b ** (degree + 1) - a ** (degree + 1)) / (degree + 1)
            found = sum(w * z**degree for w, z in zip(weights, nodes, strict=False))
            assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.slow
def test_as_accurate_as_ddim_of_512_steps_with_64_evaluations() -> None:
    """On the shipped teacher, at every time point, against a very fine solution."""
    times = (0.5625, 0.25, 0.0625, 0.0)
    teacher, samples = load_teacher("package:digits-teacher"), range(8)
    noise, labels = sample_noise(11, samples, (1, 8, 8)), sample_labels(11, samples, 10)
    exact = solve_with(reference_method(Method(), times), teacher, noise, times, labels)
    # another method at another resolution agrees far better than what is measured here
    other = solve(teacher, noise, times, "heun", 500, labels)
    assert max(relative_errors(other, exact)) < 3e-4
    ddim = relative_errors(solve(teacher, noise, times, "ddim", 512, labels), exact)
    ours = relative_errors(solve(teacher, noise, times, "abm3", 64, labels), exact)
    assert 5e-4 < ddim[-1] < 3e-3
    assert all(a < 1.25 * b for a, b in zip(ours, ddim, strict=True)), (ours, ddim)


def test_the_cheapest_solver_within_a_tolerance() -> None:
    teacher = gaussian_teacher(MEAN, STD, (1, 4, 4))
    noise = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    tried = []
    found = cheapest(Method(), teacher, noise, (0.5, 0.0), 1e-3, tried=tried.append)
    exact = torch.stack([gaussian_trajectory(noise, t, MEAN, STD) for t in (0.5, 0.0)], dim=1)
    states = solve_with(found.method, teacher, noise, (0.5, 0.0))
    assert max(relative_errors(states, exact)) < 1.05e-3
    assert all(max(choice.errors) > 1e-3 for choice in tried[:-1]) and found.method.steps < 64
    with pytest.raises(UserError, match="not reached within 256 evaluations"):
        cheapest(Method(), teacher, noise, (0.5, 0.0), 1e-12)


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
