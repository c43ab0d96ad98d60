"""nearest.png: samples of the student, each beside its nearest training image, for the eye to judge what is a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dsno_cluster.evaluation.nearest import nearest_training
from dsno_cluster.evaluation.records import HeldOut, Layout
from dsno_cluster.image_sets.image_set import ImageSet
from dsno_cluster.images import GAP, PAPER, pixel_scale, png_bytes, tile_of

NEAREST = "nearest.png"
PAIRS = 3  # samples of a row of the other pictures, which has one class if there are classes
_INK, _MUTED = (28, 30, 34), (110, 114, 122)
_LEFT, _TOP, _BELOW = 40, 84, 22  # room for the classes, the title and the distance below a pair
_APART = 24  # between pairs


def shown_samples(plain: Layout, images_NCHW: Tensor) -> Tensor:
    """Those of the pictured samples that are shown beside their nearest training images: the first of each row, (K, C, H, W)."""
    rows = images_NCHW.reshape(plain.rows, plain.columns, *images_NCHW.shape[1:])
    return rows[:, :PAIRS].flatten(0, 1)


def nearest_picture(
    plain: Layout,
    samples_KCHW: Tensor,
    features_KD: np.ndarray,
    training: ImageSet,
    training_MD: np.ndarray,
    held_out: HeldOut | None,
) -> bytes:
    """The picture as PNG bytes: the samples in [-1, 1] of `shown_samples`, with their features and those of the training images.

    Raises UserError if a training image cannot be read any more.
    """
    distances, index = nearest_training(features_KD, training_MD)
    found = [training.read(int(i), int(i) + 1)[0] / 127.5 - 1.0 for i in index]
    return _sheet(plain, samples_KCHW, found, distances.tolist(), held_out)


def _sheet(
    plain: Layout,
    samples: Tensor,
    found: Sequence[Tensor],
    distances: Sequence[float],
    held_out: HeldOut | None,
) -> bytes:
    scale, pairs = pixel_scale(samples), min(PAIRS, plain.columns)
    height, width = (side * scale for side in samples.shape[-2:])
    small, bold = ImageFont.load_default(13), ImageFont.load_default(19)
    lines = ["Below each pair: the distance between their features."]
    if held_out is not None and held_out.nearest is not None:
        lines.append(f"Held-out real images: median distance {held_out.nearest:.3f}.")
    title = "Sample | nearest training image"
    across = 2 * width + GAP + _APART
    wide = max(int(bold.getlength(title)), *(int(small.getlength(line)) for line in lines)) + 32
    size = (max(_LEFT + pairs * across, wide), _TOP + plain.rows * (height + _BELOW + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 10), title, fill=_INK, font=bold)
    for n, line in enumerate(lines):
        draw.text((16, 38 + 18 * n), line, fill=_MUTED, font=small)
    for k, (sample, image, distance) in enumerate(zip(samples, found, distances, strict=True)):
        x, y = tile_place(plain, samples, k)
        sheet.paste(tile_of(sample, scale), (x, y))
        sheet.paste(tile_of(image, 1).resize((width, height), Image.Resampling.NEAREST), (x + width + GAP, y))
        draw.text((x, y + height + 3), f"{distance:.3f}", fill=_MUTED, font=small)
        if plain.classes and k % pairs == 0:
            draw.text((16, y + height // 2 - 10), str(k // pairs), fill=_INK, font=bold)
    return png_bytes(sheet)


def tile_place(plain: Layout, samples_KCHW: Tensor, k: int) -> tuple[int, int]:
    """The left upper corner of a sample in the picture, in pixels; its training image is to the right of it."""
    scale, pairs = pixel_scale(samples_KCHW), min(PAIRS, plain.columns)
    height, width = (side * scale for side in samples_KCHW.shape[-2:])
    row, column = divmod(k, pairs)
    return _LEFT + column * (2 * width + GAP + _APART), _TOP + row * (height + _BELOW + GAP)
