"""Group normalisation in channels-last, together with what follows it in a U-Net: FiLM and SiLU.

On CUDA, torch's group norm returns its result channels-first, whatever it was given, so that the convolutions on
either side of it copy their activations back and forth. There, statistics and the per-channel line a x + b are
computed here by plain operations that keep the layout, and that a compiler fuses into one pass. On a CPU torch's own
group norm keeps the layout; its bits are those of data sets that exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_pretending = False


def repeat(x_NCHW: Tensor, batch: int) -> Tensor:
    """Each image repeated so that there are `batch` of them, its copies adjacent, channels-last."""
    if len(x_NCHW) == batch:
        return x_NCHW
    copies_NMHWC = x_NCHW.permute(0, 2, 3, 1)[:, None].expand(-1, batch // len(x_NCHW), -1, -1, -1)
    return copies_NMHWC.flatten(0, 1).permute(0, 3, 1, 2)


def normalized(
    norm: nn.GroupNorm, x_NCHW: Tensor, film_BD: Tensor | None = None, *, activate: bool = True
) -> Tensor:
    """silu(norm(x) * (scale + 1) + shift), in the dtype and layout of x, computed in float32 on CUDA.

    `film_BD` (B, 2 C) holds scale and shift for B = N M images, M of them for each x (N, C, H, W), adjacent; the result
    is (B, C, H, W). Without it there is neither; without `activate` no SiLU.
    """
    line = _by_torch if x_NCHW.is_cpu and not _pretending else in_any_layout
    h = line(norm, x_NCHW, film_BD)
    return F.silu(h) if activate else h


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """In this context tensors on the CPU take the operations of a GPU, for estimates of its memory."""
    global _pretending
    _pretending = True
    try:
        yield
    finally:
        _pretending = False


class GroupNorm(nn.GroupNorm):
    """torch's group norm, which keeps the layout of its input (N, C, ...) on CUDA too."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized(self, x, activate=False)


def keep_layouts(network: nn.Module) -> None:
    """Make every group norm of another library's network one that keeps its input's layout; weights stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm


def _by_torch(norm: nn.GroupNorm, x_NCHW: Tensor, film_BD: Tensor | None) -> Tensor:
    h = F.group_norm(x_NCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if film_BD is None:
        return h
    scale, shift = film_BD[:, :, None, None].chunk(2, dim=1)
    return repeat(h, len(film_BD)) * (scale + 1.0) + shift


def in_any_layout(norm: nn.GroupNorm, x: Tensor, film_BD: Tensor | None) -> Tensor:
    """Norm and FiLM as a x + b, with a and b for each image and channel; x is (N, C, ...)."""
    count, channels = x.shape[:2]
    x_NLGc = x.movedim(1, -1).reshape(count, -1, norm.num_groups, channels // norm.num_groups)
    variance_NG, mean_NG = torch.var_mean(x_NLGc.float(), dim=(1, 3), correction=0)
    inverse_NG = torch.rsqrt(variance_NG + norm.eps)
    weight_Gc, bias_Gc = (p.float().reshape(norm.num_groups, -1) for p in (norm.weight, norm.bias))
    a_NGc = inverse_NG[:, :, None] * weight_Gc
    b_NGc = bias_Gc - mean_NG[:, :, None] * a_NGc
    a, b = (y.reshape(count, channels) for y in (a_NGc, b_NGc))
    if film_BD is not None:
        copies = len(film_BD) // count
        a, b = (y.repeat_interleave(copies, dim=0, output_size=len(film_BD)) for y in (a, b))
        scale_BC, shift_BC = film_BD.float().chunk(2, dim=1)
        a, b = a * (scale_BC + 1.0), b * (scale_BC + 1.0) + shift_BC
        x = repeat(x, len(film_BD))
    a, b = (y.reshape(*y.shape, *(1 for _ in x.shape[2:])) for y in (a, b))
    return (x * a + b).to(x.dtype)
