"""The description of a diffusers UNet2DModel in `meta.json` and specs; needs no torch."""

from __future__ import annotations

from dsno_cluster.config.base import Strict
from dsno_cluster.records import Values


class DiffusersModel(Strict):
    """A diffusers model: configs of the UNet2DModel and of the scheduler that defines its noise levels."""

    config: Values
    scheduler: Values
