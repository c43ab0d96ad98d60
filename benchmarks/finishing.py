"""What finishing costs and brings: a step of it in plain training steps, and its result from different starts.

    python benchmarks/finishing.py cost [key=value ...]     training steps of both objectives, in turn, in one process
    python benchmarks/finishing.py starts [--seeds 3] [key=value ...]
                                                            the digits student finished as configs/digits.yaml has it, from the
                                                            student of trajectories and from the teacher's own weights

`starts` makes the student of trajectories first and prints the table of all. About half an hour a seed on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config, Training, load_config
from dsno_cluster.device import wait_for_gpu
from dsno_cluster.teachers import find_teacher
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.engine import Engines, make_engine
from dsno_cluster.training.loop import take_step
from dsno_cluster.training.objectives.making import find_real_images, make_objective
from dsno_cluster.training.ranks import Ranks, join_ranks
from dsno_cluster.trajectories.reader import Batch

METRICS = "evaluation.metrics=[fid, agreement, trajectory_error, precision_recall, nearest]"
COLUMNS = {
    "fid": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
    "agreement": "right class",
    "nearest": "nearest training image",
    "copies": "copies",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("cost", "starts"), default="cost")
    parser.add_argument("--rounds", type=int, default=12, help="of `cost`: steps of each objective")
    parser.add_argument("--seeds", type=int, default=1, help="of `starts`: finishing runs from each start")
    parser.add_argument(
        "--keep", type=Path, help="of `starts`: the folder of the runs (default: a temporary one)"
    )
    options, overrides = parser.parse_known_args(argv)
    if options.part == "cost":
        measure_cost(options.rounds, overrides)
    elif options.keep is not None:
        compare_starts(options.keep, options.seeds, overrides)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare_starts(Path(folder), options.seeds, overrides)


def measure_cost(rounds: int, overrides: list[str]) -> None:
    """Print the ratio of the seconds of a finishing step and of a plain one, at the same batch size."""
    plain = load_config("configs/digits.yaml", ["finish.enabled=true", *overrides])
    finished = plain.finished
    assert finished is not None
    training = plain.training.model_copy(update={"batch_size": finished.training.batch_size})
    finished = finished.model_copy(update={"training": finished.training.model_copy(update={"start": None})})
    ranks = join_ranks(finished)
    steps = [
        _step_of(config, ranks) for config in (plain.model_copy(update={"training": training}), finished)
    ]
    ratios = []
    for number in range(rounds + 2):
        seconds = []
        for step in steps:
            began = time.perf_counter()
            step(number)
            wait_for_gpu()
            seconds.append(time.perf_counter() - began)
        if number > 1:
            ratios.append(seconds[1] / seconds[0])
    low, *_, high = statistics.quantiles(ratios, n=10)
    settings = finished.training.distribution
    updates = (
        f" with {settings.fake_updates} updates of the fake score network"
        if settings.needs_fake_score
        else ""
    )
    console.say(
        f"a finishing step{updates} costs {statistics.median(ratios):.1f} plain training steps of the same batch (10 to 90 %: "
        f"{low:.1f} to {high:.1f})"
    )


def _step_of(config: Config, ranks: Ranks) -> Callable[[int], Tensor]:
    """A function of a step's number that takes it, on noise in place of trajectories."""
    teacher = find_teacher(config)
    objective = make_objective(config, teacher, find_real_images(config, teacher), ranks)
    companions = {
        name: make_engine(companion.network, config, ranks)
        for name, companion in objective.companions.items()
    }
    engines = Engines(make_engine(new_student(config, teacher), config, ranks), companions)
    count, shape = config.training.batch_size, config.network.state_shape
    classes, points = config.network.num_classes, len(config.trajectories.time_points)
    labels = torch.arange(count) % classes if classes else None
    noise, states = torch.randn(count, *shape), torch.randn(count, points, *shape)
    batch = Batch(torch.arange(count).numpy(), noise, states, labels)
    return lambda step: take_step(engines, objective, [batch], config, ranks, step)


def compare_starts(root: Path, seeds: int, overrides: list[str]) -> None:
    """Finish from both starts, as long and with the same seeds, and print the figures of all."""
    words = [f"storage.root={root}", METRICS, *overrides]
    _dsno("run", *words)
    config = load_config("configs/digits.yaml", ["finish.enabled=true", *words])
    given = finishing_words(config)
    rows = [_row(root, "digits", "student of trajectories")]
    for what, start in (("trajectories", [f"training.start={config.student_address}"]), ("teacher", [])):
        for seed in range(seeds):
            name = f"from-{what}-{seed}"
            _dsno("train", *words, *given, *start, f"name={name}", f"training.seed={seed}")
            _dsno("eval", *words, *given, *start, f"name={name}", f"training.seed={seed}")
            rows.append(_row(root, name, f"finished from the {what}, seed {seed}"))
    console.table("finished students", ["student", *COLUMNS.values(), "error at t=0"], rows)


def finishing_words(config: Config) -> list[str]:
    """Command-line words of a training that finishes a student as the `finish` of a config does."""
    finish, finished = config.finish, config.finished
    assert finish is not None and finished is not None
    named = {"objective", *type(finish).model_fields} & {*Training.model_fields}
    settings = finished.training.model_dump(mode="json", include=named)
    return [f"training.{key}={json.dumps(value)}" for key, value in settings.items()]


def _row(root: Path, name: str, title: str) -> list[str]:
    student = json.loads((root / "evaluation" / name / "metrics.json").read_text())["student"]
    return [title, *(f"{student[key]:.3f}" for key in COLUMNS), f"{student['trajectory_error']['0.0']:.3f}"]


def _dsno(command: str, *words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "dsno_cluster.cli", command, *words, "--launcher", "local"], check=True
    )


if __name__ == "__main__":
    main(sys.argv[1:])
