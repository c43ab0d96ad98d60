"""The objective of a config, with what it needs besides the student, on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.features.statistics import Gaussian
from dsno_cluster.teachers import ConfiguredTeacher, find_teacher
from dsno_cluster.training.objectives import Objective
from dsno_cluster.training.objectives.distribution import begin_distribution
from dsno_cluster.training.objectives.frechet import find_real_moments
from dsno_cluster.training.objectives.trajectories import TrajectoryObjective
from dsno_cluster.training.ranks import Ranks, broadcast_weights, from_rank_0, on_every_rank
from dsno_cluster.training.real_images import RealImages, real_images


def find_real_images(
    config: Config,
    teacher: ConfiguredTeacher | None,
    device: torch.device | None = None,
    *,
    quiet: bool = False,
) -> RealImages | None:
    """The real images that distribution matching learns from and is compared with, None if there are none.

    `teacher` is found if it is not known; `device` and `quiet` are those of `real_images`. Raises UserError as that does.
    """
    if config.training.objective != "distribution" or not config.data.named:
        return None
    return real_images(config, (teacher or find_teacher(config)).states, device, quiet=quiet)


def make_objective(
    config: Config, teacher: ConfiguredTeacher | None, real: RealImages | None, ranks: Ranks
) -> Objective:
    """The objective of the config, its tensors on the ranks' devices; collective.

    `teacher` is found on ranks that do not know it. Raises UserError, on every rank, if weights that the objective needs are
    missing or cannot be used for it.
    """

    moments = None
    if config.training.learns_features:
        moments = from_rank_0(ranks, lambda: _real_moments(config, teacher, real, ranks))

    def make() -> Objective:
        if config.training.objective == "trajectories":
            return TrajectoryObjective(config, ranks.device)
        found = teacher or find_teacher(config)
        return begin_distribution(config, found, real, ranks.device, moments, ranks.world_size)

    objective = on_every_rank(ranks, make)
    for companion in objective.companions.values():
        broadcast_weights(companion.network, ranks)
    return objective


def _real_moments(
    config: Config, teacher: ConfiguredTeacher | None, real: RealImages | None, ranks: Ranks
) -> Gaussian[Tensor]:
    assert real is not None  # the config was checked
    return find_real_moments(config, (teacher or find_teacher(config)).states, real, ranks.device)
