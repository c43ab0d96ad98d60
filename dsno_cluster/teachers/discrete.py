"""Denoisers by networks that were trained on discrete noise levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsno_cluster.diffusion.discrete_levels import level_at
from dsno_cluster.diffusion.predictions import clean_images

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsno_cluster.teachers.state_dict_file import Denoise


def of_discrete_levels(
    network: nn.Module, dtype: torch.dtype, levels: tuple[float, ...], scale: float, prediction: str
) -> Denoise:
    """The denoiser of a network that takes `scale` times its timestep and predicts x or eps in its first channels.

    A state outside its levels is treated as one at the nearest of them.
    """

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        timestep_N, *scales = level_at(levels, t_N)
        alpha, sigma = (s.to(x.dtype)[:, None, None, None] for s in scales)
        output: Tensor = network(x.to(dtype), (scale * timestep_N).float(), labels)[:, : x.shape[1]].to(
            x.dtype
        )
        return clean_images(prediction, output, x, alpha, sigma)

    return denoise
