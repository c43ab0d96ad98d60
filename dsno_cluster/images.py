"""Images as 8-bit pixels and as PNG pictures: enlarged without smoothing, in a grid."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PAPER = (255, 255, 255)
GAP = 4  # pixels between the images of a grid


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8 bit, rounded to nearest and clamped."""
    return (127.5 * images + 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(images: Tensor, columns: int) -> bytes:
    """Images (N, C, H, W) in [-1, 1] as a PNG grid with `columns` columns."""
    count = len(images)
    rows = -(-count // columns)
    scale = pixel_scale(images)
    height, width = (images.shape[-2] * scale + GAP), (images.shape[-1] * scale + GAP)
    sheet = Image.new("RGB", (min(columns, count) * width + GAP, rows * height + GAP), PAPER)
    for i, image in enumerate(images):
        sheet.paste(tile_of(image, scale), (GAP + i % columns * width, GAP + i // columns * height))
    return png_bytes(sheet)


def pixel_scale(images: Tensor) -> int:
    """The integer factor that enlarges an image to about 48 pixels, so that its own pixels stay sharp."""
    return max(1, round(48 / images.shape[-1]))


def shown_channels(images: Tensor) -> Tensor:
    """The channels of images (..., C, H, W) that pictures show: the first three, or of fewer the first, in grey."""
    return images[..., : 3 if images.shape[-3] >= 3 else 1, :, :]


def tile_of(image: Tensor, scale: int) -> Image.Image:
    """One image (C, H, W) in [-1, 1], enlarged without smoothing; its first three channels, or its first in grey."""
    pixels = to_uint8(shown_channels(image)).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Image.fromarray(np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1))


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
