"""Does the trajectory pay? The digits config against endpoint-only distillation, at equal training time.

Both students start from the same teacher with the digits config's settings; the second sees only t=0, costs a
fraction per step, and gets as many steps as fit in the first one's training time (its rate is measured by a
short run of its own). Prints the table of both. About ten minutes on two cores:

    python benchmarks/endpoint_distillation.py [--probe-steps 150] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dsno_cluster import console
from dsno_cluster.model_folder import read_meta

ONLY_END = ["trajectories.times=[0.0]", "student.operator=convolution", "student.modes=0"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--probe-steps", type=int, default=150, help="of the run that measures a rate")
    options, overrides = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        seconds = train(root, "operator", overrides)
        shorter = [*overrides, *ONLY_END, f"training.steps={options.probe_steps}"]
        steps = max(1, round(options.probe_steps * seconds / train(root, "probe", shorter)))
        as_long = [*overrides, *ONLY_END, f"training.steps={steps}"]
        train(root, "endpoint-only", as_long)
        rows = [
            ["operator, 4 time points", *figures(root, "operator", overrides)],
            ["endpoint only", *figures(root, "endpoint-only", as_long)],
        ]
    header = ["student", "steps", "train seconds", "cost", "Frechet distance", "right class", "error at t=0"]
    console.table("equal training time", header, rows)


def train(root: Path, name: str, overrides: list[str]) -> float:
    """Generate what is missing and train; the seconds of training."""
    run("gen-trajectories", root, name, overrides)
    run("train", root, name, overrides)
    seconds = read_meta(str(root / "students" / name)).train_seconds
    assert seconds is not None
    return seconds


def figures(root: Path, name: str, overrides: list[str]) -> list[str]:
    """Evaluate; the columns of the table."""
    run("eval", root, name, overrides)
    metrics = json.loads((root / "evaluation" / name / "metrics.json").read_text())
    student = metrics["student"]
    return [
        str(metrics["checkpoint"]["step"]),
        f"{metrics['train_seconds']:.0f}",
        f"{student['cost_in_teacher_evaluations']:.1f}",
        f"{student['fid']:.3f}",
        f"{student['agreement']:.4f}",
        f"{student['trajectory_error']['0.0']:.4f}",
    ]


def run(command: str, root: Path, name: str, overrides: list[str]) -> None:
    words = [command, *overrides, f"storage.root={root}", f"name={name}", "--launcher", "local"]
    subprocess.run([sys.executable, "-m", "dsno_cluster.cli", *words], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
