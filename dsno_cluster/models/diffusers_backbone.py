"""A diffusers UNet2DModel as the backbone of a student: the same call as our U-Net's, with temporal convolutions.

One stands after each residual (+ attention) block, and in the middle between attention and the second block, as in
our own (Zheng et al. 2023, figure 3). They are hung on diffusers' own blocks as forward hooks, so the tensors of the
model keep diffusers' names, below `unet.`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsno_cluster.diffusion.diffusers_folder import noise_levels, timesteps_at, unet2d_model
from dsno_cluster.models.temporal import FourierBasis, TemporalConv


class DiffusersBackbone(nn.Module):
    """`config` is that of the UNet2DModel, `scheduler` that of its noise levels, as `diffusers_folder` reads them."""

    def __init__(
        self,
        config: dict[str, Any],
        scheduler: dict[str, Any],
        *,
        modes: int,
        out_channels: int,
        init: str = "published",
    ) -> None:
        super().__init__()
        self.unet = unet2d_model(
            {**config, "out_channels": out_channels}, "a student with a diffusers backbone"
        )
        self.levels = noise_levels(scheduler, "scheduler")
        self.temporal = nn.ModuleList()
        self._bases: tuple[FourierBasis | None, FourierBasis | None] = (None, None)  # of the pass that runs
        if modes:
            self._add_temporal(modes, init)

    def forward(
        self,
        x_NCHW: Tensor,
        logsnr: Tensor,
        labels_N: Tensor | None = None,
        basis: FourierBasis | None = None,
        last_basis: FourierBasis | None = None,
    ) -> Tensor:
        """As `UNet.forward`. Levels outside the scheduler's are taken as its nearest."""
        count, points = x_NCHW.shape[0], logsnr.shape[1]
        timestep_B = timesteps_at(self.levels, logsnr).expand(count, points).reshape(-1).float()
        x_BCHW = x_NCHW.contiguous(memory_format=torch.channels_last).repeat_interleave(points, dim=0)
        labels_B = None if labels_N is None else labels_N.repeat_interleave(points)
        self._bases = (basis, last_basis or basis)
        output = self.unet(x_BCHW, timestep_B, labels_B, return_dict=False)[0]
        return output.reshape(count, -1, *output.shape[1:])

    def _add_temporal(self, modes: int, init: str) -> None:
        def follow(block: nn.Module, channels: int, last: bool = False) -> None:
            temporal = TemporalConv(channels, modes, init)
            self.temporal.append(temporal)
            block.register_forward_hook(lambda _block, _inputs, h: temporal(h, self._bases[last]))

        unet, middle = self.unet, self.unet.mid_block
        ends = [
            (block, resnet.out_channels)
            for level in (*unet.down_blocks, *unet.up_blocks)
            for resnet, block in zip(level.resnets, getattr(level, "attentions", level.resnets), strict=True)
        ]
        for i, (block, channels) in enumerate(ends):
            follow(block, channels, last=i == len(ends) - 1)
        if middle is not None:
            has_attention = len(middle.attentions) > 0 and middle.attentions[0] is not None
            follow(
                middle.attentions[0] if has_attention else middle.resnets[0], middle.resnets[0].out_channels
            )
