"""DDPM++ and NCSN++: the U-Nets of Song et al. 2021 (appendix H), with the switches of Karras et al. 2022 (table 8).

DDPM++ has positional embeddings, a box filter and plain encoder and decoder; NCSN++ has Fourier embeddings, the filter
(1, 3, 3, 1) and an encoder into which the image enters again at each level (`residual`, or `skip`). With decoder `skip`
each level adds its part of the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.networks.edm_layers import (
    FourierEmbedding,
    Resample,
    UNetBlock,
    conv,
    decoder_blocks,
    group_norm,
    one_hot,
    positional_embedding,
)
from dsno_cluster.networks.edm_settings import SongSettings
from dsno_cluster.networks.normalization import normalized

EPS = 1e-6
HALF = math.sqrt(0.5)  # of two terms of equal variance, so that the sum has it too


class ImageBranch(nn.Module):
    """The image on its way beside the encoder: a convolution of the image, halved by `resample` after it."""

    def __init__(self, c_in: int, c_out: int, taps: tuple[int, ...]) -> None:
        super().__init__()
        # filtered after the convolution, which therefore reaches as far beyond the border as the filter
        reach = (len(taps) - 1) // 2
        self.weight = nn.Parameter(torch.empty(c_out, c_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(c_out))
        nn.init.xavier_uniform_(self.weight)
        self.padding, self.resample = 1 + reach, Resample("down", taps, padding=0)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        halved: Tensor = self.resample(F.conv2d(x_NCHW, self.weight, self.bias, padding=self.padding))
        return halved


class SongUNet(nn.Module):
    """The U-Net described at the top of this module. Its noise level is a number of any meaning, (N,) float32."""

    def __init__(self, settings: SongSettings) -> None:
        super().__init__()
        self.settings = settings
        width, embedding = settings.model_channels, settings.model_channels * settings.channel_mult_emb
        self.noise_channels = width * settings.channel_mult_noise
        fourier = settings.embedding_type == "fourier"
        self.map_noise = FourierEmbedding(self.noise_channels) if fourier else None
        self.map_label = nn.Linear(settings.label_dim, self.noise_channels) if settings.label_dim else None
        self.map_layer0 = nn.Linear(self.noise_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        taps, images = settings.resample_filter, settings.out_channels

        def block(name: str, c_in: int, c_out: int, resample: str = "") -> UNetBlock:
            return UNetBlock(
                c_in,
                c_out,
                embedding,
                resample=resample,
                taps=taps,
                heads=settings.heads.get(name, 0),
                dropout=settings.dropout,
                skip_scale=HALF,
                eps=EPS,
                project=True,
                adaptive=False,
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = list(enumerate(zip(settings.resolutions, settings.channel_mult, strict=True)))
        c, c_image, skips = settings.in_channels, settings.in_channels, []
        for level, (size, multiplier) in levels:
            at = f"{size}x{size}"
            if level == 0:
                self.enc[f"{at}_conv"], c = conv(c, width, 3), width
            else:
                self.enc[f"{at}_down"] = block(f"enc.{at}_down", c, c, "down")
                if settings.encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = Resample("down", taps)
                    self.enc[f"{at}_aux_skip"] = conv(c_image, c, 1)
                elif settings.encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = ImageBranch(c_image, c, taps)
                    c_image = c
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
            if settings.decoder_type == "skip" or level == 0:
                if settings.decoder_type == "skip" and not lowest:
                    self.dec[f"{at}_aux_up"] = Resample("up", taps)
                self.dec[f"{at}_aux_norm"] = group_norm(c, EPS)
                self.dec[f"{at}_aux_conv"] = conv(c, images, 3)

    def embedding(self, noise_N: Tensor, labels_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding of noise levels and classes, (N, E), after its SiLU."""
        if self.map_noise is None:
            e = positional_embedding(noise_N, self.noise_channels, end_point=True, sine_first=True)
        else:
            e = self.map_noise(noise_N)
        e = e.to(dtype)
        if self.map_label is not None:
            classes = self.settings.label_dim
            e = e + self.map_label(one_hot(labels_N, classes, e) * math.sqrt(classes))
        embedded: Tensor = F.silu(self.map_layer1(F.silu(self.map_layer0(e))))
        return embedded

    def forward(self, x_NCHW: Tensor, noise_N: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W), noise levels (N,) and classes (N,), `label_dim` for none -> (N, C_out, H, W)."""
        e = self.embedding(noise_N, labels_N, x_NCHW.dtype)
        x = x_NCHW.contiguous(memory_format=torch.channels_last)
        image = x
        skips: list[Tensor] = []
        for name, module in self.enc.items():
            part = name.partition("_")[2]
            if part == "aux_down":
                image = module(image)
            elif part == "aux_skip":
                x = skips[-1] = x + module(image)
            elif part == "aux_residual":
                x = skips[-1] = image = (x + module(image)) * HALF
            else:
                x = module(x) if part == "conv" else module(x, e)
                skips.append(x)
        output: Tensor | None = None
        normal = x
        for name, module in self.dec.items():
            part = name.partition("_")[2]
            if part == "aux_up":
                output = module(output)
            elif part == "aux_norm":
                assert isinstance(module, nn.GroupNorm)
                normal = normalized(module, x)
            elif part == "aux_conv":
                change = module(normal)
                output = change if output is None else output + change
            else:
                x = module(torch.cat([x, skips.pop()], dim=1) if part.startswith("block") else x, e)
        assert output is not None  # the first level has a last layer in every network
        return output
