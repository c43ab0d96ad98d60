"""The teacher of a config, as training needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsno_cluster.config import Config, validate
from dsno_cluster.teachers import Teacher, diffusers_model, warm_start_weights
from dsno_cluster.trajectories.plan import open_teacher, teacher_path

if TYPE_CHECKING:
    from torch import Tensor

    from dsno_cluster.networks.diffusers_backbone import DiffusersModel


class ConfiguredTeacher:
    """Read by rank 0 only."""

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, teacher_path(config)

    def load(self) -> Teacher:
        """Its network, on the CPU. Raises UserError if it does not fit the config."""
        return open_teacher(self.config)

    def warm_start(self) -> dict[str, Tensor]:
        """Its weights as a student begins from them. Raises UserError if it is no network that a student can start from."""
        return warm_start_weights(self.path, self.config.storage.endpoint_url, **self.config.teacher.options)

    def diffusers_model(self) -> DiffusersModel:
        """The description of its network. Raises UserError if it is not a diffusers model."""
        from dsno_cluster.networks.diffusers_backbone import DiffusersModel

        found = diffusers_model(self.path, self.config.storage.endpoint_url, **self.config.teacher.options)
        return validate(DiffusersModel, found, self.path)
