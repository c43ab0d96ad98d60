"""Where a denoiser's network is deepest: the module whose output a discriminator judges (Yin et al. 2024b, section 4.4)."""

from __future__ import annotations

from typing import Any

from torch import nn

from dsno_cluster.networks.adm_unet import ADMUNet
from dsno_cluster.networks.dhariwal_unet import DhariwalUNet
from dsno_cluster.networks.edm2_unet import EDM2UNet, MPBlock
from dsno_cluster.networks.edm_layers import UNetBlock
from dsno_cluster.networks.song_unet import SongUNet
from dsno_cluster.networks.transformer import Block, Transformer
from dsno_cluster.networks.unet import UNet


def middle_of(network: nn.Module) -> tuple[nn.Module, int] | None:
    """The module in the middle of a network, and the channels of its output; None for a network that is not known here.

    The output is (N, C, H, W) of a U-Net, from its middle, or from the last block of its encoder if it has no middle of its
    own, and tokens (N, L, C) of a transformer, from the block half way.
    """
    match network:
        case UNet() | ADMUNet():
            return network.middle_out, network.middle_out.conv_out.out_channels
        case SongUNet() | DhariwalUNet() | EDM2UNet():
            return _last_of_encoder(network)
        case Transformer():
            block = _half_way(network.blocks)
            assert isinstance(block, Block)
            return block, block.steer.in_features
    return _of_diffusers(network)


def _last_of_encoder(network: SongUNet | DhariwalUNet | EDM2UNet) -> tuple[nn.Module, int]:
    """The last block of the encoder; if that has none, the first one after it."""
    for module in (*list(network.enc.values())[::-1], *network.dec.values()):
        if isinstance(module, UNetBlock):
            return module, module.conv1.out_channels
        if isinstance(module, MPBlock):
            return module, len(module.conv_res1.weight)
    raise AssertionError("a decoder begins with a block")


def _of_diffusers(network: Any) -> tuple[nn.Module, int] | None:
    """As `middle_of` for diffusers' networks, by the names of their classes: the library may not be installed."""
    kind = type(network).__name__
    if kind == "UNet2DModel":
        middle = network.mid_block or network.down_blocks[-1]
        return middle, middle.resnets[-1].out_channels
    if kind == "DiTTransformer2DModel":
        return _half_way(network.transformer_blocks), network.proj_out_1.in_features
    return None


def _half_way(blocks: nn.ModuleList) -> nn.Module:
    return blocks[(len(blocks) - 1) // 2]
