"""Pictures that are the same wherever they are made."""

from __future__ import annotations

import numpy as np

EVERY = 13  # one row and one column in so many of a resized picture are kept


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + c) + y / (11 - 2 * c)) for c in range(3)]
    noise = np.random.default_rng(height * 1000 + width).standard_normal((height, width, 3))
    return np.round(127.5 + 90 * np.stack(waves, -1) + 25 * noise).clip(0, 255).astype(np.uint8)
