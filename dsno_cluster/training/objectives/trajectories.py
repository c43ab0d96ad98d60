"""The trajectory objective: the weighted distance between predicted and solved states at the time points."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import loss_weights
from dsno_cluster.training.objectives import Companion, StepFigures, Student
from dsno_cluster.training.objectives.losses import make_distance, weighted
from dsno_cluster.training.optim import drawn_points
from dsno_cluster.trajectories.reader import Batch


class TrajectoryObjective:
    """Distances to the teacher's trajectories.

    A step's figures are those at all M time points, 0 where not seen.

    Raises UserError if the distance uses a network whose weights are missing.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        settings, times = config.training, config.trajectories.time_points
        self.config, self.device = config, device
        self.figure_names = tuple(f"distance at time point {i}" for i in range(len(times)))
        self.companions: Mapping[str, Companion] = {}
        self.state: Mapping[str, Tensor] = {}
        self.distance = make_distance(settings.loss, settings.lpips_weights, settings.lpips_sha256)
        if isinstance(self.distance, nn.Module):
            self.distance.to(device)
        self.weights_M = loss_weights(settings.time_weighting, times).float()
        self.weights_on_device_M = self.weights_M.to(device)

    def points(self, step: int) -> list[int]:
        """Positions of the time points that optimiser step `step` sees, ascending: all, or those drawn for it."""
        settings = self.config.training
        if self.config.student.points == "all":
            return list(range(len(self.figure_names)))
        return drawn_points(
            self.config.training_seed, step, len(self.figure_names), settings.end_share, settings.most_points
        )

    def loss(self, student: Student, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The mean over the step's points of weight times distance, and the distances, (M,)."""
        points = self.points(step)
        noise = batch.noise.to(self.device, non_blocking=True)
        predicted = student(noise, batch.labels, points)  # it checks the labels where they are, on the CPU
        return self.loss_of(predicted.float(), batch, points)

    def loss_of(self, predicted_NPCHW: Tensor, batch: Batch, points: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of predicted states at `points`, and the distances, (M,), 0 at other points."""
        wanted = batch.states
        if len(points) < len(self.figure_names):
            wanted = wanted[:, points]
            wanted = wanted.pin_memory() if batch.noise.is_pinned() else wanted
        distances = self.distance(predicted_NPCHW, wanted.to(self.device, non_blocking=True))
        at = _positions(tuple(points), self.device)
        distances_M = torch.zeros(len(self.figure_names), device=self.device)
        distances_M = distances_M.index_copy(0, at, distances.detach())
        return weighted(distances, self.weights_on_device_M.index_select(0, at)), distances_M

    def summary(self, figures: Sequence[float], step: int) -> StepFigures:
        points = self.points(step)
        loss = float(weighted(torch.tensor(figures)[points], self.weights_M[points]))
        seen = tuple(figures[i] if i in points else None for i in range(len(self.figure_names)))
        return StepFigures(loss, seen, watched=seen)


@functools.lru_cache(maxsize=4096)
def _positions(points: tuple[int, ...], device: torch.device) -> Tensor:
    """`points` as an index on the device, copied there only once: a list would be copied, and waited for, each time."""
    return torch.tensor(points, device=device)
