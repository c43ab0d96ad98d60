"""ADM: the U-Net of Dhariwal & Nichol 2021, as Karras et al. 2022 (appendix F.2, table 8) have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.networks.edm_layers import (
    UNetBlock,
    conv,
    decoder_blocks,
    group_norm,
    one_hot,
    positional_embedding,
)
from dsno_cluster.networks.edm_settings import DhariwalSettings
from dsno_cluster.networks.normalization import normalized

EPS = 1e-5


class DhariwalUNet(nn.Module):
    """The U-Net described at the top of this module. Its noise level is a number of any meaning, (N,) float32."""

    def __init__(self, settings: DhariwalSettings) -> None:
        super().__init__()
        self.settings = settings
        width, embedding = settings.model_channels, settings.model_channels * settings.channel_mult_emb
        self.map_layer0, self.map_layer1 = nn.Linear(width, embedding), nn.Linear(embedding, embedding)
        classes = settings.label_dim
        self.map_label = nn.Linear(classes, embedding, bias=False) if classes else None

        def block(name: str, c_in: int, c_out: int, resample: str = "") -> UNetBlock:
            heads = settings.heads.get(name, 0)
            return UNetBlock(
                c_in, c_out, embedding, resample=resample, heads=heads, dropout=settings.dropout, eps=EPS
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = list(enumerate(zip(settings.resolutions, settings.channel_mult, strict=True)))
        c, skips = settings.in_channels, []
        for level, (size, multiplier) in levels:
            at = f"{size}x{size}"
            if level == 0:
                self.enc[f"{at}_conv"], c = conv(c, width * multiplier, 3), width * multiplier
            else:
                self.enc[f"{at}_down"] = block(f"enc.{at}_down", c, c, "down")
            skips.append(c)
            for i in range(settings.num_blocks):
                name = f"{at}_block{i}"
                self.enc[name], c = block(f"enc.{name}", c, width * multiplier), width * multiplier
                skips.append(c)
        for level, (size, multiplier) in reversed(levels):
            at, lowest = f"{size}x{size}", level == len(levels) - 1
            blocks = decoder_blocks(at, c, width * multiplier, settings.num_blocks + 1, skips, lowest)
            for name, c_in, c_out, resample in blocks:
                self.dec[name] = block(f"dec.{name}", c_in, c_out, resample)
            c = width * multiplier
        self.out_norm, self.out_conv = group_norm(c, EPS), conv(c, settings.out_channels, 3)

    def embedding(self, noise_N: Tensor, labels_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding of noise levels and classes, (N, E), after its SiLU."""
        width, classes = self.settings.model_channels, self.settings.label_dim
        e = positional_embedding(noise_N, width, end_point=False, sine_first=False).to(dtype)
        e = self.map_layer1(F.silu(self.map_layer0(e)))
        if self.map_label is not None:
            e = e + self.map_label(one_hot(labels_N, classes, e))
        return F.silu(e)

    def forward(self, x_NCHW: Tensor, noise_N: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W), noise levels (N,) and classes (N,), `label_dim` for none -> (N, C_out, H, W)."""
        e = self.embedding(noise_N, labels_N, x_NCHW.dtype)
        x, skips = x_NCHW.contiguous(memory_format=torch.channels_last), []
        for name, module in self.enc.items():
            x = module(x) if name.endswith("_conv") else module(x, e)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, e)
        output: Tensor = self.out_conv(normalized(self.out_norm, x))
        return output
