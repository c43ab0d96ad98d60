"""Does the trajectory pay? The digits config against endpoint-only distillation, at equal training time.

Both students start from the same teacher with the digits config's settings; the second sees t=0 alone, costs a
fraction per step, and gets as many steps as fit in the first one's training time (its rate is measured by a
short run of its own). Prints the table of both. About ten minutes on two cores:

    python benchmarks/endpoint_distillation.py [key=value ...]
"""

from __future__ import annotations

import sys
import tempfile

from dsno_cluster import console
from dsno_cluster.config import Config, load_config
from dsno_cluster.evaluation.evaluate import evaluate
from dsno_cluster.evaluation.look_up import find_subject
from dsno_cluster.model_folder import read_meta
from dsno_cluster.training.loop import train
from dsno_cluster.trajectories.generate import generate

PROBE_STEPS = 150


def main(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def config(*more: str) -> Config:
            return load_config("configs/digits.yaml", [*overrides, f"storage.root={folder}", *more])

        only_end = ["trajectories.times=[0.0]", "student.operator=convolution", "student.modes=0"]
        operator = config("name=operator")
        seconds = run(operator)
        probe = run(config(*only_end, "name=probe", f"training.steps={PROBE_STEPS}"))
        steps = round(PROBE_STEPS * seconds / probe)
        endpoint = config(*only_end, "name=endpoint-only", f"training.steps={steps}")
        run(endpoint)
        rows = [["operator, 4 time points", *figures(operator)], ["endpoint only", *figures(endpoint)]]
    header = ["student", "steps", "train seconds", "cost", "Frechet distance", "right class", "error at t=0"]
    console.table("equal training time", header, rows)


def run(config: Config) -> float:
    """Generate what is missing and train; the seconds of training."""
    generate(config)
    return float(read_meta(train(config))["train_seconds"])


def figures(config: Config) -> list[str]:
    """Evaluate; the columns of the table."""
    metrics = evaluate(find_subject(config))
    student = metrics.student
    return [
        str(config.training.steps),
        f"{metrics.train_seconds or 0:.0f}",
        f"{student.cost_in_teacher_evaluations:.1f}",
        f"{student.fid:.3f}",
        f"{student.agreement:.4f}",
        f"{(student.trajectory_error or {})['0.0']:.4f}",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
