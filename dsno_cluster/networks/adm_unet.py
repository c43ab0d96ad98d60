"""The U-Net of Dhariwal & Nichol 2021 (*Diffusion Models Beat GANs*, section 3) and Nichol & Dhariwal 2021, as a denoiser.

Each resolution has residual blocks, followed by self-attention where the description says so; the middle always attends.
The way up has one block more at each resolution than the way down, since every output of the way down is one of its
inputs. Activations are channels-last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.networks.descriptions import ADMDescription
from dsno_cluster.networks.embeddings import cosines_and_sines
from dsno_cluster.networks.normalization import normalized

GROUPS = 32


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, (resample), conv, embedding, GroupNorm, SiLU, conv; plus the (projected) input."""

    def __init__(self, c_in: int, c_out: int, embedding_dim: int, film: bool, resample: str = "") -> None:
        super().__init__()
        self.with_film, self.resample = film, resample
        self.norm_in = nn.GroupNorm(GROUPS, c_in)
        self.conv_in = _conv(c_in, c_out, 3)
        self.embed = nn.Linear(embedding_dim, 2 * c_out if film else c_out)
        self.norm_out = nn.GroupNorm(GROUPS, c_out)
        self.conv_out = _conv(c_out, c_out, 3)
        self.skip = _conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x_NCHW: Tensor, embedding_NE: Tensor) -> Tensor:
        """(N, C_in, H, W) and the embedding after SiLU, (N, E) -> (N, C_out, H', W')."""
        h = normalized(self.norm_in, x_NCHW)
        if self.resample == "down":
            h, x_NCHW = F.avg_pool2d(h, 2), F.avg_pool2d(x_NCHW, 2)
        elif self.resample == "up":
            h, x_NCHW = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (h, x_NCHW))
        h, embedded = self.conv_in(h), self.embed(embedding_NE)
        if self.with_film:
            h = normalized(self.norm_out, h, embedded)
        else:
            h = normalized(self.norm_out, h + embedded[:, :, None, None])
        result: Tensor = self.skip(x_NCHW) + self.conv_out(h)
        return result


class Attention(nn.Module):
    """Self-attention over pixels. `qkv` packs [all q | all k | all v], each of them head by head."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = _conv(channels, 3 * channels, 1)
        self.out = _conv(channels, channels, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        count, channels, height, width = x_NCHW.shape
        qkv_NHWC = self.qkv(normalized(self.norm, x_NCHW, activate=False)).permute(0, 2, 3, 1)
        q, k, v = qkv_NHWC.reshape(count, height * width, 3, self.heads, -1).unbind(2)
        h_NhLd = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        h_NHWC = h_NhLd.transpose(1, 2).reshape(count, height, width, channels)
        change: Tensor = self.out(h_NHWC.permute(0, 3, 1, 2))
        return x_NCHW + change


class Halve(nn.Module):
    """To half the resolution by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, stride=2)

    def forward(self, x_NCHW: Tensor, _embedding: Tensor) -> Tensor:
        h: Tensor = self.conv(x_NCHW)
        return h


class Double(nn.Module):
    """To twice the resolution: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3)

    def forward(self, x_NCHW: Tensor, _embedding: Tensor) -> Tensor:
        h: Tensor = self.conv(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"))
        return h


class Step(nn.Module):
    """What lies between two skip connections: a residual block, attention, a change of resolution, or some of them."""

    def __init__(
        self,
        residual: ResidualBlock | None,
        attention: Attention | None = None,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.residual, self.attention, self.resample = residual, attention, resample

    def forward(self, x_NCHW: Tensor, embedding_NE: Tensor) -> Tensor:
        if self.residual is not None:
            x_NCHW = self.residual(x_NCHW, embedding_NE)
        if self.attention is not None:
            x_NCHW = self.attention(x_NCHW)
        if self.resample is not None:
            x_NCHW = self.resample(x_NCHW, embedding_NE)
        return x_NCHW


class ADMUNet(nn.Module):
    """The U-Net that a description describes. `down` and `up` are its steps, from the image to the middle and back."""

    def __init__(self, described: ADMDescription) -> None:
        super().__init__()
        self.features, self.num_classes = described.features, described.num_classes
        dim, film = 4 * described.features, described.film
        self.embed_time_in, self.embed_time_out = nn.Linear(described.features, dim), nn.Linear(dim, dim)
        self.embed_class = nn.Embedding(described.num_classes, dim) if described.num_classes else None
        self.conv_in = _conv(described.channels, described.widths[0], 3)

        def block(c_in: int, c_out: int, resample: str = "") -> ResidualBlock:
            return ResidualBlock(c_in, c_out, dim, film, resample)

        def attention(channels: int, level: int) -> Attention | None:
            attends = level in described.attention_levels
            return Attention(channels, described.heads_of(channels)) if attends else None

        def resample(channels: int, direction: str) -> nn.Module:
            if described.resample == "block":
                return block(channels, channels, direction)
            return Halve(channels) if direction == "down" else Double(channels)

        c = described.widths[0]
        skips, down, up = [c], [], []
        last = len(described.widths) - 1
        for level, width in enumerate(described.widths):
            for _ in range(described.blocks_per_level):
                down.append(Step(block(c, width), attention(width, level)))
                c = width
                skips.append(c)
            if level != last:
                down.append(Step(None, None, resample(c, "down")))
                skips.append(c)
        self.middle_in, self.middle_out = block(c, c), block(c, c)
        self.middle_attention = Attention(c, described.heads_of(c))
        for level, width in reversed(list(enumerate(described.widths))):
            for i in range(described.blocks_per_level + 1):
                up_here = level != 0 and i == described.blocks_per_level
                residual = block(c + skips.pop(), width)
                c = width
                up.append(Step(residual, attention(c, level), resample(c, "up") if up_here else None))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(GROUPS, c)
        self.conv_out = _conv(c, described.out_channels, 3)

    def forward(self, x_NCHW: Tensor, time_N: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """States (N, C, H, W), the noise level as the network counts it, (N,) float32, and labels (N,) int64, which are
        needed if the network has classes -> (N, C_out, H, W). Raises ValueError if labels are missing or not wanted.
        """
        if (labels_N is not None) != (self.embed_class is not None):
            raise ValueError(
                f"the network has {self.num_classes} classes; labels given: {labels_N is not None}"
            )
        waves_NF = cosines_and_sines(time_N, self.features).to(x_NCHW.dtype)
        embedding = self.embed_time_out(F.silu(self.embed_time_in(waves_NF)))
        if self.embed_class is not None:
            embedding = embedding + self.embed_class(labels_N)
        e_NE = F.silu(embedding)  # every block begins with it: done once
        h = self.conv_in(x_NCHW.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for step in self.down:
            h = step(h, e_NE)
            skips.append(h)
        h = self.middle_out(self.middle_attention(self.middle_in(h, e_NE)), e_NE)
        for step in self.up:
            h = step(torch.cat([h, skips.pop()], dim=1), e_NE)
        output: Tensor = self.conv_out(normalized(self.norm_out, h))
        return output
