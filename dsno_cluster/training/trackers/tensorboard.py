"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dsno_cluster.errors import UserError


class TensorBoard:
    """A tracker that writes event files to a folder; a resumed training hides what was written after its start."""

    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "training.tensorboard: the package tensorboard is not installed; pip install tensorboard, "
                "or set it to false"
            ) from None
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def images(self, step: int, images_NCHW: Tensor) -> None:
        self.writer.add_images("samples", (images_NCHW.clamp(-1, 1) + 1) / 2, step)

    def close(self, *, failed: bool) -> None:
        self.writer.close()
