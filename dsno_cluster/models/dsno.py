"""The student: a U-Net backbone with temporal convolutions that maps noise to states at M times at once.

`load_student(path)` is the door; `student.sample(noise, labels)` and `student.trajectory(noise, labels)` are
what it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsno_cluster.config import Network, validate
from dsno_cluster.diffusion.schedule import logsnr
from dsno_cluster.errors import UserError
from dsno_cluster.models.unet import UNet
from dsno_cluster.models.weights import read_model

KIND = "dsno"


class DSNO(nn.Module):
    """The solution operator of the probability-flow ODE (Zheng et al. 2023).

    `forward` gives the states themselves, not a noise prediction: at t = 0 sigma vanishes, and with it every
    gradient through a term multiplied by it.
    """

    def __init__(self, network: Network, modes: int, times: Sequence[float]) -> None:
        super().__init__()
        if modes > len(times) // 2 + 1:
            raise ValueError(
                f"modes {modes} is above M//2+1 = {len(times) // 2 + 1} for {len(times)} time points"
            )
        self.network, self.modes = network, modes
        self.times = tuple(float(t) for t in times)
        self.backbone = UNet(network, modes)

    def forward(self, noise_NCHW: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """Noise (N, C, H, W) at t=1 -> states at `self.times`, (N, M, C, H, W)."""
        levels_1M = logsnr(torch.tensor(self.times)).to(noise_NCHW.device, torch.float32)[None]
        return self.backbone(noise_NCHW, levels_1M, self._checked(labels_N))

    @torch.no_grad()
    def trajectory(
        self, noise: Tensor, labels: Tensor | None = None, times: Sequence[float] | None = None
    ) -> Tensor:
        """States at `times` (default: the model's own), (N, M, C, H, W), in the noise's dtype.

        Raises ValueError for a time that is not one of the model's own, naming those, and for labels that are
        missing or out of range.
        """
        wanted = self.times if times is None else tuple(float(t) for t in times)
        unknown = [t for t in wanted if t not in self.times]
        if unknown or not wanted:
            raise ValueError(f"times {unknown} are not among those of this model: {list(self.times)}")
        states = self(noise, labels)
        return states if wanted == self.times else states[:, [self.times.index(t) for t in wanted]]

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images from noise in one evaluation, (N, C, H, W): the last state, in [-1, 1] up to overshoot."""
        return self.trajectory(noise, labels)[:, -1]

    def describe(self) -> dict[str, Any]:
        """What `meta.json` says under `model`, enough to build the network again."""
        network = self.network.model_dump(mode="json")
        return {"kind": KIND, "network": network, "modes": self.modes, "times": list(self.times)}

    def _checked(self, labels_N: Tensor | None) -> Tensor | None:
        classes = self.network.num_classes
        if (labels_N is None) != (classes == 0):
            raise ValueError(
                f"this model has {classes} classes: {'labels are needed' if classes else 'it takes no labels'}"
            )
        if (
            labels_N is not None
            and len(labels_N)
            and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < classes
        ):
            raise ValueError(
                f"labels must lie in 0..{classes - 1}, found {int(labels_N.min())}..{int(labels_N.max())}"
            )
        return labels_N


def load_student(path: str, endpoint_url: str | None = None) -> DSNO:
    """The student of a run folder (its `latest`), a step folder or an import folder, on CPU, for inference.

    Raises UserError where the folder holds no student.
    """
    folder = read_model(str(path), endpoint_url)
    model = folder.meta["model"]
    if model["kind"] != KIND:
        raise UserError(f"{path}: holds a {model['kind']!r} model, not a student")
    student = DSNO(validate(Network, model["network"], f"{path}/meta.json"), model["modes"], model["times"])
    student.load_state_dict(folder.weights)
    return student.eval().requires_grad_(False)
