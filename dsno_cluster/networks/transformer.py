"""The diffusion transformer of Peebles & Xie 2023 (*Scalable Diffusion Models with Transformers*, section 3).

The state is cut into squares, each a token; noise level and class steer every block by scales, shifts and gates of its
normalised tokens (adaLN-Zero). Ma et al. 2024 (*SiT*) use the same network for a velocity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.networks.descriptions import TransformerDescription
from dsno_cluster.networks.embeddings import cosines_and_sines

NORM_EPS = 1e-6


def _steered(h_NLD: Tensor, shift_ND: Tensor, scale_ND: Tensor) -> Tensor:
    """The normalised tokens, scaled and shifted."""
    normal = F.layer_norm(h_NLD, h_NLD.shape[-1:], eps=NORM_EPS)
    return normal * (1.0 + scale_ND[:, None]) + shift_ND[:, None]


class Attention(nn.Module):
    """Self-attention over tokens (N, L, D). `qkv` packs [all q | all k | all v], each of them head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h_NLD: Tensor) -> Tensor:
        count, tokens, width = h_NLD.shape
        q, k, v = self.qkv(h_NLD).reshape(count, tokens, 3, self.heads, -1).unbind(2)
        h_NhLd = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        result: Tensor = self.out(h_NhLd.transpose(1, 2).reshape(count, tokens, width))
        return result


class Block(nn.Module):
    """Attention, then two linear layers, each on steered tokens and added through a gate."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.steer = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.mlp_in, self.mlp_out = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, h_NLD: Tensor, condition_ND: Tensor) -> Tensor:
        """Tokens and the condition after SiLU."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.steer(condition_ND).chunk(6, dim=1)
        h_NLD = h_NLD + gate[:, None] * self.attention(_steered(h_NLD, shift, scale))
        wide = F.gelu(self.mlp_in(_steered(h_NLD, shift_mlp, scale_mlp)), approximate="tanh")
        result: Tensor = h_NLD + gate_mlp[:, None] * self.mlp_out(wide)
        return result


class Transformer(nn.Module):
    """The transformer that a description describes. `positions` (1, L, D) is fixed; it comes with the weights."""

    positions: Tensor

    def __init__(self, described: TransformerDescription) -> None:
        super().__init__()
        width, patch, side = (
            described.width,
            described.patch_size,
            described.size // described.patch_size,
        )
        self.features, self.patch, self.side = described.features, patch, side
        self.out_channels = described.out_channels
        self.register_buffer("positions", torch.zeros(1, side * side, width))
        self.cut = nn.Conv2d(described.channels, width, patch, stride=patch)
        self.embed_time_in, self.embed_time_out = (
            nn.Linear(described.features, width),
            nn.Linear(width, width),
        )
        self.embed_class = nn.Embedding(described.num_classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(width, described.heads, described.mlp_width) for _ in range(described.depth)
        )
        self.steer_out = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, patch * patch * described.out_channels)

    def forward(self, x_NCHW: Tensor, time_N: Tensor, labels_N: Tensor) -> Tensor:
        """States (N, C, size, size), the noise level as the network counts it, (N,) float32, and labels (N,) int64, of which
        num_classes means "no class" -> (N, C_out, size, size), channels-last.
        """
        waves_NF = cosines_and_sines(time_N, self.features).to(x_NCHW.dtype)
        condition = self.embed_time_out(F.silu(self.embed_time_in(waves_NF))) + self.embed_class(labels_N)
        condition_ND = F.silu(condition)  # every block begins with it: done once
        patches_NDHW = self.cut(x_NCHW.contiguous(memory_format=torch.channels_last))
        h_NLD = patches_NDHW.flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h_NLD = block(h_NLD, condition_ND)
        squares_NLP = self.linear_out(_steered(h_NLD, *self.steer_out(condition_ND).chunk(2, dim=1)))
        side, patch = self.side, self.patch
        rows = squares_NLP.reshape(-1, side, side, patch, patch, self.out_channels).transpose(2, 3)
        output: Tensor = rows.reshape(-1, side * patch, side * patch, self.out_channels).permute(0, 3, 1, 2)
        return output
