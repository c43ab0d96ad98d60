"""The whole path: trajectories, training and evaluation, one after the other, as the three commands do them."""

from __future__ import annotations

import time
from typing import Any

from dsno_cluster import console
from dsno_cluster.config import Config

STAGES = ("gen-trajectories", "train", "eval")


def describe(config: Config) -> str:
    """What the whole path will do, in one line."""
    return (
        f"{config.trajectories.num_samples} trajectories of the teacher, {config.training.steps} training steps, "
        f"{config.evaluation.num_samples} evaluated samples; results below {config.storage.root}"
    )


def run_here(config: Config) -> dict[str, Any]:
    """Run the whole path on this machine; returns the metrics of the evaluation. Finished stages are not done again."""
    from dsno_cluster.evaluation.evaluate import evaluate
    from dsno_cluster.training.loop import train
    from dsno_cluster.trajectories.generate import generate

    began = time.monotonic()
    console.say(f"the whole path: {describe(config)}")
    console.say("\n[1/3] gen-trajectories: the teacher solves its ODE, many evaluations an image")
    generate(config)
    console.say("\n[2/3] train: the student learns to give the whole trajectory in one evaluation")
    train(config)
    console.say("\n[3/3] eval: how close do one-step samples come?")
    metrics = evaluate(config, None)
    console.say(f"\nthe whole path took {time.monotonic() - began:.0f} s\n")
    return metrics
