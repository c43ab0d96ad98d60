"""Sizes of a U-Net's activations and weights by arithmetic, from its description; needs no torch.

For `plan`, and to keep tensors below the 2^31 elements that many kernels count up to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsno_cluster.config import Network
from dsno_cluster.networks.backbones import (
    ADMNetwork,
    Backbone,
    DhariwalNetwork,
    DiffusersUNet,
    EDM2Network,
    OurUNet,
    SongNetwork,
)
from dsno_cluster.networks.diffusers_model import DiffusersModel

MOST_ELEMENTS = 2**31 - 1  # largest size of a tensor


@dataclass(frozen=True)
class UNetShape:
    """What of a U-Net decides on sizes; each of `levels` has its channels and whether it attends."""

    sides: tuple[int, int]
    channels: int
    width: int
    levels: tuple[tuple[int, bool], ...]
    blocks_per_level: int
    embedding_dim: int
    middle_attends: bool = True


@dataclass(frozen=True)
class Block:
    """A residual block, and the attention after it: channels and pixels on its way in and out.

    `kept` are the elements of the skips that lie ready for later blocks meanwhile, for one image. `mixes`: temporal
    convolutions follow it if the network has any.
    """

    c_in: int
    c_out: int
    pixels_in: int
    pixels_out: int
    attends: bool
    kept: int
    mixes: bool = True


def shape_of(
    network: Network | DiffusersModel | Backbone, sides: tuple[int, int] | None = None
) -> UNetShape | None:
    """The shape of our U-Net, or of another one for states of these `sides`; None for a transformer, or if it is not known."""
    if isinstance(network, DiffusersModel):
        return _of_diffusers(network.config, sides)
    if isinstance(network, Backbone):
        return _of_backbone(network, sides)
    width, multipliers = network.width, network.multipliers
    blocks, embedding = network.blocks_per_level, network.embedding_dim
    if width is None or multipliers is None or blocks is None or embedding is None:
        return None
    levels = tuple(
        (width * multiplier, height in network.attention_resolutions)
        for multiplier, height in zip(multipliers, network.level_heights(len(multipliers)), strict=True)
    )
    return UNetShape(network.sides, network.state_channels, width, levels, blocks, embedding)


def _of_backbone(backbone: Backbone, sides: tuple[int, int] | None) -> UNetShape | None:
    match backbone.network:
        case OurUNet(settings=settings):
            return shape_of(settings)
        case DiffusersUNet(settings=settings):
            return _of_diffusers(settings, sides)
        case SongNetwork(settings=settings) | DhariwalNetwork(settings=settings):
            channels, embedding = settings.in_channels, settings.channel_mult_emb * settings.model_channels
        case EDM2Network(settings=settings):
            channels = settings.img_channels + 1
            embedding = (settings.channel_mult_emb or max(settings.channel_mult)) * settings.model_channels
        case ADMNetwork(settings=settings):
            levels = tuple((c, i in settings.attention_levels) for i, c in enumerate(settings.widths))
            blocks, first = settings.blocks_per_level, settings.widths[0]
            if sides is None:
                return None
            return UNetShape(sides, settings.channels, first, levels, blocks, 4 * settings.features)
        case _:
            return None
    sizes = zip(settings.channel_mult, settings.resolutions, strict=True)
    levels = tuple(
        (multiplier * settings.model_channels, any(f".{size}x{size}_" in name for name in settings.heads))
        for multiplier, size in sizes
    )
    size = settings.img_resolution
    return UNetShape((size, size), channels, levels[0][0], levels, settings.num_blocks, embedding)


def _of_diffusers(config: dict[str, Any], sides: tuple[int, int] | None) -> UNetShape | None:
    channels, kinds = config.get("block_out_channels"), config.get("down_block_types")
    size = config.get("sample_size")
    sides = sides or ((size, size) if isinstance(size, int) else None)
    if not channels or not kinds or sides is None:
        return None
    levels = tuple((int(c), "Attn" in str(kind)) for c, kind in zip(channels, kinds, strict=False))
    return UNetShape(
        sides,
        int(config.get("in_channels", 3)),
        int(channels[0]),
        levels,
        int(config.get("layers_per_block", 2)),
        4 * int(channels[0]),
        bool(config.get("add_attention", True)),
    )


def blocks_of(shape: UNetShape) -> Iterator[Block]:
    """The blocks in the order of a forward pass."""
    sizes = [math.prod(side // 2**i for side in shape.sides) for i in range(len(shape.levels))]
    last = len(sizes) - 1
    c, skips = shape.width, [(shape.width, sizes[0])]

    def kept() -> int:
        return sum(channels * pixels for channels, pixels in skips)

    for i, ((channels, attends), pixels) in enumerate(zip(shape.levels, sizes, strict=True)):
        for _ in range(shape.blocks_per_level):
            yield Block(c, channels, pixels, pixels, attends, kept())
            c = channels
            skips.append((c, pixels))
        if i < last:
            yield Block(c, c, pixels, sizes[i + 1], False, kept(), mixes=False)
            skips.append((c, sizes[i + 1]))
    yield Block(c, c, sizes[last], sizes[last], shape.middle_attends, kept())
    yield Block(c, c, sizes[last], sizes[last], False, kept(), mixes=False)
    for i in reversed(range(len(sizes))):
        channels, attends = shape.levels[i]
        for _ in range(shape.blocks_per_level + 1):
            beside, _pixels = skips.pop()
            yield Block(c + beside, channels, sizes[i], sizes[i], attends, kept())
            c = channels
        if i > 0:
            yield Block(c, c, sizes[i], sizes[i - 1], False, kept(), mixes=False)


def largest_tensor(shape: UNetShape, out_channels: int) -> int:
    """Elements of the largest tensor that one image makes in a forward pass, (C, H, W) at its widest."""
    tensors = [channels * math.prod(shape.sides) for channels in (shape.channels, out_channels)]
    for block in blocks_of(shape):
        tensors.append(block.c_in * max(block.pixels_in, block.pixels_out))
        tensors.append(block.c_out * block.pixels_out * (3 if block.attends else 1))  # q, k and v are one
    return max(tensors)


def samples_at_a_time(elements: int, count: int) -> int:
    """How many of `count` samples pass through together, if each makes a tensor of `elements`: parts of nearly one size."""
    most = max(1, MOST_ELEMENTS // max(1, elements))
    parts = max(1, -(-count // most))
    return max(1, -(-count // parts))


def inference_elements(shape: UNetShape) -> int:
    """Elements that one image holds at the peak of a forward pass: skips, a block's input and output, and between them."""
    return max(
        block.kept
        + 2 * block.c_in * max(block.pixels_in, block.pixels_out)
        + 2 * block.c_out * block.pixels_out
        for block in blocks_of(shape)
    )


def parameter_count(shape: UNetShape, out_channels: int, modes: int = 0, class_slots: int = 0) -> int:
    """The number of weights, those of diffusers' networks nearly."""
    dim, width = shape.embedding_dim, shape.width

    def conv(c_in: int, c_out: int, kernel: int) -> int:
        return c_in * c_out * kernel**2 + c_out

    total = conv(width, dim, 1) + conv(dim, dim, 1) + (conv(class_slots, dim, 1) if class_slots else 0)
    total += conv(shape.channels, width, 3) + conv(width, out_channels, 3) + 2 * width
    for block in blocks_of(shape):
        total += 2 * block.c_in + conv(block.c_in, block.c_out, 3) + conv(dim, 2 * block.c_out, 1)
        total += 2 * block.c_out + conv(block.c_out, block.c_out, 3)
        total += conv(block.c_in, block.c_out, 1) if block.c_in != block.c_out else 0
        total += (2 + 3 * (block.c_out + 1) + block.c_out + 1) * block.c_out if block.attends else 0
        total += 2 * modes * block.c_out**2 if block.mixes else 0
    return total
