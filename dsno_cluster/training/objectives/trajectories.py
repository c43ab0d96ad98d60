"""The trajectory objective: the weighted distance between predicted and solved states at the time points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import loss_weights
from dsno_cluster.training.objectives import StepFigures, Student
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
        self.config, self.device, self.num_figures = config, device, len(times)
        self.distance = make_distance(settings.loss, settings.lpips_weights, settings.lpips_sha256)
        if isinstance(self.distance, nn.Module):
            self.distance.to(device)
        self.weights_M = loss_weights(settings.time_weighting, times).float()
        self.weights_on_device_M = self.weights_M.to(device)

    def points(self, step: int) -> list[int]:
        """Positions of the time points that optimiser step `step` sees, ascending: all, or those drawn for it."""
        settings = self.config.training
        if self.config.student.points == "all":
            return list(range(self.num_figures))
        return drawn_points(
            self.config.seed, step, self.num_figures, settings.end_share, settings.most_points
        )

    def distances(self, student: Student, batch: Batch, points: Sequence[int]) -> Tensor:
        """The distance at each of `points`, (len(points),), the mean over samples and pixels."""
        labels = None if batch.labels is None else batch.labels.to(self.device)
        predicted = student(batch.noise.to(self.device), labels, points)
        return self.distance(predicted.float(), batch.states[:, points].to(self.device))

    def loss(self, student: Student, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The mean over the step's points of weight times distance, and the distances, (M,)."""
        points = self.points(step)
        distances = self.distances(student, batch, points)
        distances_M = torch.zeros(self.num_figures, device=self.device)
        distances_M[points] = distances.detach()
        return weighted(distances, self.weights_on_device_M[points]), distances_M

    def summary(self, figures: Sequence[float], step: int) -> StepFigures:
        points = self.points(step)
        seen = tuple(figures[i] if i in points else None for i in range(self.num_figures))
        return StepFigures(float(weighted(torch.tensor(figures)[points], self.weights_M[points])), seen)
