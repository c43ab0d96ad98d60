"""What a diffusers UNet2DModel is built from; without torch, as `meta.json` and specs hold it."""

from __future__ import annotations

from dsno_cluster.config.base import Strict
from dsno_cluster.records import Values


class DiffusersModel(Strict):
    """A diffusers model: `config` is that of the UNet2DModel, `scheduler` that of its noise levels."""

    config: Values
    scheduler: Values
