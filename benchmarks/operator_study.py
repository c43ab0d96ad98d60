"""Which form of the student learns what, at equal training time: temporal convolution or series, points, weights.

Every variant starts from the digits teacher and trains for the same CPU seconds on one thread (so that nothing beside it
counts; a GPU is hidden), with the digits config's batch, rate and average, on the same trajectories; several seeds, two runs
at a time.
Columns: images seen; cost of a one-step sample in teacher evaluations; Frechet distance of 5000 one-step samples; share of
samples of the class asked for; relative error against the teacher's trajectory on held-out noise at four times.

    python benchmarks/operator_study.py [--seconds 120] [--seeds 3] [--only NAME ...] [--log FILE] [key=value ...]

With `--log` every run's figures are appended there as a line of JSON, and runs that stand there are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch

from dsno_cluster import console
from dsno_cluster.config import Config, load_config
from dsno_cluster.data import load_data
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.schedule import time_points
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.extractors import find_weights, load_extractor
from dsno_cluster.features.statistics import frechet_distance, moments_of
from dsno_cluster.images import to_uint8
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.teachers import find_teacher
from dsno_cluster.torch_internals import lerp_all
from dsno_cluster.training.beginning import find_data_set, new_student
from dsno_cluster.training.objectives import Student
from dsno_cluster.training.objectives.losses import weighted
from dsno_cluster.training.objectives.trajectories import TrajectoryObjective
from dsno_cluster.training.optim import ema_decay_at, learning_rate
from dsno_cluster.trajectories.generate import generate
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.reader import Batch, ShardReader, read_batches
from dsno_cluster.trajectories.spec import solve_samples, spec_of

DATA = [
    "storage.root=runs/operator-study",
    "trajectories.num_samples=32768",
    "trajectories.times={spacing: quadratic, points: 8}",
    "trajectories.steps=18",
]
POINTS = 8
HELD_OUT, TRUTH = 500, Path("runs/operator-study/held-out.safetensors")  # noises, the teacher's states
REPORTED = (0.5625, 0.25, 0.0625, 0.0)

CONVOLUTION = ["student.operator=convolution", "student.prediction=state", "student.temporal_init=zero"]
PUBLISHED = ["student.operator=convolution", "student.prediction=state", "student.temporal_init=published"]
NONE = [*CONVOLUTION, "student.modes=0"]
ONE_AT_A_TIME = ["student.points=drawn", "training.time_weighting=flat"]
SERIES = ["student.operator=series", "student.prediction=data", "training.time_weighting=flat"]

# name: (number of time points, overrides of the digits config)
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "published, snr weights": (4, [*PUBLISHED, "student.modes=2", "training.time_weighting=snr"]),
    "published, sqrt weights": (4, [*PUBLISHED, "student.modes=2", "training.time_weighting=sqrt"]),
    "published, flat weights": (4, [*PUBLISHED, "student.modes=2", "training.time_weighting=flat"]),
    "identity at first, flat": (4, [*CONVOLUTION, "student.modes=2", "training.time_weighting=flat"]),
    "... predicts data": (
        4,
        [*CONVOLUTION, "student.modes=2", "student.prediction=data", "training.time_weighting=flat"],
    ),
    "modes 1": (4, [*CONVOLUTION, "student.modes=1", "training.time_weighting=sqrt"]),
    "modes 3": (4, [*CONVOLUTION, "student.modes=3", "training.time_weighting=sqrt"]),
    "M=2, modes 2": (2, [*CONVOLUTION, "student.modes=2", "training.time_weighting=sqrt"]),
    "M=8, modes 2": (8, [*CONVOLUTION, "student.modes=2", "training.time_weighting=sqrt"]),
    "M=8, modes 5": (8, [*CONVOLUTION, "student.modes=5", "training.time_weighting=sqrt"]),
    "no convolution, 4 points": (4, [*NONE, "training.time_weighting=sqrt"]),
    "endpoint only": (1, [*NONE, "training.time_weighting=flat"]),
    "one point drawn, state": (4, [*NONE, *ONE_AT_A_TIME]),
    "one point drawn, data": (4, [*NONE, *ONE_AT_A_TIME, "student.prediction=data"]),
    "drawn sets, convolution, data": (
        4,
        [
            *CONVOLUTION,
            *ONE_AT_A_TIME,
            "student.modes=2",
            "student.prediction=data",
            "training.most_points=4",
        ],
    ),
    "series, M=4": (4, [*SERIES, "student.modes=4"]),
    "series, M=8": (8, [*SERIES, "student.modes=6"]),
    "series, M=4, snr weights": (4, [*SERIES, "student.modes=4", "training.time_weighting=snr"]),
    "series, M=4, sqrt weights": (4, [*SERIES, "student.modes=4", "training.time_weighting=sqrt"]),
    "series, M=4, normalised weights": (4, [*SERIES, "student.modes=4"]),
}
# each point's weight is one over the running mean of its distance: what learned log-variances come to (Kendall et al. 2018)
NORMALISED = ("series, M=4, normalised weights",)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--log", type=Path, help="a file that runs are added to")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)  # a run of ours
    options, overrides = parser.parse_known_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.one:
        print(json.dumps(run(options.one[0], int(options.one[1]), options.seconds, overrides)))
        return
    config = load_config("configs/digits.yaml", [*DATA, *overrides])
    generate(config, plan=make_plan(config))
    if not TRUTH.is_file():
        exact = load_config("configs/digits.yaml", ["trajectories.solver=abm3", "trajectories.steps=64"])
        teacher = find_teacher(exact)
        spec, network = spec_of(exact, teacher), teacher.load()
        states, _ = solve_samples(spec, network, exact.evaluation.seed, range(HELD_OUT))
        safetensors.torch.save_file({"states": states}, TRUTH)
    done = (
        [json.loads(line) for line in options.log.read_text().splitlines()]
        if options.log and options.log.is_file()
        else []
    )
    known = {(row["name"], row["seed"]) for row in done if row["seconds"] == options.seconds}
    tasks = [(n, s) for s in range(options.seeds) for n in options.only if (n, s) not in known]

    def start(task: tuple[str, int]) -> dict[str, Any]:
        words = ["--one", task[0], str(task[1]), "--seconds", str(options.seconds), *overrides]
        found = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, text=True
        )
        return cast(dict[str, Any], json.loads(found.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(2) as pool, console.progress("studying", len(tasks), "runs") as advance:
        for row in pool.map(start, tasks):
            done.append(row)
            advance(1)
            if options.log:
                with options.log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [r for r in done if r["seconds"] == options.seconds and r["name"] in options.only]
    print(table(rows, options.only))


def run(name: str, seed: int, seconds: float, overrides: list[str]) -> dict[str, Any]:
    """Train one variant and measure it."""
    torch.set_num_threads(1)
    points, changes = VARIANTS[name]
    at = f"trajectories.times={list(time_points('quadratic', points))}"
    config = load_config("configs/digits.yaml", [*DATA, *changes, at, f"seed={seed + 10}", *overrides])
    everything = read_all(overrides)
    positions = [time_points("quadratic", POINTS).index(t) for t in config.trajectories.time_points]
    torch.manual_seed(seed)
    student = new_student(config)
    asked = replace(everything, states=everything.states[:, positions])
    kind = NormalisedObjective if name in NORMALISED else TrajectoryObjective
    images = train(student, config, asked, seconds, kind(config, torch.device("cpu")))
    return {"name": name, "seed": seed, "seconds": seconds, "images": images, **measure(student, config)}


class NormalisedObjective(TrajectoryObjective):
    """Weights each point by one over the running mean of its distance."""

    means_M: torch.Tensor | None = None

    def loss(self, student: Student, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        points = self.points(step)
        distances_M = self.distance(student(batch.noise, batch.labels, points), batch.states[:, points])
        before = distances_M.detach() if self.means_M is None else self.means_M
        self.means_M = before.lerp(distances_M.detach(), 0.01)
        return weighted(distances_M, self.means_M.mean() / self.means_M), distances_M.detach()


def read_all(overrides: list[str]) -> Batch:
    """The whole data set as one batch."""
    config = load_config("configs/digits.yaml", [*DATA, *overrides])
    plan = make_plan(config)
    manifest = find_data_set(config, plan.teacher).manifest
    assert manifest is not None  # it is trained on
    batches = read_batches(
        ShardReader(open_storage(config.storage.root), plan.folder, manifest),
        seed=0, first_sample=0, batch_size=manifest.num_samples, rank=0, world_size=1,
    )  # fmt: skip
    (batch,) = next(batches)
    batches.close()  # it reads ahead
    return batch


def train(
    student: DSNO,
    config: Config,
    everything: Batch,
    seconds: float,
    objective: TrajectoryObjective,
) -> int:
    """For so many CPU seconds; leaves the averaged weights in the student. Returns the number of images seen."""
    settings = config.training
    assert everything.labels is not None
    parameters = list(student.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters)
    random = torch.Generator().manual_seed(config.seed)
    order, step, began = torch.empty(0, dtype=torch.int64), 0, time.process_time()
    while (used := (time.process_time() - began) / seconds) < 1.0:
        rate = learning_rate(round(1e6 * used), 10**6, settings.lr, 0, "cosine")
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / settings.warmup)
        if len(order) < settings.batch_size:
            order = torch.randperm(len(everything.noise), generator=random)
        pick, order = order[: settings.batch_size], order[settings.batch_size :]
        batch = Batch(pick.numpy(), everything.noise[pick], everything.states[pick], everything.labels[pick])
        loss, _ = objective.loss(student, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lerp_all(averages, parameters, 1.0 - ema_decay_at(step, settings.ema_decays[0], ramp=True))
        step += 1
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    return step * settings.batch_size


def measure(student: DSNO, config: Config) -> dict[str, Any]:
    """The columns of the table."""
    student.eval()
    seed, settings = config.evaluation.seed, config.evaluation
    extractor = load_extractor(
        find_weights(DigitsFeatures.NAME, settings.weights_path, None), ["64", "logits"]
    )
    real = moments_of(extractor(to_uint8(load_data("digits")[0].images))["64"].numpy())
    features, agreeing = [], 0
    for start in range(0, settings.num_samples, settings.batch_size):
        indices = range(start, start + settings.batch_size)
        noise, labels = sample_noise(seed, indices, (1, 8, 8)), sample_labels(seed, indices, 10)
        found = extractor(to_uint8(student.sample(noise, labels)))
        features.append(found["64"].numpy())
        agreeing += int((found["logits"].argmax(1) == labels).sum())
    ours = moments_of(np.concatenate(features))
    times = [t for t in REPORTED if t in student.times]
    teacher, indices = find_teacher(config).load(), range(HELD_OUT)
    target = safetensors.torch.load_file(TRUTH)["states"]
    noise, labels = sample_noise(seed, indices, (1, 8, 8)), sample_labels(seed, indices, 10)
    states = student.trajectory(noise, labels, times)
    errors = {}
    for i, t in enumerate(times):
        truth = target[:, REPORTED.index(t)]
        errors[str(t)] = float((states[:, i] - truth).norm() / truth.norm())
    return {
        "fid": frechet_distance(ours.mean, ours.covariance, real.mean, real.covariance),
        "agreement": agreeing / settings.num_samples,
        "errors": errors,
        "cost": cost(
            lambda: student.sample(noise[:250], labels[:250]), lambda: teacher(noise[:250], 1.0, labels[:250])
        ),
    }


def cost(ours: Any, theirs: Any, pairs: int = 5) -> float:
    """Median ratio of CPU times of two calls run in turn."""

    def seconds(call: Any) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    ours(), theirs()
    return float(np.median([seconds(ours) / seconds(theirs) for _ in range(pairs)]))


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown: mean over seeds, and for the distance and the error at t=0 half the range."""
    lines = [
        "| variant | images | cost | distance | right class | "
        + " | ".join(f"t={t}" for t in REPORTED)
        + " |"
    ]
    lines.append("|---" * (5 + len(REPORTED)) + "|")
    for name in names:
        runs = [r for r in rows if r["name"] == name]
        if not runs:
            continue

        def mean(values: list[float]) -> float:
            return float(np.mean(values))

        def spread(values: list[float]) -> str:
            return f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""

        distances = [r["fid"] for r in runs]
        cells = [
            name,
            f"{mean([r['images'] for r in runs]) / 1000:.0f} k",
            f"{mean([r['cost'] for r in runs]):.2f}",
            f"{mean(distances):.3f}{spread(distances)}",
            f"{mean([r['agreement'] for r in runs]):.4f}",
        ]
        for t in REPORTED:
            found = [r["errors"][str(t)] for r in runs if str(t) in r["errors"]]
            cells.append((f"{mean(found):.3f}" + (spread(found) if t == 0.0 else "")) if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
