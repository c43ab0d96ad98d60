"""What is not public in torch-fidelity 0.4, and needed: its extractors take 8-bit images only, which have no gradients."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def accepting_floats(extractor: nn.Module) -> Iterator[None]:
    """In this context the extractor also takes floating-point images (N, C, H, W) in [0, 255].

    Its `forward` checks its input by `vassert` of its module, and then converts it to floats at once.
    """
    module = sys.modules[type(extractor).__module__]
    checked = module.vassert

    def without_type(holds: bool, message: str) -> None:
        if "uint8" not in message:
            checked(holds, message)

    module.vassert = without_type  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.vassert = checked  # type: ignore[attr-defined]
