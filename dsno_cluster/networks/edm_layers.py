"""The parts that EDM's networks share: resampling, embeddings of the noise level, attention and the residual block.

Written from Karras et al. 2022 (*Elucidating the Design Space of Diffusion-Based Generative Models*, appendix F.2, tables
7 and 8), Song et al. 2021 and Dhariwal & Nichol 2021. Parameters are named as in EDM's checkpoints, and the convolution
`qkv` gives [q | k | v] of head 0, then of head 1, and so on. Activations are channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.networks.normalization import normalized

MIN_CHANNELS_PER_GROUP, MOST_GROUPS = 4, 32


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """32 groups, or fewer so that each has four channels."""
    return nn.GroupNorm(min(MOST_GROUPS, channels // MIN_CHANNELS_PER_GROUP), channels, eps=eps)


def conv(c_in: int, c_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


def separable_filter(taps: Sequence[float]) -> Tensor:
    """The two-dimensional low-pass filter of one-dimensional `taps`, (1, 1, k, k) float32, of sum 1."""
    line = torch.tensor(
        taps, dtype=torch.float32, device="cpu"
    )  # also where networks are made without memory
    return (line.outer(line) / line.sum() ** 2)[None, None]


class Resample(nn.Module):
    """Halves (`down`) or doubles (`up`) images with a low-pass filter; its taps are (1, 1) for a box.

    `padding` is that of the filter, one less than half of its taps unless it is given.
    """

    def __init__(self, direction: str, taps: Sequence[int], padding: int | None = None) -> None:
        super().__init__()
        self.direction, self.box = direction, len(taps) == 2 and taps[0] == taps[1]
        self.padding = (len(taps) - 1) // 2 if padding is None else padding
        self.register_buffer("filter", separable_filter(taps), persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.box and self.direction == "down":
            return F.avg_pool2d(x_NCHW, 2)
        if self.box:
            return F.interpolate(x_NCHW, scale_factor=2, mode="nearest")
        channels = x_NCHW.shape[1]
        one: Tensor = self.get_buffer("filter").to(x_NCHW.dtype)
        weight = one.expand(channels, 1, -1, -1).contiguous(memory_format=torch.channels_last)
        if self.direction == "down":
            return F.conv2d(x_NCHW, weight, stride=2, padding=self.padding, groups=channels)
        return F.conv_transpose2d(x_NCHW, 4 * weight, stride=2, padding=self.padding, groups=channels)


def positional_embedding(
    noise_N: Tensor, channels: int, *, end_point: bool, sine_first: bool, periods: float = 10000.0
) -> Tensor:
    """Sines and cosines of `channels` / 2 frequencies from 1 to 1 / `periods`, that end included or not; float32."""
    half = channels // 2
    exponent = torch.arange(half, device=noise_N.device, dtype=torch.float32) / (half - int(end_point))
    return _waves(noise_N.float()[:, None] * (1.0 / periods) ** exponent, sine_first=sine_first)


class FourierEmbedding(nn.Module):
    """Sines, then cosines of random frequencies, which belong to the checkpoint (Tancik et al. 2020); float32."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, noise_N: Tensor) -> Tensor:
        frequencies_H = 2 * math.pi * self.freqs.float()
        return _waves(noise_N.float()[:, None] * frequencies_H, sine_first=True)


def _waves(angle_NH: Tensor, *, sine_first: bool) -> Tensor:
    waves = (angle_NH.sin(), angle_NH.cos())
    return torch.cat(waves if sine_first else waves[::-1], dim=1)


