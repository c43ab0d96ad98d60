"""Losses over a trajectory: per-time-point distances of predicted and target states, and their weighting.

Every distance maps (N, M, C, H, W) predictions and targets to (M,), the mean over samples and pixels; the loss
is the mean over points of weight times distance (Zheng et al. 2023, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.config import Training
from dsno_cluster.errors import UserError
from dsno_cluster.files import file_sha256, not_there
from dsno_cluster.weight_files import check_fit, parse_weights

Distance = Callable[[Tensor, Tensor], Tensor]


def l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference per time point, (M,)."""
    return (predicted - target).abs().mean(dim=(0, 2, 3, 4))


def l2(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference per time point, (M,)."""
    return (predicted - target).square().mean(dim=(0, 2, 3, 4))


def pseudo_huber(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c per pixel, (M,): quadratic near 0, absolute far from it.

    Pixelwise form of Song & Dhariwal 2023, with c = 0.03 (their 0.00054 sqrt(dim) at CIFAR-10's size).
    """
    c = 0.03
    return (((predicted - target).square() + c * c).sqrt() - c).mean(dim=(0, 2, 3, 4))


def weighted(distances_M: Tensor, weights_M: Tensor) -> Tensor:
    """The scalar loss: mean over time points of weight times distance."""
    return (distances_M * weights_M).mean()


class VGGPerceptual(nn.Module):
    """LPIPS with VGG-16 features and no calibration layer, the published CIFAR-10 loss (Zhang et al. 2018, eq. 1).

    Features after the last ReLU of each of the five blocks, unit-normalised over channels; squared differences
    summed over channels, averaged over space, summed over layers.
    """

    shift: Tensor
    scale: Tensor
    BLOCK_ENDS = (3, 8, 15, 22, 29)  # indices of those ReLUs in torchvision's `vgg16().features`

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features[: self.BLOCK_ENDS[-1] + 1].eval().requires_grad_(False)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """(N, M, 3, H, W) images in [-1, 1], H and W of 16 or more -> (M,)."""
        count, points = predicted.shape[:2]
        a, b = ((x.flatten(0, 1) - self.shift) / self.scale for x in (predicted, target))
        total = torch.zeros(count * points, device=a.device, dtype=a.dtype)
        for index, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if index in self.BLOCK_ENDS:
                difference = F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)
                total = total + difference.square().sum(dim=1).mean(dim=(1, 2))
        return total.reshape(count, points).mean(dim=0)


def vgg_perceptual(path: str, sha256: str | None) -> VGGPerceptual:
    """LPIPS from torchvision's VGG-16 weights (`vgg16-397923af.pth`, or the same as safetensors).

    Raises UserError as `check_lpips_weights` does.
    """
    from torchvision.models import vgg16

    weights = _read_vgg(path, sha256)
    network = vgg16(weights=None)
    network.load_state_dict(weights)
    return VGGPerceptual(network.features)


def check_lpips_weights(settings: Training) -> None:
    """Raises UserError if the config's loss needs weights that do not exist or are not VGG-16's."""
    if settings.needs_vgg:
        _read_vgg(str(settings.lpips_weights), settings.lpips_sha256)


def _read_vgg(path: str, sha256: str | None) -> dict[str, Tensor]:
    """VGG-16's weights by name.

    Raises UserError if the file is missing or holds others, or its sha256 does not begin with `sha256`.
    """
    from torchvision.models import vgg16

    file, key = Path(path), "training.lpips_weights"
    if not file.is_file():
        raise UserError(
            f"training.lpips_weights: {file} is missing ({not_there(file)}); put torchvision's VGG-16 weights "
            "(vgg16-397923af.pth) there, or take training.loss=l1"
        )
    if sha256:
        found = file_sha256(file)
        if not found.startswith(sha256):
            raise UserError(f"{key}: {path} has sha256 {found}, training.lpips_sha256 says {sha256}")
    weights = parse_weights(file, f"{key}: {path}")
    with torch.device("meta"):
        wanted = vgg16(weights=None).state_dict()
    check_fit(weights, wanted, f"{key}: {path} does not hold VGG-16's weights")
    return weights


def make_distance(name: str, lpips_weights: str | None = None, lpips_sha256: str | None = None) -> Distance:
    """The distance of `training.loss`."""
    if name == "lpips":
        return vgg_perceptual(str(lpips_weights), lpips_sha256)
    return {"l1": l1, "l2": l2, "pseudo-huber": pseudo_huber}[name]


def distance_of_shapes(name: str) -> Distance:
    """The distance of `training.loss` with weights of no value, for passes that follow only shapes."""
    from torchvision.models import vgg16

    if name != "lpips":
        return make_distance(name)
    network = vgg16(weights=None, init_weights=False)
    return VGGPerceptual(network.features)
