"""What a few teacher steps after the student's own one buy: Frechet distance against network evaluations, on digits.

The student at an intermediate time, finished by K DDIM steps of its teacher (`sample --refine K`), against the student by itself
and the teacher by itself at as many evaluations (DDIM, and the third-order solver where it can).

    python benchmarks/refinement.py [STUDENT] [--samples 5000]

STUDENT is a run folder, `runs/students/digits` where it is left out (`make demo` makes it). Two minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dsno_cluster import console, load_student, load_teacher, solve
from dsno_cluster.data import load_data
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.evaluation.refine import refine
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.extractors import find_weights, load_extractor
from dsno_cluster.features.statistics import frechet_distance, moments_of
from dsno_cluster.images import to_uint8

BATCH, SEED = 250, 1
Sampler = Callable[[Tensor, Tensor], Tensor]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", nargs="?", default="runs/students/digits")
    parser.add_argument("--samples", type=int, default=5000)
    options = parser.parse_args(argv)
    device = compute_device()
    student = load_student(options.student).to(device)
    teacher = load_teacher("package:digits-teacher").to(device)
    starts = [t for t in (0.5625, 0.25, 0.0625) if student.form.operator == "series" or t in student.times]

    def finished(t: float, steps: int) -> Sampler:
        return lambda noise, labels: refine(student, teacher, noise, labels, t, steps)

    def alone(solver: str, steps: int) -> Sampler:
        return lambda noise, labels: solve(teacher, noise, [0.0], solver, steps, labels)[:, 0]

    rows: list[tuple[str, int, Sampler]] = [("student only", 1, student.sample)]
    for steps in (1, 2, 4):
        rows += [
            (f"student at t={t}, {steps} teacher step(s)", 1 + steps, finished(t, steps)) for t in starts
        ]
    rows += [(f"teacher only, ddim in {n} steps", n, alone("ddim", n)) for n in (1, 2, 3, 5)]
    rows += [(f"teacher only, dpmpp-2m in {n} steps", n, alone("dpmpp-2m", n)) for n in (3, 5)]
    extractor = load_extractor(
        find_weights(DigitsFeatures.NAME, "package:digits-features", None), ["64", "logits"]
    )
    real = moments_of(extractor(to_uint8(load_data("digits")[0].images))["64"].numpy())
    table = []
    with console.progress("sampling", len(rows), "rows") as advance:
        for name, evaluations, sampler in rows:
            features, agreeing = [], 0
            for start in range(0, options.samples, BATCH):
                indices = range(start, min(start + BATCH, options.samples))
                labels = sample_labels(SEED, indices, 10)
                noise = sample_noise(SEED, indices, (1, 8, 8)).to(device)
                with torch.no_grad():
                    found = extractor(to_uint8(sampler(noise, labels)).cpu())
                features.append(found["64"].numpy())
                agreeing += int((found["logits"].argmax(1) == labels).sum())
            ours = moments_of(np.concatenate(features))
            distance = frechet_distance(ours.mean, ours.covariance, real.mean, real.covariance)
            table.append([name, str(evaluations), f"{distance:.3f}", f"{agreeing / options.samples:.4f}"])
            advance(1)
    console.table(
        f"{options.samples} samples of {options.student}",
        ["samples", "NFE", "distance", "right class"],
        table,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
