"""The student's time axis: the published Fourier convolution as a real operator, and the cosine series.

Published form (Zheng et al. 2023, section 3.2): u + LeakyReLU(irfft(R . rfft(u))), the transform taken over
the M time points, only the lowest K modes kept, R complex. For given points that is a real linear map: an
analysis into Fourier modes, a real channel mix for each mode, and a synthesis. In this form it has no complex
parameters (DeepSpeed cannot partition those), needs no detour through float32, and works in bfloat16 and
under compile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FourierBasis(NamedTuple):
    """The basis functions of time of the temporal convolutions, for given points.

    `analysis` (F, M) maps values at M points to real coefficients, `synthesis` (P, F) maps those to values at
    the points `wanted` (P positions among the M). The first `real` coefficients belong to modes with a real
    coefficient (the mean and the Nyquist mode); the others are the real and imaginary parts of one mode after
    the other. `modes` are the numbers of the modes in this order. Both are index tensors, on the device already: a
    list would be copied there, and waited for, at each use.
    """

    analysis: Tensor
    synthesis: Tensor
    wanted: Tensor
    real: int
    modes: Tensor


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def fourier_basis(
    phases: tuple[float, ...],
    modes: int,
    nyquist: int | None = None,
    wanted: tuple[int, ...] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> FourierBasis:
    """The lowest `modes` Fourier modes at M points, `phases` in units of one period.

    On a uniform grid this is the truncated discrete Fourier transform, elsewhere the least-squares fit of the
    same modes. Modes that M points do not determine are omitted. `nyquist` is the mode whose imaginary part
    vanishes on the model's own grid (M/2 for an even M), so that it never reaches the output of `irfft`.
    `wanted`: the points to evaluate (default: all).
    """
    real: list[int] = []
    other: list[int] = []
    for k in range(modes):
        alone = k in (0, nyquist)
        if len(real) + 2 * len(other) + (1 if alone else 2) <= len(phases):
            (real if alone else other).append(k)
    phase_M = torch.tensor(phases, dtype=torch.float64)
    columns = [torch.cos(2 * math.pi * k * phase_M) for k in real]
    for k in other:
        angle_M = 2 * math.pi * k * phase_M
        columns += [angle_M.cos(), -angle_M.sin()]
    synthesis_MF = torch.stack(columns, dim=1)
    # the cut-off drops modes that points lying close together cannot distinguish
    analysis_FM = torch.linalg.pinv(synthesis_MF, rtol=1e-3)
    wanted = tuple(range(len(phases))) if wanted is None else wanted
    analysis, synthesis = (x.to(device, dtype) for x in (analysis_FM, synthesis_MF[list(wanted)]))
    at_P, modes_K = (torch.tensor(x, device=device) for x in (wanted, (*real, *other)))
    return FourierBasis(analysis, synthesis, at_P, len(real), modes_K)


class TemporalConv(nn.Module):
    """u + LeakyReLU(0.01)(irfft(R . rfft(u))) over time, channels kept.

    `weight` is R as real numbers, (C_in, C_out, K, 2). `init` published: uniform in [0, 1 / (C_in C_out)); zero: the
    layer starts as the identity, and the student as its backbone.
    """

    def __init__(self, channels: int, modes: int, init: str = "published") -> None:
        super().__init__()
        shape = (channels, channels, modes, 2)
        zero = init == "zero"
        self.weight = nn.Parameter(torch.zeros(shape) if zero else torch.rand(shape) / (channels * channels))

    def forward(self, u_BCHW: Tensor, basis: FourierBasis) -> Tensor:
        """(N*M, C, H, W), the M points of a sample adjacent -> (N*P, C, H, W) at the basis' wanted points.

        It works in channels-last; input that is channels-last already is not copied.
        """
        batch, channels, height, width = u_BCHW.shape
        points = basis.analysis.shape[1]
        u_NMX = u_BCHW.permute(0, 2, 3, 1).reshape(batch // points, points, -1)
        spectrum_NFLC = (basis.analysis @ u_NMX).reshape(len(u_NMX), -1, height * width, channels)
        re_KIO, im_KIO = self.weight.to(u_BCHW.dtype).index_select(2, basis.modes).permute(3, 2, 0, 1)
        mixed = [spectrum_NFLC[:, : basis.real] @ re_KIO[: basis.real]]
        for k in range(basis.real, len(basis.modes)):
            # (a + ib)(Re + i Im) as one real product of [a, b] with [[Re, Im], [-Im, Re]]
            at = basis.real + 2 * (k - basis.real)
            parts_NLC = torch.cat([spectrum_NFLC[:, at], spectrum_NFLC[:, at + 1]], dim=-1)
            re, im = re_KIO[k], im_KIO[k]
            product = parts_NLC @ torch.cat([torch.cat([re, im], 1), torch.cat([-im, re], 1)])
            mixed.append(product.unflatten(-1, (2, channels)).transpose(1, 2))
        v_NPX = basis.synthesis @ torch.cat(mixed, dim=1).reshape(len(u_NMX), -1, u_NMX.shape[2])
        if len(basis.wanted) < points:
            u_NMX = u_NMX.index_select(1, basis.wanted)
        sum_NPX = u_NMX + F.leaky_relu(v_NPX, 0.01)
        return sum_NPX.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


def cosine_series(times: Sequence[float], modes: int) -> Tensor:
    """cos(pi k sqrt(t)) for k = 0..K-1 at `times` in [0, 1], (M, K) float64.

    In the square root of the cosine time the clean image that a chord of the trajectory points at,
    (x_t - sigma_t x_1) / alpha_t, is smooth: four modes through four points are within 1.3 % of the whole curve
    of the digits teacher, eight through eight within 0.3 %.
    """
    root_M = torch.tensor(list(times), dtype=torch.float64).sqrt()
    return torch.cos(math.pi * root_M[:, None] * torch.arange(modes, dtype=torch.float64))
