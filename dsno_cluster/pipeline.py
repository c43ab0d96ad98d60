"""The whole path: trajectories, training and evaluation, one after the other, as the three commands do them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.files import shown_path

if TYPE_CHECKING:
    from dsno_cluster.evaluation.records import Metrics

PURPOSES = {
    "gen-trajectories": "the teacher solves its ODE, many evaluations an image",
    "train": "the student learns to give the whole trajectory in one evaluation",
    "eval": "how close do one-step samples come?",
}
STAGES = tuple(PURPOSES)


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages of a config's whole path: online training makes the trajectories itself."""
    return STAGES[1:] if config.training.online else STAGES


def describe(config: Config) -> str:
    """What the whole path will do, in one line."""
    made = ", made while training" if config.training.online else ""
    return (
        f"{config.trajectories.num_samples} trajectories of the teacher{made}, {config.training.steps} training steps, "
        f"{config.evaluation.num_samples} evaluated samples; results below {shown_path(config.storage.root)}"
    )


def run_here(config: Config) -> Metrics:
    """Run the whole path on this machine; returns the metrics of the evaluation. Finished stages are not done again."""
    from dsno_cluster.evaluation.evaluate import evaluate
    from dsno_cluster.evaluation.look_up import find_subject
    from dsno_cluster.training.loop import train
    from dsno_cluster.trajectories.generate import generate

    began = time.monotonic()
    console.say(f"the whole path: {describe(config)}")
    metrics: Metrics | None = None
    stages = stages_of(config)
    for number, stage in enumerate(stages, 1):
        console.say(f"\n[{number}/{len(stages)}] {stage}: {PURPOSES[stage]}")
        match stage:
            case "gen-trajectories":
                generate(config)
            case "train":
                train(config)
            case "eval":
                metrics = evaluate(find_subject(config))
    console.say(f"\nthe whole path took {time.monotonic() - began:.0f} s\n")
    assert metrics is not None  # of the last stage
    return metrics
