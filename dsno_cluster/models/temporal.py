"""The Fourier temporal convolution of DSNO, as a real linear operator.

Published form (Zheng et al. 2023, section 3.2): u + LeakyReLU(irfft(R . rfft(u))), the transform taken over
the M time points, only the lowest K modes kept, R complex. For a fixed M that is a real linear map: a
truncated real DFT, a real channel mix per mode, and its inverse. Written so, it has no complex parameters
(DeepSpeed cannot partition those), needs no float32 detour, and works in bfloat16 and under compile.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.lru_cache(maxsize=64)
def real_dft(points: int, modes: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """The truncated real DFT over M time points: analysis (F, M), synthesis (M, F), and its modes, float64.

    F = 2K - 1, or 2K - 2 where M is even and K = M/2 + 1: the mean (and the Nyquist mode) of a real signal are
    real, and the imaginary part given to them never reaches the output of `irfft`. The rows are those real
    modes first, then real and imaginary part of each of the others; both lists are returned, in that order.
    """
    real = [k for k in range(modes) if k == 0 or 2 * k == points]
    other = [k for k in range(modes) if k not in real]
    m = torch.arange(points, dtype=torch.float64)
    analysis, synthesis = [], []
    for k in real + other:
        angle_M = 2 * math.pi * k * m / points
        analysis.append(angle_M.cos())
        synthesis.append(angle_M.cos() * (1.0 if k in real else 2.0) / points)
        if k in other:
            analysis.append(-angle_M.sin())
            synthesis.append(-angle_M.sin() * 2.0 / points)
    return torch.stack(analysis), torch.stack(synthesis, dim=1), real, other


class TemporalConv(nn.Module):
    """u + LeakyReLU(0.01)(irfft(R . rfft(u))) over time, channels kept.

    `weight` is R as real numbers, (C_in, C_out, K, 2), initialised uniform in [0, 1 / (C_in C_out)) as
    published. With fewer than 2(K-1) time points the modes that the grid cannot carry are left out.
    """

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.rand(channels, channels, modes, 2) / (channels * channels))

    def forward(self, u_BCHW: Tensor, points: int) -> Tensor:
        """(N*M, C, H, W), the M time points of a sample adjacent -> the same shape."""
        batch, channels, height, width = u_BCHW.shape
        count, pixels = batch // points, height * width
        analysis, synthesis, real, other = real_dft(points, min(self.modes, points // 2 + 1))
        spectrum_NFCP = (analysis.to(u_BCHW) @ u_BCHW.reshape(count, points, -1)).reshape(
            count, -1, channels, pixels
        )
        re, im = self.weight.to(u_BCHW.dtype).permute(3, 2, 1, 0)  # each (K, C_out, C_in)
        mixed = [re[real] @ spectrum_NFCP[:, : len(real)]]
        if other:
            # a complex product as a real one, [[Re, -Im], [Im, Re]] on real and imaginary parts stacked
            re, im = re[other], im[other]
            matrix = torch.cat([torch.cat([re, -im], dim=2), torch.cat([im, re], dim=2)], dim=1)
            stacked = spectrum_NFCP[:, len(real) :].reshape(count, len(other), 2 * channels, pixels)
            mixed.append((matrix @ stacked).reshape(count, -1, channels, pixels))
        v_NMX = synthesis.to(u_BCHW) @ torch.cat(mixed, dim=1).reshape(count, -1, channels * pixels)
        return u_BCHW + F.leaky_relu(v_NMX.reshape(u_BCHW.shape), 0.01)