def one_hot(labels_N: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """One-hot rows (N, classes) of int64 labels; the label `classes`, or none at all, is a row of zeros."""
    if labels_N is None:
        return like.new_zeros(len(like), classes)
    return F.one_hot(labels_N, classes + 1)[:, :classes].to(like.dtype)


def attend(qkv_NCHW: Tensor, heads: int) -> Tensor:
    """Self-attention over pixels of queries, keys and values that are packed [q | k | v] for each head."""
    count, _, height, width = qkv_NCHW.shape
    qkv_NLhD = qkv_NCHW.permute(0, 2, 3, 1).reshape(count, height * width, heads, -1)
    q, k, v = qkv_NLhD.transpose(1, 2).chunk(3, dim=-1)
    return to_images(F.scaled_dot_product_attention(q, k, v), height)


def to_images(h_NhLd: Tensor, height: int) -> Tensor:
    """(N, heads, pixels, channels of a head) -> (N, C, H, W), channels-last."""
    count, heads, pixels, channels = h_NhLd.shape
    h_NHWC = h_NhLd.transpose(1, 2).reshape(count, height, pixels // height, heads * channels)
    return h_NHWC.permute(0, 3, 1, 2)


class UNetBlock(nn.Module):
    """A residual block of one or two halves: convolutions, and self-attention if it has `heads`.

    Norm, SiLU, (resample), convolution; then the embedding enters, as a scale and shift after the second norm
    (`adaptive`) or as a term before it; SiLU, convolution. The sum with the input is multiplied by `skip_scale`, and so is
    that with the attention's. `project`: an input that is resampled passes a 1x1 convolution too.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        *,
        resample: str = "",
        taps: Sequence[int] = (1, 1),
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        project: bool = False,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.skip_scale, self.adaptive = heads, skip_scale, adaptive
        self.norm0, self.conv0 = group_norm(c_in, eps), conv(c_in, c_out, 3)
        self.resample = Resample(resample, taps) if resample else nn.Identity()
        self.affine = nn.Linear(embedding, c_out * (2 if adaptive else 1))
        self.norm1, self.dropout, self.conv1 = (
            group_norm(c_out, eps),
            nn.Dropout(dropout),
            conv(c_out, c_out, 3),
        )
        projects = c_in != c_out or (bool(resample) and project)
        self.skip = conv(c_in, c_out, 1) if projects else nn.Identity()
        if heads:
            self.norm2 = group_norm(c_out, eps)
            self.qkv, self.proj = conv(c_out, 3 * c_out, 1), conv(c_out, c_out, 1)

    def forward(self, x_NCHW: Tensor, embedding_NE: Tensor) -> Tensor:
        """Images and the embedding, which already is after its SiLU -> (N, C_out, H', W')."""
        h: Tensor = self.conv0(self.resample(normalized(self.norm0, x_NCHW)))
        given = self.affine(embedding_NE)
        if self.adaptive:
            h = normalized(self.norm1, h, given)
        else:
            h = normalized(self.norm1, h + given[:, :, None, None])
        h = self.conv1(self.dropout(h))
        h = (h + self.skip(self.resample(x_NCHW))) * self.skip_scale
        if self.heads:
            change = attend(self.qkv(normalized(self.norm2, h, activate=False)), self.heads)
            h = (self.proj(change) + h) * self.skip_scale
        return h


def decoder_blocks(
    at: str, c: int, width: int, count: int, skips: list[int], lowest: bool
) -> Iterator[tuple[str, int, int, str]]:
    """The blocks of the level `at` of a decoder that is entered with `c` channels: name, channels in and out, resampling.

    The lowest level begins with two blocks of its own, others with one that enlarges; `count` blocks of `width` channels
    follow, each of which takes the channels of one of the `skips`, the last first.
    """
    for inner in ("in0", "in1") if lowest else ("up",):
        yield f"{at}_{inner}", c, c, "" if lowest else "up"
    for i in range(count):
        yield f"{at}_block{i}", c + skips.pop(), width, ""
        c = width


def per_head(packed: Tensor, heads: int) -> Tensor:
    """Rows of EDM's `qkv`, which are ordered (head, channel, [q, k, v]), in the order (head, [q, k, v], channel)."""
    rows = packed.reshape(heads, -1, 3, *packed.shape[1:])
    return rows.transpose(1, 2).reshape(packed.shape)
