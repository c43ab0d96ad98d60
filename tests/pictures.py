"""Pictures that are the same wherever they are made."""

from __future__ import annotations

import numpy as np

EVERY = 13  # one row and one column in so many of a resized picture are kept
# the images of both sides, as `pictures` makes them, and how many are in a part of the Inception Score
REAL_IMAGES, SAMPLE_IMAGES, SPLIT_IMAGES = (10, 40, 60.0), (11, 48, 75.0), 12


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + c) + y / (11 - 2 * c)) for c in range(3)]
    noise = np.random.default_rng(height * 1000 + width).standard_normal((height, width, 3))
    return np.round(127.5 + 90 * np.stack(waves, -1) + 25 * noise).clip(0, 255).astype(np.uint8)


def pictures(seed: int, count: int, contrast: float) -> np.ndarray:
    """Different ones of 32 pixels, uint8 (count, 32, 32, 3)."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32] / 32
    slopes, phases = (
        generator.uniform(-12, 12, (2, count, 3, 1, 1)),
        generator.uniform(0, 6, (count, 3, 1, 1)),
    )
    waves = np.sin(slopes[0] * x + slopes[1] * y + phases)
    found = 127.5 + contrast * waves + 15 * generator.standard_normal(waves.shape)
    return np.round(found).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
