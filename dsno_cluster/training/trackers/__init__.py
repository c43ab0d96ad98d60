"""Trackers: where the figures of a training go besides metrics.jsonl. Each kind is a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dsno_cluster.config import Config


class Tracker(Protocol):
    """A place for figures and pictures by optimiser step."""

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the figures after a step, by name; those of a time point or part are called `figure/part`."""

    def images(self, step: int, images_NCHW: Tensor) -> None:
        """Take samples after a step, float32 in [-1, 1]."""

    def close(self, *, failed: bool) -> None:
        """Write what is left; `failed`: training did not reach its end."""


def open_trackers(config: Config, folder: Path, start: int) -> list[Tracker]:
    """The trackers that a config asks for, with their files below `folder`, for a training that begins at step `start`.

    Raises UserError if the package of one is not installed, and as it says itself.
    """
    trackers: list[Tracker] = []
    if config.training.tensorboard:
        from dsno_cluster.training.trackers.tensorboard import TensorBoard

        trackers.append(TensorBoard(folder / "tensorboard", start))
    if config.training.wandb is not None:
        from dsno_cluster.training.trackers.weights_and_biases import WeightsAndBiases

        trackers.append(WeightsAndBiases(config, folder))
    return trackers
