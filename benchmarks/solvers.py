"""How many network evaluations does each solver need to be as accurate as 512-step DDIM?

On the shipped digits teacher: relative error of every time point against a very fine solution (fourth-order
Runge-Kutta, 512 steps in float64; 256 steps differ from it by what is printed), as a function of evaluations.
Prints a table and the headline, and draws docs/solvers.png. About five minutes on two cores:

    python benchmarks/solvers.py [--samples 32] [--out docs/solvers.png]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dsno_cluster import console, count_evaluations, load_teacher, solve
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.accuracy import relative_errors
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.schedule import angle, logsnr, refine
from dsno_cluster.teachers import Teacher

TIMES = (0.5625, 0.25, 0.0625, 0.0)
METHODS = {  # solver, grid, colour
    "ddim": ("ddim", "uniform", (90, 90, 90)),
    "heun": ("heun", "uniform", (150, 90, 160)),
    "dpmpp-2m": ("dpmpp-2m", "uniform", (38, 90, 160)),
    "abm3 uniform": ("abm3", "uniform", (186, 140, 20)),
    "abm3 fine-end": ("abm3", "fine-end", (190, 40, 30)),
}
EVALUATIONS = (16, 24, 32, 48, 56, 60, 64, 80, 96, 128, 192, 256)
Point = tuple[int, tuple[float, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", default="docs/solvers.png")
    options = parser.parse_args()
    device, samples = compute_device(), range(options.samples)
    teacher = load_teacher("package:digits-teacher").to(device)
    noise = sample_noise(options.seed, samples, teacher.shape).to(device)
    labels = sample_labels(options.seed, samples, teacher.num_classes).to(device)
    exact = runge_kutta(teacher, noise, labels, 512)
    half = relative_errors(runge_kutta(teacher, noise, labels, 256), exact)
    print(f"the reference: 256 of its steps in place of 512 differ by {words(half)}")
    target = relative_errors(solve(teacher, noise, TIMES, "ddim", 512, labels), exact)
    curves: dict[str, list[Point]] = {}
    for name, (solver, grid, _) in METHODS.items():
        for wanted in EVALUATIONS:
            steps = (wanted + 1) // 2 if solver == "heun" else wanted
            states = solve(teacher, noise, TIMES, solver, steps, labels, grid=grid)
            evaluations = count_evaluations(solver, steps, times=TIMES, grid=grid)
            curves.setdefault(name, []).append((evaluations, relative_errors(states, exact)))
    header = ["NFE", *METHODS]
    rows = [
        [str(wanted), *(f"{curves[n][i][1][-1]:.1e}/{max(curves[n][i][1]):.1e}" for n in METHODS)]
        for i, wanted in enumerate(EVALUATIONS)
    ]
    console.table(f"relative error at the end / at the worst point, {options.samples} samples", header, rows)
    print(f"512-step DDIM: {words(target)} at t = {', '.join(map(str, TIMES))}")
    for name, points in curves.items():
        end = needed(points, lambda errors: errors[-1] <= target[-1])
        every = needed(points, lambda errors: all(a <= b for a, b in zip(errors, target, strict=True)))
        print(f"as accurate as 512-step DDIM: {name}: at the end point {end}, at every point {every}")
    Path(options.out).write_bytes(plot(curves, target))


def runge_kutta(teacher: Teacher, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """States at TIMES by the classical method of order four on dx / dtheta = v, in float64, network included."""
    assert teacher.network is not None
    network = copy.deepcopy(teacher.network).double()

    @torch.no_grad()
    def slope(x: Tensor, t: float) -> Tensor:
        level = logsnr(torch.full((len(x), 1), t, dtype=torch.float64, device=x.device))
        v: Tensor = network(x, level, labels)[:, 0]  # what the shipped teacher predicts
        return v

    x, states = noise.double(), []
    grid = refine(TIMES, steps)
    for t, s in itertools.pairwise(grid):
        h, middle = angle(s) - angle(t), (t + s) / 2
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, middle)
        k3 = slope(x + h / 2 * k2, middle)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, s))
        states += [x] if s in TIMES else []
    return torch.stack(states, dim=1)


def needed(points: list[Point], good: object) -> str:
    """The fewest evaluations from which on every measured number of them is good, and the fewest that is."""
    assert callable(good)
    passed = [good(errors) for _, errors in points]
    if not any(passed):
        return f"more than {points[-1][0]}"
    first = points[passed.index(True)][0]
    last_bad = max((i for i, ok in enumerate(passed) if not ok), default=-1)
    settled = points[last_bad + 1][0] if last_bad + 1 < len(points) else None
    return str(first) if settled == first else f"{first} (and always from {settled or 'more'} on)"


def words(errors: tuple[float, ...]) -> str:
    return ", ".join(f"{error:.1e}" for error in errors)


def plot(curves: dict[str, list[Point]], target: tuple[float, ...]) -> bytes:
    """Error at the end point over evaluations, both logarithmic, as PNG."""
    from dsno_cluster.images import png_bytes

    width, height, left, top, right, bottom = 900, 520, 80, 46, 190, 56
    low, high = 1e-4, 1e-1
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)

    def place(evaluations: float, error: float) -> tuple[float, float]:
        x = math.log(evaluations / EVALUATIONS[0]) / math.log(EVALUATIONS[-1] / EVALUATIONS[0])
        y = math.log(high / min(max(error, low), high)) / math.log(high / low)
        return left + x * (width - left - right), top + y * (height - top - bottom)

    draw.text((left, 14), "Relative error of the end point, digits teacher", fill=(28, 30, 34), font=font)
    for error in (1e-1, 1e-2, 1e-3, 1e-4):
        y = place(16, error)[1]
        draw.line((left, y, width - right, y), fill=(225, 227, 230))
        draw.text((24, y - 9), f"{error:.0e}", fill=(110, 114, 122), font=font)
    for evaluations in (16, 32, 64, 128, 256):
        x = place(evaluations, low)[0]
        draw.text((x - 10, height - bottom + 8), str(evaluations), fill=(110, 114, 122), font=font)
    draw.text(
        ((left + width - right) / 2 - 70, height - 26), "network evaluations", fill=(110, 114, 122), font=font
    )
    y = place(16, target[-1])[1]
    for x in range(left, width - right, 12):
        draw.line((x, y, x + 6, y), fill=(28, 30, 34))
    ends = [(y - 8, "ddim, 512", (28, 30, 34))]
    for name, points in curves.items():
        colour = METHODS[name][2]
        line = [place(evaluations, errors[-1]) for evaluations, errors in points]
        draw.line(line, fill=colour, width=2)
        for x, y in line:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        ends.append((line[-1][1] - 8, name, colour))
    below = 0.0
    for y, name, colour in sorted(ends):  # names beside the curves' ends, none over another
        below = max(y, below + 18)
        draw.text((width - right + 14, below), name, fill=colour, font=font)
    return png_bytes(sheet)


if __name__ == "__main__":
    main()
