"""A discriminator's head: says of each place in a network's features whether it is of a real image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiscriminatorHead(nn.Module):
    """Norm over channels, linear, SiLU, linear: a logit for each place of features, by itself. In float32 at any precision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.hidden, self.out = nn.Linear(channels, channels), nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W), of which each pixel is a place, or (N, L, C) -> logits (N, L), float32."""
        places_NLC = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.out(F.silu(self.hidden(self.norm(places_NLC.float()))))
            return logits[..., 0]
