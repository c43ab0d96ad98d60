"""What a denoising U-Net predicts, and how clean images follow from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


PREDICTIONS = ("x", "eps", "v", "both")


def out_channels(prediction: str, channels: int) -> int:
    """Channels of the last layer: twice the image's if the network predicts both x0 and eps."""
    return 2 * channels if prediction == "both" else channels


def clean_images(prediction: str, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0 from a network's output; `alpha` and `sigma` broadcast over the images.

    v = alpha eps - sigma x0. `both` (Salimans & Ho 2022, section 4) is 2C channels, x0 then eps, weighted
    sigma^2 and alpha^2: sigma^2 x0 + alpha^2 (x - sigma eps) / alpha.
    """
    if prediction == "x":
        return output
    if prediction == "v":
        return alpha * x - sigma * output
    if prediction == "eps":
        return (x - sigma * output) / alpha
    direct, eps = output.chunk(2, dim=1)
    return sigma**2 * direct + alpha * (x - sigma * eps)
