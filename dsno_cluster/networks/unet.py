"""A DDPM++-style U-Net over images, with a time axis.

The network evaluates M time points of the same input at once: `forward(x, logsnr, labels)` gives (N, M, C, H,
W). A denoiser is the case M = 1. Inside, the M points of a sample lie next to each other in the batch, so
every block except the temporal convolution sees plain images; what does not depend on time is computed once
per sample. Structure, normalisation and embeddings are those of the published DSNO network (Zheng et al.
2023; Salimans & Ho 2022), so published weights fit. Activations are channels-last.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.errors import UserError
from dsno_cluster.networks.normalization import normalized, repeat
from dsno_cluster.networks.temporal import FourierBasis, TemporalConv

if TYPE_CHECKING:
    from dsno_cluster.config import Network

NORM_EPS = 1e-6


def scaled_uniform_(weight: Tensor, scale: float = 1.0) -> None:
    """Variance scaling, fan_avg, uniform (the initialisation of DDPM); `scale` 0 means 1e-10."""
    receptive_field = weight[0][0].numel()
    fan_avg = receptive_field * (weight.shape[0] + weight.shape[1]) / 2
    bound = math.sqrt(3 * max(scale, 1e-10) / fan_avg)
    nn.init.uniform_(weight, -bound, bound)


def _conv(c_in: int, c_out: int, kernel: int, scale: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    assert conv.bias is not None
    scaled_uniform_(conv.weight.data, scale)
    nn.init.zeros_(conv.bias)
    return conv


def _linear(c_in: int, c_out: int) -> nn.Linear:
    linear = nn.Linear(c_in, c_out)
    scaled_uniform_(linear.weight.data)
    nn.init.zeros_(linear.bias)
    return linear


def _block_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=NORM_EPS)


def level_embedding(logsnr: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of the noise level; any shape S -> (*S, dim), float32.

    The level is atan(exp(-logsnr / 2)) / (pi / 2) in [0, 1], multiplied by 1000 (Salimans & Ho 2022).
    """
    level = torch.atan(torch.exp(-0.5 * logsnr.clamp(-20.0, 20.0))) / (0.5 * math.pi)
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=logsnr.device) * (-math.log(10000.0) / (half - 1)))
    angle = (1000.0 * level.float())[..., None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, dim % 2))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, (resample), conv, FiLM from the embedding, conv; plus the (projected) input."""

    def __init__(self, c_in: int, c_out: int, embedding_dim: int, dropout: float, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = _block_norm(c_in)
        self.conv_in = _conv(c_in, c_out, 3)
        self.film = _linear(embedding_dim, 2 * c_out)
        self.norm_out = _block_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = _conv(c_out, c_out, 3, scale=0.0)
        self.skip = _conv(c_in, c_out, 1, scale=0.1) if c_in != c_out else nn.Identity()

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        """(B, C_in, H, W) and the embedding after SiLU, (B, E) -> (B, C_out, H', W').

        With M embeddings for each of N images, adjacent, x may be (N, C_in, H, W): the result is (N*M, ...).
        """
        h = normalized(self.norm_in, x_BCHW)
        if self.resample == "down":
            h, x_BCHW = F.avg_pool2d(h, 2), F.avg_pool2d(x_BCHW, 2)
        elif self.resample == "up":
            h, x_BCHW = (F.interpolate(y, scale_factor=2, mode="nearest") for y in (h, x_BCHW))
        h = normalized(self.norm_out, self.conv_in(h), self.film(embedding_BE))
        change: Tensor = self.conv_out(self.dropout(h))
        return repeat(self.skip(x_BCHW), len(embedding_BE)) + change


class Attention(nn.Module):
    """Self-attention over pixels. `qkv` packs [q | k | v] of head 0, then of head 1, and so on."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(32, channels, eps=NORM_EPS)
        self.qkv = _conv(channels, 3 * channels, 1, scale=0.1)
        self.out = _conv(channels, channels, 1, scale=0.0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        qkv_BLhD = (
            self.qkv(normalized(self.norm, x_BCHW, activate=False))
            .permute(0, 2, 3, 1)
            .reshape(batch, height * width, self.heads, -1)
        )
        h_BhLd = F.scaled_dot_product_attention(*qkv_BLhD.transpose(1, 2).chunk(3, dim=-1))
        h_BHWC = h_BhLd.transpose(1, 2).reshape(batch, height, width, channels)
        change: Tensor = self.out(h_BHWC.permute(0, 3, 1, 2))
        return x_BCHW + change


class Stage(nn.Module):
    """A residual block, then attention and temporal convolution if the network has them here."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding_dim: int,
        network: Network,
        *,
        attend: bool,
        modes: int,
        init: str,
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(c_in, c_out, embedding_dim, network.dropout)
        self.attention = Attention(c_out, network.head_dim or c_out // network.heads) if attend else None
        self.temporal = TemporalConv(c_out, modes, init) if modes else None

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, basis: FourierBasis | None) -> Tensor:
        h: Tensor = self.residual(x_BCHW, embedding_BE)
        if self.attention is not None:
            h = self.attention(h)
        if self.temporal is not None:
            h = self.temporal(h, basis)
        return h


class Level(nn.Module):
    """All blocks of one resolution, on one side of the U; `resample` leads to the next resolution."""

    def __init__(self, stages: list[Stage], resample: ResidualBlock | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(stages)
        self.resample = resample


def _sizes(network: Network) -> tuple[int, tuple[int, ...], int, int]:
    """(width, multipliers, blocks_per_level, embedding_dim). Raises UserError if one is not set."""
    width, multipliers = network.width, network.multipliers
    blocks, dim = network.blocks_per_level, network.embedding_dim
    if width is None or multipliers is None or blocks is None or dim is None:
        raise UserError(f"network: a U-Net needs {', '.join(network.missing_sizes)}")
    return width, multipliers, blocks, dim


class UNet(nn.Module):
    """The U-Net described at the top of this module.

    `modes` 0 means no temporal convolutions (a plain denoiser). `out_channels` defaults to the images'
    channels; a denoiser may predict x0 and eps together. `init` is that of the temporal convolutions.
    """

    def __init__(
        self, network: Network, modes: int = 0, out_channels: int | None = None, init: str = "published"
    ) -> None:
        super().__init__()
        width, multipliers, blocks, dim = _sizes(network)
        self.width = width
        self.num_classes = network.num_classes
        self.embed_level_in, self.embed_level_out = _linear(width, dim), _linear(dim, dim)
        # A class embedding is a linear map of the one-hot class; the null class, if there is one, is last.
        self.embed_class = nn.Linear(network.class_slots, dim) if network.num_classes else None
        self.conv_in = _conv(network.state_channels, width, 3)

        def stage(c_in: int, c_out: int, attend: bool) -> Stage:
            return Stage(c_in, c_out, dim, network, attend=attend, modes=modes, init=init)

        def resample(channels: int, direction: str) -> ResidualBlock:
            return ResidualBlock(channels, channels, dim, network.dropout, direction)

        sizes = network.level_heights(len(multipliers))
        skips, c = [width], width
        self.down = nn.ModuleList()
        for i, (multiplier, size) in enumerate(zip(multipliers, sizes, strict=True)):
            stages = []
            for _ in range(blocks):
                stages.append(stage(c, width * multiplier, size in network.attention_resolutions))
                c = width * multiplier
                skips.append(c)
            last = i == len(sizes) - 1
            self.down.append(Level(stages, None if last else resample(c, "down")))
            skips += [] if last else [c]
        self.middle_in = stage(c, c, True)
        self.middle_out = ResidualBlock(c, c, dim, network.dropout)
        self.up = nn.ModuleList()
        for i, (multiplier, size) in reversed(list(enumerate(zip(multipliers, sizes, strict=True)))):
            stages = []
            for _ in range(blocks + 1):
                stages.append(
                    stage(c + skips.pop(), width * multiplier, size in network.attention_resolutions)
                )
                c = width * multiplier
            self.up.append(Level(stages, None if i == 0 else resample(c, "up")))
        self.norm_out = nn.GroupNorm(32, c, eps=NORM_EPS)
        self.conv_out = _conv(c, out_channels or network.state_channels, 3, scale=0.0)

    def forward(
        self,
        x_NCHW: Tensor,
        logsnr: Tensor,
        labels_N: Tensor | None = None,
        basis: FourierBasis | None = None,
        last_basis: FourierBasis | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) and levels (N, M), or (1, M) shared by all -> (N, M, C_out, H, W).

        `labels_N` are int64 class indices, needed if the network has classes; `basis` is that of the temporal
        convolutions, needed if there are any. After the last of them the points no longer interact: with a
        `last_basis` that wants P of the points, only those are computed from there on -> (N, P, C_out, H, W).
        Raises ValueError if labels are missing or not wanted.
        """
        if (labels_N is not None) != (self.embed_class is not None):
            raise ValueError(
                f"the network has {self.num_classes} classes; labels given: {labels_N is not None}"
            )
        count, points = x_NCHW.shape[0], logsnr.shape[1]
        embedding = self.embed_level_in(level_embedding(logsnr, self.width).to(x_NCHW.dtype))
        embedding = self.embed_level_out(F.silu(embedding))  # (N or 1, M, E)
        if self.embed_class is not None and labels_N is not None:
            one_hot = F.one_hot(labels_N, self.embed_class.in_features).to(x_NCHW.dtype)
            embedding = embedding + self.embed_class(one_hot)[:, None]
        # every block begins by applying silu to the embedding: done once here instead of once per block
        e = F.silu(embedding).expand(count, points, -1).reshape(count * points, -1)

        # time enters in the middle of the first block: (N, C, H, W) until there, then (N*M, C, H, W), M fastest
        h = self.conv_in(x_NCHW.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self.down:
            assert isinstance(level, Level)
            for block in level.blocks:
                h = block(h, e, basis)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, e)
                skips.append(h)
        h = self.middle_out(self.middle_in(h, e, basis), e)
        last_level = self.up[-1]
        for level in self.up:
            assert isinstance(level, Level)
            for block in level.blocks:
                last_block = level is last_level and block is level.blocks[-1]
                wanted = last_basis if last_block and last_basis is not None else basis
                h = block(torch.cat([h, repeat(skips.pop(), len(e))], dim=1), e, wanted)
            if level.resample is not None:
                h = level.resample(h, e)
        output: Tensor = self.conv_out(normalized(self.norm_out, h))
        return output.reshape(count, -1, *output.shape[1:])
